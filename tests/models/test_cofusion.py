"""CoFusion's size, and what replaces its modules in the ablations."""

from __future__ import annotations

import pytest
import torch

from fastfusion.models import CoFusion
from fastfusion.nn import SSCFM, SpaCAM, SpeCAM
from tests.closeness import relative_error

MODULES = {"spatial": SpaCAM, "spectral": SpeCAM, "cross": SSCFM}


def count(**options):
    with torch.device("meta"):
        model = CoFusion(103, 4, 4, **options)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_papers_size():
    assert count() == pytest.approx(4.91e6, rel=0.02)


@pytest.mark.parametrize(
    ("option", "saved"), [("spatial", 1.33e6), ("spectral", 0.76e6), ("cross", 0.29e6)]
)
def test_an_ablation_saves_what_it_saves_in_the_paper(option, saved):
    assert count() - count(**{option: "residual"}) == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("option", MODULES)
def test_an_ablation_has_none_of_the_module_and_all_of_the_others(option):
    model = CoFusion(5, 2, 4, width=8, depths=(1, 2, 1), **{option: "residual"}).eval()
    for other, kind in MODULES.items():
        found = sum(isinstance(module, kind) for module in model.modules())
        assert found == (0 if other == option else 3 if other == "cross" else 4)
    images = torch.rand(1, 5, 4, 4), torch.rand(1, 2, 16, 16)
    assert model(*images).isfinite().all()


@torch.no_grad()
def test_every_scale_and_both_branches_reach_the_result():
    model = CoFusion(5, 2, 4, width=8, depths=(1, 1, 1)).eval()
    images = torch.rand(1, 5, 4, 4), torch.rand(1, 2, 16, 16)
    expected = model(*images)
    for scale in model.scales:
        for branch in (scale.spatial, scale.spectral, scale.cross):
            handle = branch.register_forward_hook(
                lambda module, args, y: tuple(2 * z for z in y) if type(y) is tuple else 2 * y
            )
            assert relative_error(model(*images), expected) > 1e-4
            handle.remove()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 6}, ValueError, "channels must be a multiple of 4, got 6"),
        ({"depths": (1, 2)}, ValueError, "depths must be 3 ints, got 2"),
        ({"depths": 3}, TypeError, "depths must be 3 ints, got int"),
        ({"depths": (1, 0, 1)}, ValueError, "depths must be at least 1, got 0"),
        ({"spatial": "none"}, ValueError, "spatial must be one of 'spacam', 'residual'"),
        ({"spectral": "spacam"}, ValueError, "spectral must be one of"),
        ({"cross": None}, ValueError, "cross must be one of"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        CoFusion(5, 2, 4, **options)
