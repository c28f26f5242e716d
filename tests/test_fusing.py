"""`fuse`: what goes in comes out, and what is wrong is said before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastfusion import fusing, metrics, models
from fastfusion.data import Degradation, demo_scene, wald
from fastfusion.evaluation import broad_bands
from fastfusion.fusing import Unavailable, fuse
from fastfusion.models.regression import RegressionModel, regression


@pytest.fixture
def pair():
    """A small scene of smooth materials, as two sensors see it."""
    rows = torch.linspace(0, 3, 32)[:, None]
    columns = torch.linspace(0, 3, 40)[None, :]
    abundances = torch.stack([torch.sin(rows * columns) ** 2, torch.cos(rows + columns) ** 2])
    spectra = 0.1 + 0.4 * torch.rand(12, 2)
    reference = torch.einsum("gk,khw->ghw", spectra, abundances)
    srf = torch.rand(3, 12)
    srf /= srf.sum(1, keepdim=True)
    lr_hsi, hr_msi = wald(reference, Degradation.gaussian(4), srf)
    return lr_hsi, hr_msi, srf, reference


# ------------------------------------------------------------------------------------------------
# Forms
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (2,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors(pair, batch, dtype):
    lr_hsi, hr_msi = (image.to(dtype).expand(*batch, *image.shape) for image in pair[:2])
    fused = fuse(lr_hsi, hr_msi, "bicubic")
    assert (fused.shape, fused.dtype) == ((*batch, 12, 32, 40), dtype)
    assert not fused.requires_grad


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_arrays(pair, batch, dtype):
    lr_hsi, hr_msi = (
        np.broadcast_to(image.numpy(), (*batch, *image.shape)).astype(dtype) for image in pair[:2]
    )
    fused = fuse(lr_hsi, hr_msi, "bicubic")
    assert isinstance(fused, np.ndarray)
    assert (fused.shape, fused.dtype) == ((*batch, 12, 32, 40), np.dtype(dtype))


def test_strided_and_read_only_arrays(pair):
    lr_hsi, hr_msi = (image.numpy() for image in pair[:2])
    expected = fuse(lr_hsi, hr_msi, "bicubic")
    flipped = [np.ascontiguousarray(image[:, ::-1])[:, ::-1] for image in (lr_hsi, hr_msi)]
    for image in flipped:
        image.flags.writeable = False
    np.testing.assert_array_equal(fuse(*flipped, "bicubic"), expected)


def test_the_input_is_left_alone(pair):
    lr_hsi, hr_msi, srf, _ = pair
    copies = [image.clone() for image in (lr_hsi, hr_msi, srf)]
    fuse(lr_hsi, hr_msi, srf=srf, psf=Degradation.gaussian(4))
    for image, copy in zip((lr_hsi, hr_msi, srf), copies, strict=True):
        torch.testing.assert_close(image, copy, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------
# Methods
# ------------------------------------------------------------------------------------------------


def test_regression_is_the_default_and_beats_no_fusion(pair):
    lr_hsi, hr_msi, srf, reference = pair
    fused = fuse(lr_hsi, hr_msi, srf=srf, psf=Degradation.gaussian(4))
    plain = fuse(lr_hsi, hr_msi, "bicubic")
    assert metrics.psnr(fused, reference) > metrics.psnr(plain, reference) + 5
    named = fuse(lr_hsi, hr_msi, "regression", srf=srf, psf=Degradation.gaussian(4))
    torch.testing.assert_close(fused, named, rtol=0, atol=0)


def test_regression_takes_every_form_of_the_sensors(pair):
    lr_hsi, hr_msi, srf, _ = pair
    degradation = Degradation.gaussian(4)
    expected = fuse(lr_hsi, hr_msi, srf=srf, psf=degradation.psf)
    array = fuse(lr_hsi, hr_msi, srf=srf.numpy(), psf=degradation.psf.numpy())
    torch.testing.assert_close(array, expected)
    for sensors in ({"srf": srf}, {"psf": degradation}, {}):  # the others are estimated
        assert fuse(lr_hsi, hr_msi, **sensors).isfinite().all()


def test_options_reach_the_method(pair):
    lr_hsi, hr_msi, srf, _ = pair
    whole = fuse(lr_hsi, hr_msi, srf=srf, psf=Degradation.gaussian(4))
    coarse = fuse(lr_hsi, hr_msi, srf=srf, psf=Degradation.gaussian(4), local=False)
    assert not torch.equal(whole, coarse)
    with pytest.raises(TypeError, match="colour"):
        fuse(lr_hsi, hr_msi, colour="red")
    with pytest.raises(TypeError, match="local"):
        fuse(lr_hsi, hr_msi, "bicubic", local=False)


def test_fsrvl_is_fitted_to_each_pair(pair):
    lr_hsi, hr_msi, srf, reference = pair
    small = {"features": 4, "endmembers": 4, "steps": 20}  # of the constructor and of fit
    sensors = {"srf": srf, "psf": Degradation.gaussian(4)}
    two = [torch.stack([image, image.flip(-1)]) for image in (lr_hsi, hr_msi)]
    fused = fuse(*two, "fsrvl", **sensors, **small)
    assert fused.shape == (2, 12, 32, 40)
    torch.testing.assert_close(fused[0], fuse(lr_hsi, hr_msi, "fsrvl", **sensors, **small))
    plain = fuse(lr_hsi, hr_msi, "bicubic")
    assert metrics.psnr(fused[0], reference) > metrics.psnr(plain, reference) + 5
    array = fuse(lr_hsi.double().numpy(), hr_msi.double().numpy(), "fsrvl", **sensors, **small)
    assert array.dtype == np.float64
    np.testing.assert_allclose(array, fused[0], atol=1e-5)
    with pytest.raises(TypeError, match="colour"):
        fuse(lr_hsi, hr_msi, "fsrvl", colour="red")


@pytest.mark.parametrize("kind", [models.LSO, models.CoFusion])
@pytest.mark.parametrize("prior", ["bicubic", "regression"])
def test_networks_trained_beforehand(pair, tmp_path, kind, prior):
    lr_hsi, hr_msi, srf, _ = pair
    model = kind(12, 3, 4, width=16, prior=prior).eval()
    model.save(tmp_path / "weights")
    sensors = {"srf": srf, "psf": Degradation.gaussian(4)}
    found = fuse(lr_hsi, hr_msi, kind.__name__.lower(), weights=tmp_path / "weights", **sensors)
    images = lr_hsi[None], hr_msi[None]
    with torch.no_grad():
        if prior == "regression":  # then back to what both sensors saw
            closed_form = RegressionModel.fit(lr_hsi, hr_msi, **sensors)
            expected = model(*images, regression(*images, **sensors))[0]
            expected = closed_form.refine(expected.contiguous(), lr_hsi, hr_msi)
        else:
            expected = model(*images)[0]
        torch.testing.assert_close(found, expected.clamp(0, 1))
    with pytest.raises(ValueError, match="must have 3 bands"):
        fuse(lr_hsi, hr_msi[:2], kind.__name__.lower(), weights=tmp_path / "weights")


@pytest.mark.parametrize("method", ["lso", "cofusion"])
@pytest.mark.filterwarnings("ignore:the result is that of regression")  # so short a training
def test_networks_that_are_trained_on_the_pair(method):
    cube = demo_scene()
    reference = torch.from_numpy(cube.data[:, :64, :96])
    sensors = {"srf": broad_bands(cube), "psf": Degradation.gaussian(4)}
    lr_hsi, hr_msi = wald(reference, sensors["psf"], sensors["srf"])
    options = {"lso": {"guide_width": 8, "guide_blocks": 1}, "cofusion": {"depths": (1, 1, 1)}}
    fused = fuse(lr_hsi, hr_msi, method, width=8, minutes=0.02, **options[method], **sensors)
    prior = regression(lr_hsi, hr_msi, **sensors)
    assert fused.shape == prior.shape and (fused - prior).abs().mean() < 0.02
    with pytest.raises(TypeError, match="colour"):
        fuse(lr_hsi, hr_msi, method, colour="red")
    with pytest.raises(TypeError, match="do not go with weights"):
        fuse(lr_hsi, hr_msi, method, weights="weights", minutes=1)


def test_a_pair_too_small_to_learn_from_is_fused_by_the_regression():
    lr_hsi, hr_msi = torch.rand(6, 5, 5), torch.rand(2, 20, 20)
    with pytest.warns(UserWarning, match="that of regression: an HSI of 5 x 5 pixels is too small"):
        fused = fuse(lr_hsi, hr_msi, "lso")
    torch.testing.assert_close(fused, fuse(lr_hsi, hr_msi, "regression"))


def test_a_method_that_cannot_run_says_why(pair):
    with pytest.raises(ValueError, match=r"method: expected one of regression, .* got 'magic'"):
        fuse(*pair[:2], "magic")
    with pytest.raises(TypeError, match="method: expected a name, got int"):
        fuse(*pair[:2], 3)


def test_backends_and_devices_asked_for_by_name(pair, monkeypatch):
    # With the sensors given: in a scene of two materials they are estimated from next to nothing,
    # and rounding decides.
    sensors = {"srf": pair[2], "psf": Degradation.gaussian(4)}
    expected = fuse(*pair[:2], **sensors)
    torch.testing.assert_close(fuse(*pair[:2], backend="reference", **sensors), expected)
    torch.testing.assert_close(fuse(*pair[:2], device="cpu", **sensors), expected)
    with pytest.raises(ValueError, match="warp"):
        fuse(*pair[:2], backend="warp")
    with pytest.raises(ValueError, match=r"device must be .* got 'toaster'"):
        fuse(*pair[:2], device="toaster")
    monkeypatch.setattr(fusing, "backends", lambda: {"cuda": "no GPU"})
    with pytest.raises(Unavailable, match="backend 'cuda' is not available: no GPU"):
        fuse(*pair[:2], backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="device 'cuda' is not available"):
            fuse(*pair[:2], device="cuda")


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


def test_swapped(pair):
    lr_hsi, hr_msi = pair[:2]
    with pytest.raises(ValueError, match=r"more pixels .* swapped"):
        fuse(hr_msi, lr_hsi)
    with pytest.raises(ValueError, match=r"more bands .* swapped"):
        fuse(lr_hsi[:2], hr_msi)


@pytest.mark.parametrize("size", [(31, 40), (32, 36), (32, 44), (30, 38), (8, 10)])
def test_sizes_that_do_not_divide(pair, size):
    hr_msi = torch.rand(3, *size)
    with pytest.raises(ValueError, match=r"hr_msi: expected a height and width .*\(12, 8, 10\)"):
        fuse(pair[0], hr_msi)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["lr_hsi", "hr_msi"])
def test_values_that_are_not_finite(pair, value, which):
    images = dict(zip(("lr_hsi", "hr_msi"), pair[:2], strict=True))
    images[which] = images[which].clone()
    images[which][1, 2, 3] = value
    with pytest.raises(ValueError, match=f"{which}: expected finite values"):
        fuse(**images)
    with pytest.raises(ValueError, match=f"{which}: expected finite values"):
        fuse(**{name: image.numpy() for name, image in images.items()})


def test_values_that_are_not_scaled(pair):
    lr_hsi, hr_msi = pair[:2]
    with pytest.raises(ValueError, match=r"lr_hsi: expected values in \[0, 1\], got .*one peak"):
        fuse(65535 * lr_hsi, 65535 * hr_msi)
    masked = hr_msi.clone()
    masked[:, 0, 0] = -9999
    with pytest.raises(ValueError, match=r"hr_msi: .* got -9999 to"):
        fuse(lr_hsi, masked)


def test_wrong_kinds(pair):
    lr_hsi, hr_msi = pair[:2]
    with pytest.raises(TypeError, match="lr_hsi: expected a tensor or a NumPy array, got list"):
        fuse([[1.0]], hr_msi)
    with pytest.raises(TypeError, match="hr_msi: expected the type of lr_hsi, Tensor, got ndarray"):
        fuse(lr_hsi, hr_msi.numpy())
    with pytest.raises(ValueError, match=r"lr_hsi: expected floating point .* got torch.uint8"):
        fuse(lr_hsi.byte(), hr_msi.byte())
    with pytest.raises(ValueError, match=r"lr_hsi: expected floating point .* got uint16"):
        fuse(lr_hsi.numpy().astype(np.uint16), hr_msi.numpy())
    with pytest.raises(ValueError, match=r"hr_msi: expected the dtype .* got torch.float64 on cpu"):
        fuse(lr_hsi, hr_msi.double())
    with pytest.raises(ValueError, match=r"lr_hsi: expected \(bands, rows, columns\).*\(8, 10\)"):
        fuse(lr_hsi[0], hr_msi)
    with pytest.raises(ValueError, match=r"lr_hsi: .* none of them 0"):
        fuse(lr_hsi[:, :0], hr_msi)
    with pytest.raises(ValueError, match="hr_msi: expected the batch"):
        fuse(lr_hsi.expand(2, -1, -1, -1), hr_msi.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="hr_msi: expected the batch"):
        fuse(lr_hsi, hr_msi[None])


def test_sensors_that_do_not_fit(pair):
    lr_hsi, hr_msi, srf, _ = pair
    with pytest.raises(ValueError, match=r"srf: expected .* \(3, 12\), got \(12, 3\); transpose"):
        fuse(lr_hsi, hr_msi, srf=srf.T)
    with pytest.raises(ValueError, match=r"srf: expected .* \(3, 12\), got \(3, 11\)$"):
        fuse(lr_hsi, hr_msi, srf=srf[:, 1:])
    with pytest.raises(TypeError, match="srf: expected a tensor or a NumPy array, got str"):
        fuse(lr_hsi, hr_msi, srf="nikon")
    with pytest.raises(ValueError, match="srf: expected finite"):
        fuse(lr_hsi, hr_msi, srf=srf * torch.nan)
    with pytest.raises(ValueError, match="psf: expected a degradation by 4, got one by 8"):
        fuse(lr_hsi, hr_msi, psf=Degradation.gaussian(8))
    with pytest.raises(ValueError, match="psf: expected weights that sum to 1, got 9"):
        fuse(lr_hsi, hr_msi, psf=torch.ones(3, 3))
    with pytest.raises(ValueError, match="psf: expected a matrix"):
        fuse(lr_hsi, hr_msi, psf=torch.ones(3))
