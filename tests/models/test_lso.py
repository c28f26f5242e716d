"""LSO against a second writing of the authors' network, and its size and work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastfusion.models import LSO
from tests.closeness import assert_close
from tests.models.official_lso import OfficialLSO

SMALL = {"width": 16, "tokens": 3, "basis": 5, "heads": 4, "guide": 12, "blocks": 2}


def official(hsi=6, msi=4, scale=4, **options):
    network = OfficialLSO(hsi, msi, scale, **{**SMALL, **options}).eval()
    return network, network.state_dict()


def test_the_papers_size_and_work():
    with torch.device("meta"):
        model = LSO(31, 3, 4)
        images = torch.rand(1, 31, 64, 64), torch.rand(1, 3, 256, 256)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_942_679
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*images)
    assert counter.get_total_flops() == pytest.approx(223e9, rel=0.01)


@pytest.mark.parametrize(
    ("scale", "size", "options"),
    [
        (4, (8, 8), {}),
        (8, (3, 2), {"heads": 2, "tokens": 8, "blocks": 0}),
        (4, (5, 3), {"width": 8, "basis": 24, "hsi": 3, "msi": 1}),  # patches that do not fit
        (4, (4, 4), {"width": 64, "tokens": 8, "basis": 24, "heads": 8, "hsi": 31, "msi": 3}),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_authors_weights_give_the_authors_output(scale, size, options):
    network, state_dict = official(scale=scale, **options)
    hsi, msi = options.get("hsi", 6), options.get("msi", 4)
    # Whole patches at every level, which the authors' code needs: multiples of 16 pixels.
    rows, columns = (-(-n * scale // 16) * 16 // scale for n in size)
    lr_hsi, hr_msi = (
        torch.rand(2, hsi, rows, columns),
        torch.rand(2, msi, scale * rows, scale * columns),
    )
    model = LSO.from_official(state_dict, scale).eval()
    expected = network.double()(lr_hsi.double(), hr_msi.double())
    assert_close(model(lr_hsi, hr_msi), expected, 1e-5, "output")
    assert_close(model.double()(lr_hsi.double(), hr_msi.double()), expected, 1e-12, "in float64")


def test_the_configuration_is_read_from_the_shapes():
    model = LSO.from_official(official()[1], 4, prior="regression")
    assert model.config == {
        "hsi_bands": 6,
        "msi_bands": 4,
        "scale": 4,
        "width": 16,
        "tokens": 3,
        "basis": 5,
        "heads": 4,
        "patch_size": 4,
        "guide_width": 12,
        "guide_blocks": 2,
        "prior": "regression",
    }


def test_the_weights_are_copied():
    _, state_dict = official()
    model = LSO.from_official(state_dict, 4)
    before = model.head[2].weight.clone()
    state_dict["outc.conv.2.weight"].zero_()
    assert torch.equal(model.head[2].weight, before)


def test_dead_and_constant_entries_may_be_missing_and_linear_layers_may_be_linear():
    _, state_dict = official()
    for name in list(state_dict):
        if "_mean." in name or "modes_list" in name:
            del state_dict[name]
        elif "_attn.weight" in name:
            state_dict[name] = state_dict[name].flatten(1)
    LSO.from_official(state_dict, 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("process1.weights", None, "lacks process1.weights"),
        ("up2.conv.double_conv.2.bias", None, "lacks up2.conv.double_conv.2.bias"),
        ("extra.weight", torch.zeros(1), "unknown weights: extra.weight"),
        ("process4.latent", torch.zeros(1), "unknown weights: process4.latent"),
        ("inc.double_conv.0.weight", torch.zeros(1), "inc.double_conv.0.weight must have shape"),
        ("process2.weights", torch.zeros(16, 8), r"process2.weights must have .*\(16, 10\)"),
        ("process1.latent", torch.zeros(4), "process1.latent must have 3 dimensions"),
        ("process3.encoder_attn.bias", torch.zeros(16), r"encoder_attn.bias must have .*\(32,\)"),
        ("process1.modes_list", torch.arange(0, 5), "process1.modes_list must be multiples"),
        ("process1.modes_list", torch.zeros(5), "process1.modes_list must be multiples"),
    ],
)
def test_another_state_dict_is_refused(name, value, message):
    _, state_dict = official()
    state_dict = {**state_dict, name: value}
    if value is None:
        del state_dict[name]
    with pytest.raises(ValueError, match=message):
        LSO.from_official(state_dict, 4)


@pytest.mark.parametrize("state_dict", [None, [1], {"process1.weights": 3}])
def test_what_is_no_state_dict(state_dict):
    with pytest.raises(TypeError, match="state_dict must be a mapping"):
        LSO.from_official(state_dict, 4)


def test_other_scales_use_the_same_weights():
    model = LSO(6, 4, 4, width=8, heads=2, guide_width=8, guide_blocks=1).eval()
    lr_hsi, hr_msi = torch.rand(1, 6, 2, 2), torch.rand(1, 4, 16, 16)
    with pytest.raises(ValueError, match="hr_msi"):
        model(lr_hsi, hr_msi)
    model.scale = 8
    assert model(lr_hsi, hr_msi).shape == (1, 6, 16, 16)
