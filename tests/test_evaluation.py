"""Cases, scores and tables of an evaluation."""

from __future__ import annotations

import csv
import dataclasses
import io

import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from torch.utils.flop_counter import FlopCounterMode

from fastfusion import metrics
from fastfusion.data import Cube, Degradation, apply_srf
from fastfusion.data.scenes import Scene, load_scene
from fastfusion.evaluation import (
    averages,
    broad_bands,
    case_of,
    csv_table,
    displaced,
    fourier_resized,
    markdown_table,
    run,
    run_across_scales,
    run_with_cost,
    score,
)
from fastfusion.models import LSO


@pytest.fixture
def scene() -> Scene:
    data = np.random.default_rng(0).random((9, 30, 45), dtype=np.float32)
    return Scene("small", "free", reference=Cube(data, np.linspace(420, 900, 9)))


# ------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------


def test_walds_protocol(scene):
    case = case_of(scene, 4)
    assert case.reference is not None and case.srf is not None
    assert case.reference.shape == (9, 28, 44)  # cut to whole low-resolution pixels
    assert case.lr_hsi.shape == (9, 7, 11)
    assert case.hr_msi.shape == (4, 28, 44)  # blue, green, red and near infrared are covered
    assert (case.scale, case.protocol) == (4, "Wald")
    np.testing.assert_array_equal(case.reference, scene.reference.data[:, :28, :44])
    torch.testing.assert_close(case.lr_hsi, Degradation.gaussian(4)(case.reference))
    torch.testing.assert_close(case.hr_msi, apply_srf(case.reference, case.srf))


def test_sensors_that_are_given_are_used(scene):
    srf, degradation = torch.rand(2, 9), Degradation.block(3)
    case = case_of(scene, 3, srf=srf, degradation=degradation)
    assert case.reference is not None
    torch.testing.assert_close(case.hr_msi, apply_srf(case.reference, srf))
    torch.testing.assert_close(case.lr_hsi, degradation(case.reference))
    scene.srf = np.full((1, 9), 1 / 9)
    torch.testing.assert_close(case_of(scene, 3).hr_msi, case.reference.mean(0, keepdim=True))


def test_a_real_second_sensor_is_kept_and_its_response_not_trusted(scene):
    scene.hr_msi = Cube(np.random.default_rng(1).random((2, 30, 45), dtype=np.float32))
    scene.scale, scene.srf = 3, np.full((2, 9), 1 / 9)
    case = case_of(scene)
    np.testing.assert_array_equal(case.hr_msi, scene.hr_msi.data)
    assert (case.scale, case.srf) == (3, None)
    assert case.protocol == "Wald, MSI as acquired"


def test_a_pair_without_reference_is_taken_as_it_is(scenes):
    scene = load_scene("tg1")
    case = case_of(scene)
    assert (case.reference, case.scale, case.protocol) == (None, 12, "as acquired")
    # the scene's own sensors explain it
    torch.testing.assert_close(
        apply_srf(case.lr_hsi, case.srf), case.degradation(case.hr_msi), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="tg1 was acquired at 12, got 4"):
        case_of(scene, 4)


@pytest.mark.parametrize("scale", [1, 31, -2])
def test_a_scale_that_the_scene_has_no_room_for(scene, scale):
    with pytest.raises(ValueError, match=f"scale: expected 2 to 30 for small, got {scale}"):
        case_of(scene, scale)


@pytest.mark.parametrize(
    ("wavelengths", "bands"),
    [
        (np.arange(400, 701, 10), 3),
        (np.arange(400, 1001, 10), 4),
        (np.arange(400, 2500, 10), 6),
        (np.arange(1000, 2500, 50), 3),  # two of them are covered: three are spread out
        (None, 3),
    ],
)
def test_broad_bands(wavelengths, bands):
    count = 20 if wavelengths is None else len(wavelengths)
    srf = broad_bands(Cube(np.ones((count, 2, 2)), wavelengths))
    assert srf.shape == (bands, count)
    torch.testing.assert_close(srf.sum(1), torch.ones(bands))
    assert (srf >= 0).all()


# ------------------------------------------------------------------------------------------------
# Displacement
# ------------------------------------------------------------------------------------------------


def test_nothing_moves_without_displacement():
    cube = torch.rand(2, 5, 7)
    assert displaced(cube) is cube


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (15, 9)])
def test_a_shift_is_scipys(shape):
    cube = torch.rand(1, *shape, dtype=torch.float64)
    moved = displaced(cube, shift=2)[0]
    expected = ndimage.shift(cube[0], 2, order=1)
    np.testing.assert_allclose(moved[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-9)


def test_a_quarter_turn_is_exact():
    cube = torch.rand(2, 12, 12, dtype=torch.float64)
    turned = displaced(cube, rotation=90)
    assert any(
        torch.allclose(turned, torch.rot90(cube, turns, (1, 2)), atol=1e-9) for turns in (1, 3)
    )


@pytest.mark.parametrize("shape", [(40, 40), (30, 50)])
def test_turn_zoom_and_shift_move_points_as_they_say(shape):
    """The brightest point of a blob goes where the formula puts it."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    centre = (np.array(shape) - 1) / 2
    start = np.add(centre, (4, 6))
    blob = np.exp(-((rows - start[0]) ** 2 + (columns - start[1]) ** 2) / 8)
    moved = displaced(torch.from_numpy(blob)[None], shift=1.5, rotation=10, zoom=1.2)[0].numpy()
    found = np.array(ndimage.center_of_mass(moved))
    angle = np.deg2rad(10)
    x, y = 1.2 * 6, 1.2 * 4
    expected = (
        centre
        + 1.5
        + (
            np.sin(angle) * x + np.cos(angle) * y,
            np.cos(angle) * x - np.sin(angle) * y,
        )
    )
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_the_reference_stays_with_the_msi_when_the_hsi_is_displaced(scene):
    still, moved = case_of(scene, 3), case_of(scene, 3, shift=0.5, rotation=1)
    torch.testing.assert_close(moved.reference, still.reference)
    torch.testing.assert_close(moved.hr_msi, still.hr_msi)
    expected = Degradation.gaussian(3)(displaced(still.reference, 0.5, 1))
    torch.testing.assert_close(moved.lr_hsi, expected)
    assert not torch.allclose(moved.lr_hsi, still.lr_hsi, atol=1e-2)
    assert moved.protocol == "Wald, HSI moved 0.5 pixels, turned 1 degrees, zoomed 1"


# ------------------------------------------------------------------------------------------------
# Scores and tables
# ------------------------------------------------------------------------------------------------


def test_scores_with_a_reference(scene):
    case = case_of(scene, 3)
    fused = run(case, "bicubic")
    figures = score(case, fused)
    assert set(figures) == {"psnr", "sam", "ergas", "ssim", "mrae"}
    assert figures["ergas"] == metrics.ergas(fused, case.reference, ratio=3).item()
    assert figures["psnr"] == metrics.psnr(fused, case.reference).item()


def test_scores_without_a_reference():
    cube = Cube(np.random.default_rng(0).random((5, 33, 36), dtype=np.float32))
    case = case_of(Scene("small", "", reference=cube), 3)
    fused, truth = run(case, "bicubic"), case.reference
    case = dataclasses.replace(case, reference=None)
    figures = score(case, fused)
    assert set(figures) == {"d_lambda", "d_s", "qnr", "rmse_lr_hsi", "rmse_hr_msi"}
    assert figures["qnr"] == pytest.approx((1 - figures["d_lambda"]) * (1 - figures["d_s"]))
    best = score(case, truth)  # the truth explains both images
    assert best["rmse_lr_hsi"] < 1e-6 > best["rmse_hr_msi"]
    assert figures["rmse_lr_hsi"] > 1e-2 < figures["rmse_hr_msi"]
    unknown = dataclasses.replace(case, srf=None, degradation=None)
    assert set(score(unknown, fused)) == {"d_lambda"}


def test_images_smaller_than_the_windows():
    cube = Cube(np.random.default_rng(0).random((4, 4, 4), dtype=np.float32))
    case = case_of(Scene("tiny", "", reference=cube), 2)
    assert set(score(case, run(case, "bicubic"))) == {"psnr", "sam", "ergas", "mrae"}


def test_blind_keeps_the_sensors_from_the_method(scene, monkeypatch):
    told = []
    monkeypatch.setattr(
        "fastfusion.evaluation.fuse", lambda *images, **known: told.append(sorted(known))
    )
    case = case_of(scene, 3)
    run(case, "regression")
    run(case, "regression", blind=True, local=False)
    assert told == [["psf", "srf"], ["local"]]


def test_tables():
    rows = [
        {"scene": "a", "scale": 4, "method": "bicubic", "psnr": 31.456, "seconds": 0.1, "x": 1},
        {"scene": "b", "scale": 8, "method": "regression", "qnr": 0.98765, "seconds": 2.0},
    ]
    assert markdown_table(rows).splitlines() == [
        "| scene | scale | method | PSNR (dB) | QNR | time (s) |",
        "|---|---|---|---|---|---|",
        "| a | 4 | bicubic | 31.46 |  | 0.10 |",
        "| b | 8 | regression |  | 0.9877 | 2.00 |",
    ]
    back = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert back[0] == {"scene": "a", "scale": "4", "method": "bicubic", "psnr": "31.456",
                       "seconds": "0.1", "x": "1", "qnr": ""}  # fmt: skip
    assert back[1]["qnr"] == "0.98765"


# ------------------------------------------------------------------------------------------------
# Networks: across scales, and what they cost
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 12), (16, 24), (3, 5), (4, 6), (9, 11), (10, 6)])
@pytest.mark.parametrize("shape", [(8, 12), (7, 9)])
def test_resizing_in_the_fourier_domain_is_scipys(shape, size):
    image = torch.rand(2, *shape, dtype=torch.float64)
    expected = signal.resample(signal.resample(image.numpy(), size[0], axis=1), size[1], axis=2)
    np.testing.assert_allclose(fourier_resized(image, size), expected, atol=1e-12)


@pytest.fixture
def network(tmp_path):
    sizes = {"width": 8, "heads": 2, "tokens": 2, "basis": 2, "guide_width": 4, "guide_blocks": 0}
    model = LSO(9, 4, 4, **sizes)
    model.save(tmp_path / "x4.safetensors")
    return model.eval(), tmp_path / "x4.safetensors"


@torch.no_grad()
def test_both_protocols_across_scales(scene, network):
    model, path = network
    case = case_of(scene, 2)  # 30 x 44, so that x4 does not divide the rows
    fused, told = run_across_scales(case, path, "page")
    assert told == "as on LSO's page: the x4 network at the pair's own scale"
    model.scale = 2
    expected = model(case.lr_hsi[None], case.hr_msi[None])[0].clamp(0, 1)
    torch.testing.assert_close(fused, expected)
    with pytest.raises(ValueError, match=r"small: a network of scale 4 needs .* got \(30, 44\)"):
        run_across_scales(case, path, "script")
    case = case_of(scene, 7)
    case = dataclasses.replace(case, hr_msi=case.hr_msi[..., :28, :28], lr_hsi=case.lr_hsi[..., :4])
    fused, told = run_across_scales(case, path, "script")
    assert told.startswith("as in LSO's script") and "for the x4 network" in told
    model.scale = 4
    low = fourier_resized(case.lr_hsi, (7, 7))
    torch.testing.assert_close(fused, model(low[None], case.hr_msi[None])[0].clamp(0, 1))
    with pytest.raises(ValueError, match="protocol must be one of 'page', 'script', got 'both'"):
        run_across_scales(case, path, "both")


@pytest.mark.parametrize("prior", ["bicubic", "regression"])
def test_at_its_own_scale_both_protocols_are_plain_fusion(scene, network, prior):
    case = case_of(scene, 4)
    if prior == "regression":
        sizes = {"width": 8, "heads": 2, "guide_width": 4, "guide_blocks": 0}
        LSO(9, 4, 4, **sizes, prior=prior).save(network[1])
    plain = run(case, "lso", weights=network[1])
    for protocol in ("page", "script"):
        torch.testing.assert_close(run_across_scales(case, network[1], protocol)[0], plain)


def test_costs_are_those_of_the_network(scene, network):
    model, path = network
    case = case_of(scene, 4)
    fused, cost = run_with_cost(lambda: run(case, "lso", weights=path))
    torch.testing.assert_close(fused, run(case, "lso", weights=path))
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(case.lr_hsi[None], case.hr_msi[None])
    assert cost.gflops == counter.get_total_flops() / 1e9 > 0
    assert cost.latency is not None and cost.latency > 0 and cost.seconds > 0
    plain = run_with_cost(lambda: run(case, "regression"))[1]
    assert plain.parameters == 0 and plain.gflops is not None and plain.gflops > 0
    assert run_with_cost(lambda: run(case, "bicubic"), quick=True)[1].latency is None


def test_figures_of_both_kinds(scene):
    scene.reference.data = np.tile(scene.reference.data, (1, 2, 2))
    case = case_of(scene, 4)
    assert case.reference is not None
    figures = score(case, case.reference, both=True)
    assert figures["rmse_hr_msi"] < 1e-6 and figures["rmse_lr_hsi"] < 1e-6
    assert {"sam", "d_lambda", "d_s", "qnr"} <= figures.keys()


def test_means_over_scenes_are_of_the_same_scenes():
    rows = [
        {"scene": scene, "scale": 4, "method": method, "psnr": psnr, "note": scene}
        for scene, method, psnr in [("a", "x", 1.0), ("b", "x", 2.0), ("a", "y", 5.0)]
    ]
    assert averages(rows) == [{"scene": "mean of 2", "scale": 4, "method": "x", "psnr": 1.5}]
    assert averages(rows[:1]) == []
