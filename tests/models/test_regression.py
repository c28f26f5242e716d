"""The closed form against its second writing in NumPy, and on what it must get exactly right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastfusion.data import Degradation, apply_srf, demo_scene, srf_from_bands, wald
from fastfusion.metrics import psnr
from fastfusion.models.regression import Regression, RegressionModel, regression
from tests.closeness import relative_error
from tests.models import regression_oracle as oracle


@pytest.fixture(scope="module")
def scene() -> torch.Tensor:
    return torch.as_tensor(demo_scene().data)[:, :96, :128].float()


@pytest.fixture(scope="module")
def srf() -> torch.Tensor:
    return srf_from_bands([460, 550, 640], [70, 80, 70], range(400, 701, 10)).float()


def cave_crop(scenes, name: str) -> torch.Tensor:
    files = sorted((scenes / "cave" / f"{name}_ms").glob("*.png"))
    if len(files) != 31:
        pytest.skip(f"the scene {name} is not in {scenes / 'cave'}")
    image = pytest.importorskip("PIL.Image")
    bands = [np.asarray(image.open(f))[160:320, 160:352] for f in files]
    return torch.from_numpy(np.stack(bands) / 65535).float()


@pytest.mark.parametrize("scale", [4, 8])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_it_is_the_closed_form_of_the_oracle(scene, srf, scale, local, dtype, bound):
    degradation = Degradation.gaussian(scale)
    lr_hsi, hr_msi = wald(scene.double(), degradation, srf)
    expected = oracle.regression(lr_hsi.numpy(), hr_msi.numpy(), srf.double().numpy(), local=local)
    fused = regression(lr_hsi.to(dtype), hr_msi.to(dtype), srf=srf, psf=degradation, local=local)
    assert fused.dtype == dtype
    assert np.abs(fused.numpy() - expected).max() < bound


@pytest.mark.parametrize("name", ["sponges", "stuffed_toys"])
def test_it_does_not_fall_behind_the_recipe(scenes, srf, name):
    reference = cave_crop(scenes, name)
    degradation = Degradation.gaussian(4)
    lr_hsi, hr_msi = wald(reference, degradation, srf)
    arrays = lr_hsi.numpy(), hr_msi.numpy(), srf.numpy()
    recipe = oracle.psnr(oracle.recipe(*arrays), reference.numpy())
    known = psnr(regression(lr_hsi, hr_msi, srf=srf, psf=degradation), reference).item()
    told = psnr(regression(lr_hsi, hr_msi), reference).item()
    assert known > recipe
    assert told > known - 0.5  # what estimating the sensors may cost


@pytest.mark.parametrize(
    "degradation",
    [Degradation.gaussian(4), Degradation.block(4), Degradation.gaussian(8, boundary="symmetric")],
    ids=["gaussian", "block", "symmetric"],
)
def test_spectra_that_the_msi_decides_are_exact(srf, degradation):
    # Three endmembers and three MSI bands: the map back is linear and the same everywhere.
    abundances = torch.rand(3, 64, 64, dtype=torch.float64)
    reference = torch.tensordot(torch.rand(31, 3, dtype=torch.float64) / 3, abundances, 1)
    lr_hsi, hr_msi = wald(reference, degradation, srf.double())
    for local in (True, False):
        fused = regression(lr_hsi, hr_msi, srf=srf, psf=degradation, local=local)
        assert relative_error(fused, reference) < 1e-5


def test_the_result_gives_back_what_both_sensors_saw(scene, srf):
    degradation = Degradation.gaussian(4)
    lr_hsi, hr_msi = wald(scene, degradation, srf)
    options = {"srf": srf, "psf": degradation, "clamp": False}
    fused = regression(lr_hsi, hr_msi, iterations=16, **options)
    assert relative_error(apply_srf(fused, srf), hr_msi) < 1e-5
    assert relative_error(degradation(fused), lr_hsi) < 1e-3
    once = regression(lr_hsi, hr_msi, iterations=1, **options)
    assert relative_error(degradation(once), lr_hsi) > relative_error(degradation(fused), lr_hsi)


def test_blurred_bands_are_told_from_sharp_ones(scene, srf):
    degradation = Degradation.gaussian(4)
    blurred = scene.clone()
    blurred[:2] = Degradation.gaussian(1, sigma=1.0)(scene[:2])
    lr_hsi, hr_msi = wald(blurred, degradation, srf)
    model = RegressionModel.fit(lr_hsi, hr_msi, srf=srf, psf=degradation)
    assert (model.sharpness[:2] > 0.5).all()
    assert model.sharpness[4:].abs().max() < 0.3


@pytest.mark.parametrize("local", [True, False])
def test_a_tile_with_its_margin_agrees_with_the_whole(scene, srf, local):
    scale = 2
    degradation = Degradation.gaussian(scale)
    lr_hsi, hr_msi = wald(scene.double(), degradation, srf)
    model = RegressionModel.fit(
        lr_hsi, hr_msi, srf=srf, psf=degradation, local=local, iterations=1, window_sigma=0.5
    )
    whole, margin = model.apply(lr_hsi, hr_msi), model.halo
    assert 2 * margin + 4 < lr_hsi.shape[1]
    tile = model.apply(lr_hsi[:, :, 5:-5], hr_msi[:, :, 5 * scale : -5 * scale])
    inner = slice(margin * scale, -margin * scale)
    assert relative_error(tile[..., inner], whole[:, :, 5 * scale : -5 * scale][..., inner]) < 1e-9
    # One pixel less of margin than the blur needs would show.
    assert relative_error(tile, whole[:, :, 5 * scale : -5 * scale]) > 1e-7


def test_estimated_sensors_take_up_a_shift(scene, srf):
    lines = [
        torch.exp(-0.5 * ((torch.arange(-9.0, 10.0, dtype=torch.float64) - s) / 2) ** 2)
        for s in (1.3, -0.8)
    ]
    shifted = Degradation(torch.outer(*(line / line.sum() for line in lines)), 4)
    lr_hsi, hr_msi = wald(scene, shifted, srf)
    told = psnr(regression(lr_hsi, hr_msi), scene).item()
    known = psnr(regression(lr_hsi, hr_msi, srf=srf, psf=shifted), scene).item()
    wrong = psnr(regression(lr_hsi, hr_msi, srf=srf, psf=Degradation.gaussian(4)), scene).item()
    assert told > known - 0.5
    assert told > wrong + 1


def test_a_wrong_srf_is_not_believed(scene, srf):
    degradation = Degradation.gaussian(4)
    lr_hsi, hr_msi = wald(scene, degradation, srf)
    known = psnr(regression(lr_hsi, hr_msi, srf=srf, psf=degradation), scene).item()
    wrong = regression(lr_hsi, hr_msi, srf=0.6 * srf.roll(4, 1), psf=degradation)
    assert psnr(wrong, scene).item() > known - 3


def test_brightness_does_not_matter(scene, srf):
    degradation = Degradation.gaussian(4)
    lr_hsi, hr_msi = wald(scene.double(), degradation, srf)
    options = {"srf": srf, "psf": degradation, "clamp": False}
    fused = regression(lr_hsi, hr_msi, **options)
    assert relative_error(regression(100 * lr_hsi, 100 * hr_msi, **options), 100 * fused) < 1e-6


def test_batches_modules_and_dtypes(scene, srf):
    degradation = Degradation.gaussian(4)
    lr_hsi, hr_msi = wald(torch.stack([scene, scene.flip(2)]), degradation, srf)
    fused = Regression(srf=srf, psf=degradation)(lr_hsi, hr_msi)
    for i in range(2):
        assert torch.equal(fused[i], regression(lr_hsi[i], hr_msi[i], srf=srf, psf=degradation))
    half = regression(lr_hsi[0].half(), hr_msi[0].half(), srf=srf, psf=degradation)
    assert half.dtype == torch.float16
    assert relative_error(half, fused[0]) < 0.02
    assert regression(lr_hsi[:0], hr_msi[:0]).shape == (0, 31, 96, 128)
    assert not list(Regression().parameters())
    assert repr(Regression(local=False)) == "Regression(local=False)"


def test_the_kernel_alone_is_enough(scene, srf):
    for degradation in (Degradation.gaussian(4), Degradation.block(4)):
        lr_hsi, hr_msi = wald(scene, degradation, srf)
        by_kernel = regression(lr_hsi, hr_msi, srf=srf, psf=degradation.psf)
        assert torch.equal(by_kernel, regression(lr_hsi, hr_msi, srf=srf, psf=degradation))


# Panchromatic, 4 and 9 bands; 103 to 198 HSI bands; scales 1 to 32; from one pixel on.
@pytest.mark.parametrize(
    ("hsi_bands", "msi_bands", "height", "width", "scale"),
    [
        (31, 1, 8, 8, 4),
        (103, 4, 12, 9, 4),
        (128, 9, 24, 20, 3),
        (198, 4, 2, 2, 2),
        (31, 3, 1, 1, 4),
        (31, 3, 1, 5, 2),
        (31, 3, 4, 3, 32),
        (31, 3, 8, 8, 1),
        (3, 3, 6, 6, 4),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_any_pair_gives_a_finite_cube(hsi_bands, msi_bands, height, width, scale, known):
    reference = torch.rand(hsi_bands, height * scale, width * scale)
    degradation, srf = Degradation.gaussian(scale), torch.rand(msi_bands, hsi_bands)
    srf = srf / srf.sum(1, keepdim=True)
    lr_hsi, hr_msi = wald(reference, degradation, srf)
    sensors = {"srf": srf, "psf": degradation} if known else {}
    fused = regression(lr_hsi, hr_msi, **sensors)
    assert fused.shape == reference.shape
    assert fused.isfinite().all()


def test_flat_pairs_stay_flat(srf):
    for value in (0.0, 0.3):
        pair = torch.full((31, 8, 8), value), torch.full((3, 32, 32), value)
        for sensors in ({}, {"srf": srf, "psf": Degradation.gaussian(4)}):
            assert (regression(*pair, **sensors) - value).abs().max() < 1e-5


@pytest.mark.parametrize("change", [lambda x: x.expand(3, -1, -1), lambda x: x.flip(1, 2)])
def test_strided_views_are_good_input(change):
    lr_hsi, hr_msi = change(torch.rand(1, 6, 5)).contiguous(), change(torch.rand(1, 24, 20))
    assert torch.equal(
        regression(lr_hsi, hr_msi, srf=torch.ones(len(hr_msi), len(lr_hsi))),
        regression(lr_hsi, hr_msi.contiguous(), srf=torch.ones(len(hr_msi), len(lr_hsi))),
    )


def test_bad_input():
    hsi, msi = torch.rand(31, 8, 8), torch.rand(3, 32, 32)
    with pytest.raises(ValueError, match="look swapped: lr_hsi has 3 bands of 32 x 32"):
        regression(msi, hsi)
    with pytest.raises(ValueError, match=r"hr_msi: expected .* multiple of lr_hsi's 8 x 8, got"):
        regression(hsi, torch.rand(3, 32, 33))
    with pytest.raises(ValueError, match="one whole multiple"):
        regression(hsi, torch.rand(3, 32, 16))
    with pytest.raises(ValueError, match="lr_hsi: expected finite values"):
        regression(hsi.clone().index_fill_(0, torch.tensor(4), float("nan")), msi)
    with pytest.raises(ValueError, match="hr_msi: expected finite values"):
        regression(hsi, msi.clone().fill_(float("inf")))
    with pytest.raises(ValueError, match="expected the same batch"):
        regression(hsi[None], msi)
    with pytest.raises(ValueError, match=r"lr_hsi: expected floating point, got torch\.int64"):
        regression(hsi.long(), msi)
    with pytest.raises(TypeError, match="hr_msi: expected a tensor, got ndarray"):
        regression(hsi, msi.numpy())
    with pytest.raises(ValueError, match=r"srf: expected .* = \(3, 31\), got \(31, 3\)"):
        regression(hsi, msi, srf=torch.rand(31, 3))
    with pytest.raises(ValueError, match="psf: expected one of scale 4"):
        regression(hsi, msi, psf=Degradation.gaussian(8))
    with pytest.raises(TypeError, match="psf: expected a tensor or a Degradation, got str"):
        regression(hsi, msi, psf="gaussian")
    for option in ({"ridge": 0.0}, {"iterations": -1}, {"window_sigma": 0.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(option))} must be"):
            regression(hsi, msi, **option)
