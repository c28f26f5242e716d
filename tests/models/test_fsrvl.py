"""FSRVL as a model: sensors, losses, options, and fitting to a small scene."""

from __future__ import annotations

import pytest
import torch

from fastfusion.data import Degradation, demo_scene, srf_from_bands, wald
from fastfusion.losses import FSRVLLoss
from fastfusion.models import FSRVL, FusionModel
from fastfusion.models import fsrvl as module
from fastfusion.models.fsrvl import held_out_blocks, purest_spectra

SMALL = {"features": 6, "endmembers": 5, "kernel_size": 3}
ABLATIONS = [
    {"synchronization": s, "recalibration": r} for s in (True, False) for r in (True, False)
]


@pytest.fixture(scope="module")
def pair():
    """The built-in scene, as two sensors see it: ``reference, lr_hsi, hr_msi, srf, psf``."""
    reference = torch.as_tensor(demo_scene(48, 64).data, dtype=torch.float32)
    psf = Degradation.gaussian(4)
    bands = range(400, 701, 10)
    srf = srf_from_bands([460, 550, 640], [70, 90, 80], bands).float()
    lr_hsi, hr_msi = wald(reference, psf, srf)
    return reference, lr_hsi[None].float(), hr_msi[None].float(), srf, psf


def known(pair):
    return {"srf": pair[3], "psf": pair[4]}


def small(**options):
    return FSRVL(31, 3, 4, **{**SMALL, **options})


@pytest.mark.parametrize("prior", ["regression", "none"])
@pytest.mark.parametrize("abundances", ["free", "clamp", "softmax"])
def test_shapes_and_ranges(pair, prior, abundances):
    _, y, x, _, _ = pair
    model = small(prior=prior, abundances=abundances)
    model.fit(y, x, steps=2, full_steps=1, **known(pair))
    with torch.no_grad():
        fused = model(y, x)
        amounts, spectra = model.unmix(y, x)
    assert fused.shape == (1, 31, 48, 64) and fused.min() >= 0 and fused.max() <= 1
    assert amounts.shape == (1, 5, 48, 64) and spectra.shape == (5, 31)
    if abundances == "softmax":
        assert torch.allclose(amounts.sum(1), torch.ones(1, 48, 64), atol=1e-5)
    if abundances != "free":
        assert amounts.min() >= 0 and amounts.max() <= 1


def test_without_a_prior_abundances_times_endmembers_is_the_image(pair):
    _, y, x, _, _ = pair
    model = small(prior="none", consistency=False)
    amounts, spectra = model.unmix(y, x)
    assert torch.allclose(model(y, x), torch.einsum("behw,eg->bghw", amounts, spectra), atol=1e-5)


def test_the_psf_is_a_weighting_and_that_of_the_sensor_after_meeting_it(pair):
    _, y, x, srf, psf = pair
    model = small(psf_size=5)
    assert model.psf.shape == (5, 5)
    torch.nn.init.normal_(model.psf_logits)
    assert model.psf.min() > 0 and model.psf.sum().item() == pytest.approx(1)
    model.fit(y, x, srf=srf, psf=psf, steps=1)
    assert torch.allclose(model.psf, psf.psf.float(), atol=1e-6)
    assert torch.allclose(model.srf, srf, atol=1e-6)
    assert model.config["psf_size"] == list(psf.psf.shape)


def test_a_given_psf_stays_and_an_estimated_one_is_learnt(pair):
    _, y, x, srf, psf = pair
    model = small()
    for given, learnt in ((psf, False), (None, True)):
        model.fit(y, x, srf=srf, psf=given, steps=0, full_steps=3)
        assert model.psf_logits.requires_grad is learnt
        assert model.psf.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_a_gradient_reaches_every_parameter(pair, options):
    _, y, x, _, _ = pair
    model = small(prior="none", **options).train()
    images = model._images(y, x)
    FSRVLLoss()(y, images[0], images[1], x, images[2], images[3]).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_ablations_change_the_parameters_as_said():
    d = SMALL["features"]
    mixing, filters = 2 * d * d, 2 * (2 * d * 9 + 4 * d)
    sizes = [sum(p.numel() for p in small(**options).parameters()) for options in ABLATIONS]
    assert sizes == [sizes[0], sizes[0] - filters, sizes[0] - mixing, sizes[0] - filters - mixing]


def test_initial_transforms_nothing(pair, monkeypatch):
    _, y, x, _, _ = pair

    def refuse(*args, **options):
        raise AssertionError("a transform")

    model = small(synchronization=False, recalibration=False)
    for block in (model.hr_recalibrate, model.lr_recalibrate):
        monkeypatch.setattr(block, "recalibrate", refuse)
    model._images(y, x)
    model(y, x)


def test_the_loss_is_equation_16():
    y, x = torch.rand(2, 6, 3, 3), torch.rand(2, 3, 9, 9)
    loss = FSRVLLoss(alpha=7, beta=2)
    found = loss(y, y + 0.1, y - 0.2, x, x + 0.3, x - 0.4)
    assert found.item() == pytest.approx(7 * (0.1 + 0.3) + 2 * (0.2 + 0.4), rel=1e-5)
    with pytest.raises(ValueError, match="lr_degraded: expected the shape of lr_hsi"):
        loss(y, y, y[:1], x, x, x)
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        FSRVLLoss(beta=-1)


@pytest.mark.parametrize("stage", [{"steps": 75}, {"steps": 0, "full_steps": 50}], ids=str)
def test_fitting_lowers_the_loss(pair, stage):
    _, y, x, _, _ = pair
    report = small().fit(y, x, **stage, **known(pair))
    assert report.history[-1]["loss"] < 0.9 * report.history[0]["loss"]
    assert report.stopped == "all steps were done"
    assert report.steps == sum(stage.values())


def test_fitting_gives_the_best_judged_state(pair):
    _, y, x, _, _ = pair
    report = small().fit(y, x, steps=60, **known(pair))
    assert [row["step"] for row in report.history] == [0, 25, 50, 60]
    assert report.best == min(report.history, key=lambda row: row["held_out"])["step"]


def test_fitting_beats_its_prior_and_is_deterministic(pair):
    reference, y, x, _, _ = pair

    def fused(seed, draw):
        torch.manual_seed(draw)
        model = small()
        model.fit(y, x, steps=75, seed=seed, **known(pair))
        with torch.no_grad():
            return model(y, x)

    def error(image):
        return (image[0] - reference).square().mean().item()

    start = small()
    start.fit(y, x, steps=0, **known(pair))
    first = fused(0, 1)
    assert torch.equal(first, fused(0, 2))
    assert not torch.equal(first, fused(1, 1))
    with torch.no_grad():
        assert error(first) < error(start(y, x))


def test_fitting_leaves_the_callers_random_state_alone(pair):
    _, y, x, _, _ = pair
    model = small()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model.fit(y, x, steps=1, **known(pair))
    assert torch.equal(torch.rand(4), expected)


def test_the_result_agrees_with_both_images(pair):
    _, y, x, srf, psf = pair
    model = small()
    model.fit(y, x, steps=25, **known(pair))

    def missing(fused):
        return (psf(fused) - y).abs().mean(), (torch.einsum("kg,bghw->bkhw", srf, fused) - x).abs()

    with torch.no_grad():
        low, high = missing(model(y, x))
        model.consistency = False
        low_without, high_without = missing(model(y, x))
    assert low < low_without / 2 and high.mean() < high_without.mean() / 2


def test_ctrl_c_leaves_the_best_state(pair):
    _, y, x, _, _ = pair
    rows = []

    def interrupt(row):
        rows.append(row)
        if len(rows) == 3:
            raise KeyboardInterrupt

    model, straight = small(), small()
    with pytest.raises(KeyboardInterrupt):
        model.fit(y, x, steps=200, progress=interrupt, **known(pair))
    assert not model.training
    assert [row["total"] for row in rows] == [200] * 3
    best = min(rows, key=lambda row: row["held_out"])
    assert best["step"] == 50  # the judgement that was interrupted counts

    def stop(row):
        if row["step"] == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        straight.fit(y, x, steps=200, progress=stop, **known(pair))
    for name, value in model.state_dict().items():
        assert torch.equal(value, straight.state_dict()[name]), name


def test_a_loss_that_is_no_number_is_told(pair, monkeypatch):
    _, y, x, _, _ = pair
    forward, calls = FSRVLLoss.forward, []

    def later_nan(self, *images):
        calls.append(None)
        value = forward(self, *images)
        return value * float("nan") if len(calls) > 30 else value

    monkeypatch.setattr(FSRVLLoss, "forward", later_nan)
    model = small()
    with pytest.raises(RuntimeError, match="the loss became nan at step"):
        model.fit(y, x, steps=100, **known(pair))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert torch.isfinite(model(y, x)).all()


def test_time_and_patience_end_it(pair):
    _, y, x, _, _ = pair
    report = small().fit(y, x, minutes=1e-9, steps=100, **known(pair))
    assert report.stopped == "the time was over" and report.steps < 100
    # At this rate no step helps, so that nothing is found after the first judgement.
    report = small().fit(y, x, steps=500, patience=50, learning_rate=1e-30, **known(pair))
    assert report.stopped == "no lower error for 50 steps" and report.steps <= 100


@pytest.mark.parametrize("displaced", [{"shift": 0.5}, {"turn": 1.0}], ids=str)
def test_a_pair_out_of_register(pair, displaced):
    """The HSI half a pixel off, or turned by a degree, its sensor unknown: finite and close."""
    reference, _, _, srf, psf = pair
    angle = torch.tensor(displaced.get("turn", 0.0)).deg2rad()
    shift = 2 * displaced.get("shift", 0.0) / 64
    aspect = 64 / 48
    theta = torch.tensor(
        [
            [angle.cos(), -angle.sin() / aspect, shift],
            [angle.sin() * aspect, angle.cos(), 0.0],
        ]
    )
    grid = torch.nn.functional.affine_grid(theta[None], [1, 31, 48, 64], align_corners=False)
    moved = torch.nn.functional.grid_sample(
        reference[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    y, x = psf(moved).clamp(0, 1), torch.einsum("kg,ghw->khw", srf, reference)[None]
    model = small()
    model.fit(y, x, steps=50)
    with torch.no_grad():
        error = (model(y, x)[0] - reference).square().mean()
    bicubic = torch.nn.functional.interpolate(y, (48, 64), mode="bicubic")
    assert error < (bicubic[0] - reference).square().mean() / 2


def test_a_checkpoint_keeps_sensors_and_output(pair, tmp_path):
    _, y, x, _, _ = pair
    model = small()
    model.fit(y, x, steps=2, **known(pair))
    model.save(tmp_path / "fsrvl.safetensors")
    loaded = FusionModel.load(tmp_path / "fsrvl.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(y, x), model(y, x))


def test_held_out_blocks():
    held = held_out_blocks(32, 40)
    assert held.shape == (32, 40) and held.mean().item() == pytest.approx(0.1, abs=0.01)
    blocks = held.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)
    assert ((blocks == 0).all(2) | (blocks == 1).all(2)).all()
    assert 0 < held_out_blocks(1, 2).sum() < 2
    with pytest.raises(ValueError, match="at least two pixels"):
        held_out_blocks(1, 1)


def test_purest_spectra_finds_the_corners():
    corners = torch.rand(4, 20, dtype=torch.float64)
    weights = torch.distributions.Dirichlet(torch.ones(4)).sample((200,)).double()
    pixels = torch.cat([weights @ corners, corners])
    found = purest_spectra(pixels, 4)
    assert {int((corners - row).abs().sum(1).argmin()) for row in found} == {0, 1, 2, 3}
    assert torch.cdist(found, corners).min(1).values.max() < 1e-12
    assert purest_spectra(pixels[:3], 5).shape == (5, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abundances": "none"}, "abundances must be one of"),
        ({"prior": "bicubic"}, "prior must be one of"),
        ({"endmembers": 0}, "endmembers must be at least 1, got 0"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"psf_size": (3, 0)}, "psf_size must be at least 1"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_arguments_of_fit(pair):
    _, y, x, _, _ = pair
    model = small()
    with pytest.raises(ValueError, match="lr_hsi: expected a batch of one image, got 2"):
        model.fit(y.expand(2, -1, -1, -1), x.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="minutes must be above 0, got 0"):
        model.fit(y, x, minutes=0)
    with pytest.raises(TypeError, match="steps must be an int, got float"):
        model.fit(y, x, steps=1.5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.fit(y * float("nan"), x)
    with pytest.raises(TypeError, match="progress must be True or False"):
        model.fit(y, x, progress="yes")


def test_the_bar_is_asked_for_only_when_shown(pair, monkeypatch):
    _, y, x, _, _ = pair

    def missing(name, *, extra, purpose):
        raise ImportError(f"{purpose} needs {name}: pip install 'fastfusion[{extra}]'")

    monkeypatch.setattr(module, "need", missing)
    small().fit(y, x, steps=1, **known(pair))
    with pytest.raises(ImportError, match=r"fastfusion\[train\]"):
        small().fit(y, x, steps=1, progress=True, **known(pair))
