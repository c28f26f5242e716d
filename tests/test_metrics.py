"""Metrics against torchmetrics where the definitions meet, and against figures done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import image as torchmetrics

from fastfusion import metrics

WITH_REFERENCE = {
    "psnr": metrics.psnr,
    "sam": metrics.sam,
    "ssim": metrics.ssim,
    "mrae": metrics.mrae,
    "ergas": lambda fused, reference: metrics.ergas(fused, reference, ratio=4),
}


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    reference = 0.1 + 0.8 * torch.rand(*shape, dtype=dtype)
    return (reference + 0.05 * torch.randn(*shape, dtype=dtype)).clamp(0, 1), reference


# ------------------------------------------------------------------------------------------------
# Against torchmetrics
# ------------------------------------------------------------------------------------------------


def test_psnr_is_the_mean_of_torchmetrics_over_bands_and_images():
    fused, reference = pair(2, 4, 9, 7)
    bands = torch.stack(
        [
            torchmetrics.peak_signal_noise_ratio(fused[b, g], reference[b, g], data_range=1.0)
            for b in range(2)
            for g in range(4)
        ]
    )
    torch.testing.assert_close(metrics.psnr(fused, reference), bands.mean())
    torch.testing.assert_close(metrics.psnr(fused, reference, per_band=True), bands.view(2, 4))


def test_sam_is_torchmetrics_in_degrees():
    fused, reference = pair(2, 5, 9, 7)
    expected = torch.rad2deg(torchmetrics.spectral_angle_mapper(fused, reference))
    torch.testing.assert_close(metrics.sam(fused, reference), expected)


@pytest.mark.parametrize("ratio", [3, 4, 8])
def test_ergas_is_that_of_torchmetrics(ratio):
    fused, reference = pair(2, 5, 9, 7)
    expected = torchmetrics.error_relative_global_dimensionless_synthesis(fused, reference, ratio)
    torch.testing.assert_close(metrics.ergas(fused, reference, ratio=ratio), expected)


def test_ssim_is_that_of_torchmetrics_with_range_1():
    fused, reference = pair(2, 5, 24, 17)
    expected = torchmetrics.structural_similarity_index_measure(
        fused, reference, sigma=1.5, data_range=1.0
    )
    torch.testing.assert_close(metrics.ssim(fused, reference), expected)


@pytest.mark.parametrize("p", [1, 2])
def test_d_lambda_is_that_of_torchmetrics_image_by_image(p):
    fused, _ = pair(2, 5, 40, 32)
    lr_hsi, _ = pair(2, 5, 20, 16)
    expected = torch.stack(
        [
            torchmetrics.spectral_distortion_index(lr_hsi[b : b + 1], fused[b : b + 1], p)
            for b in range(2)
        ]
    )
    # torchmetrics gathers its float64 indices in float32
    torch.testing.assert_close(metrics.d_lambda(fused, lr_hsi, p=p), expected.mean().double(),
                               rtol=1e-5, atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("q", [1, 2])
def test_d_s_is_that_of_torchmetrics_for_the_projected_cubes(q):
    fused, _ = pair(1, 5, 40, 32)
    lr_hsi, _ = pair(1, 5, 20, 16)
    hr_msi, _ = pair(1, 3, 40, 32)
    lr_msi, _ = pair(1, 3, 20, 16)
    srf = torch.rand(3, 5, dtype=torch.float64)
    srf /= srf.sum(1, keepdim=True)
    expected = torchmetrics.spatial_distortion_index(
        torch.einsum("gk,bkhw->bghw", srf, fused),
        torch.einsum("gk,bkhw->bghw", srf, lr_hsi),
        hr_msi,
        lr_msi,
        norm_order=q,
    )
    found = metrics.d_s(fused, lr_hsi, hr_msi, srf=srf, lr_msi=lr_msi, q=q)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-7)


def test_dark_smooth_images_are_judged_in_double_precision():
    """In float32 the small number that torchmetrics adds to Q's denominator decides here."""
    lr_hsi = 0.05 + 0.003 * torch.rand(1, 4, 32, 32)
    fused = lr_hsi + 0.002 * torch.randn(1, 4, 32, 32)
    expected = torchmetrics.spectral_distortion_index(lr_hsi.double(), fused.double())
    found = metrics.d_lambda(fused, lr_hsi)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-7)
    single = torchmetrics.spectral_distortion_index(lr_hsi, fused)
    assert abs(single / expected - 1) > 0.1  # the reason for the code of our own


# ------------------------------------------------------------------------------------------------
# By hand
# ------------------------------------------------------------------------------------------------


def test_psnr_by_hand():
    reference = torch.zeros(2, 4, 4, dtype=torch.float64)
    fused = torch.stack([torch.full((4, 4), 0.1), torch.full((4, 4), 0.01)]).double()
    torch.testing.assert_close(
        metrics.psnr(fused, reference, per_band=True), torch.tensor([20.0, 40.0]).double()
    )
    assert metrics.psnr(fused, reference).item() == pytest.approx(30)
    assert metrics.psnr(fused, reference, peak=0.1).item() == pytest.approx(10)


def test_psnr_of_equal_images_is_infinite():
    cube = torch.rand(2, 3, 8, 8)
    assert metrics.psnr(cube, cube).item() == math.inf
    assert metrics.psnr(cube, cube, per_band=True).isinf().all()


def test_sam_by_hand_with_zero_spectra_left_out():
    fused = torch.tensor([[1.0, 0, 1, 0, 1], [0, 2, 0, 0, 1]]).view(2, 1, 5)
    reference = torch.tensor([[1.0, 3, 0, 1, 1], [1, 0, 0, 1, 1]]).view(2, 1, 5)
    # 45 degrees, 90 degrees, reference zero, fused zero, 0 degrees
    assert metrics.sam(fused, reference).item() == pytest.approx(45, abs=1e-4)
    expected = torch.tensor([[45, 90, torch.nan, torch.nan, 0]])
    found = metrics.sam(fused, reference, per_pixel=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert metrics.sam(fused[None], reference[None], per_pixel=True).shape == (1, 1, 5)


def test_sam_sees_small_angles_in_single_precision():
    angle = 1e-4  # degrees; the arc cosine gives 0 or 0.02 here
    fused = torch.tensor([1.0, math.tan(math.radians(angle))]).view(2, 1, 1)
    reference = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    assert metrics.sam(fused, reference).item() == pytest.approx(angle, rel=1e-3)
    cube = torch.rand(31, 8, 8)
    assert metrics.sam(cube, cube).item() == 0
    assert metrics.sam(2 * cube, cube).item() == pytest.approx(0, abs=1e-5)


def test_sam_ignores_brightness_however_faint():
    fused, reference = pair(4, 8, 8)
    torch.testing.assert_close(metrics.sam(1e-9 * fused, reference), metrics.sam(fused, reference))


def test_nothing_left_is_undefined():
    zero, cube = torch.zeros(3, 8, 8), torch.rand(3, 8, 8)
    assert metrics.sam(cube, zero).isnan()
    assert metrics.ergas(cube, zero, ratio=4).isnan()
    assert metrics.mrae(cube, zero).isnan()


def test_ergas_by_hand_with_a_zero_band_left_out():
    reference = torch.stack([torch.full((4, 4), v) for v in (0.5, 0.2, 0.0)])
    fused = torch.stack([torch.full((4, 4), v) for v in (0.6, 0.2, 0.7)])
    # relative errors 0.2 and 0; rms 0.2 / sqrt 2
    expected = 100 / 8 * 0.2 / math.sqrt(2)
    assert metrics.ergas(fused, reference, ratio=8).item() == pytest.approx(expected, rel=1e-5)


def test_a_zero_band_of_one_image_is_left_out_of_that_image_alone():
    fused, reference = pair(2, 3, 8, 8)
    reference[0, 1] = 0
    expected = [
        metrics.ergas(fused[0, [0, 2]], reference[0, [0, 2]], ratio=4),
        metrics.ergas(fused[1], reference[1], ratio=4),
    ]
    torch.testing.assert_close(
        metrics.ergas(fused, reference, ratio=4), torch.stack(expected).mean()
    )


def test_mrae_by_hand_with_zeros_left_out():
    reference = torch.tensor([0.5, 0.2, 0.0, 1.0]).view(1, 2, 2)
    fused = torch.tensor([0.6, 0.1, 0.3, 1.0]).view(1, 2, 2)
    assert metrics.mrae(fused, reference).item() == pytest.approx((0.2 + 0.5 + 0) / 3)


def test_ssim_of_flat_bands_by_hand():
    """Without structure only the luminance term is left."""
    fused, reference = torch.full((2, 16, 16), 0.5), torch.full((2, 16, 16), 0.25)
    expected = (2 * 0.125 + 1e-4) / (0.25 + 0.0625 + 1e-4)
    assert metrics.ssim(fused, reference).item() == pytest.approx(expected, abs=1e-4)


def test_q_by_hand():
    """Two bands in one window: Gaussian moments with NumPy, then the definition of Q."""
    band, other = torch.rand(2, 11, 11, dtype=torch.float64).numpy()
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2

    def quality(a, b):
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        return 4 * covariance * mean_a * mean_b / (variances * (mean_a**2 + mean_b**2))

    fused = torch.from_numpy(np.stack([band, other]))
    lr_hsi = torch.from_numpy(np.stack([band, band**2]))
    expected = abs(quality(band, other) - quality(band, band**2))
    assert metrics.d_lambda(fused, lr_hsi).item() == pytest.approx(expected, rel=1e-9)

    srf = torch.tensor([[0.25, 0.75]]).double()
    msi = torch.from_numpy(other**2)[None]
    expected = abs(
        quality(0.25 * band + 0.75 * other, other**2)
        - quality(0.25 * band + 0.75 * band**2, other**2)
    )
    found = metrics.d_s(fused, lr_hsi, msi, srf=srf)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_qnr_joins_the_two_indices():
    fused, _ = pair(2, 4, 44, 44)
    lr_hsi, _ = pair(2, 4, 11, 11)
    hr_msi, _ = pair(2, 2, 44, 44)
    srf = torch.rand(2, 4).double()
    spectral = metrics.d_lambda(fused, lr_hsi)
    spatial = metrics.d_s(fused, lr_hsi, hr_msi, srf=srf)
    blocks = hr_msi.unflatten(-1, (11, 4)).unflatten(-3, (11, 4)).mean((-1, -3))
    torch.testing.assert_close(spatial, metrics.d_s(fused, lr_hsi, hr_msi, srf=srf, lr_msi=blocks))
    torch.testing.assert_close(
        metrics.qnr(fused, lr_hsi, hr_msi, srf=srf, alpha=2, beta=3),
        (1 - spectral) ** 2 * (1 - spatial) ** 3,
    )


def test_flat_bands_have_no_distortion():
    cube = torch.full((3, 24, 24), 0.3)
    assert metrics.d_lambda(cube, cube[:, ::2, ::2]).item() == pytest.approx(0, abs=1e-12)
    assert metrics.d_lambda(cube[:1], cube[:1]).item() == 0  # one band has no pairs


# ------------------------------------------------------------------------------------------------
# What holds for all
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_batch_is_a_mean_and_may_be_missing(name):
    metric = WITH_REFERENCE[name]
    fused, reference = pair(3, 4, 12, 10)
    each = torch.stack([metric(a, b) for a, b in zip(fused, reference, strict=True)])
    torch.testing.assert_close(metric(fused, reference), each.mean())
    assert metric(fused, reference).shape == ()


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(name, dtype):
    metric = WITH_REFERENCE[name]
    fused, reference = (cube.to(dtype) for cube in pair(2, 4, 12, 10))
    found = metric(fused, reference)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), metric(fused.double(), reference.double()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_gradients(name):
    fused, reference = pair(1, 3, 6, 7)
    fused[0, :, 0, 0] = 0.01  # a nearly black pixel
    reference[0, :, 1, 1] = 0
    fused.requires_grad_()
    metric = WITH_REFERENCE[name]
    assert torch.autograd.gradcheck(lambda x: metric(x, reference), (fused,))


def test_gradients_without_reference():
    fused, lr_hsi = pair(1, 2, 11, 11)
    hr_msi, lr_msi = pair(1, 1, 11, 11)
    srf = torch.rand(1, 2).double()
    fused.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: metrics.qnr(x, lr_hsi, hr_msi, srf=srf, lr_msi=lr_msi), (fused,)
    )


def test_a_zero_pixel_leaves_the_gradient_of_sam_finite():
    fused, reference = pair(1, 3, 4, 4)
    fused[0, :, 0, 0] = 0
    fused[0, :, 1, 1] = reference[0, :, 1, 1]
    fused.requires_grad_()
    metrics.sam(fused, reference).backward()
    assert fused.grad is not None and fused.grad.isfinite().all()


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_nan_is_not_hidden(name):
    fused, reference = pair(1, 3, 8, 8)
    fused[0, 1, 2, 3] = torch.nan
    assert WITH_REFERENCE[name](fused, reference).isnan()


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_strided_input(name):
    fused, reference = pair(2, 3, 8, 8)
    metric = WITH_REFERENCE[name]
    found = metric(
        fused.to(memory_format=torch.channels_last), reference.flip(-1).contiguous().flip(-1)
    )
    torch.testing.assert_close(found, metric(fused, reference))


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_bad_cubes(name):
    metric, cube = WITH_REFERENCE[name], torch.rand(3, 8, 8)
    with pytest.raises(TypeError, match="fused: expected a tensor, got ndarray"):
        metric(np.zeros((3, 8, 8)), cube)
    with pytest.raises(TypeError, match="reference: expected a tensor, got NoneType"):
        metric(cube, None)
    with pytest.raises(ValueError, match=r"reference: .*\(3, 8, 8\), got \(4, 8, 8\)"):
        metric(cube, torch.rand(4, 8, 8))
    with pytest.raises(ValueError, match=r"reference: .*dtype"):
        metric(cube, cube.double())
    with pytest.raises(ValueError, match=r"fused: expected floating point .* got torch.uint8"):
        metric(torch.zeros(3, 8, 8, dtype=torch.uint8), cube)
    for shape in [(8, 8), (1, 1, 3, 8, 8), (3, 0, 8)]:
        with pytest.raises(ValueError, match="fused: expected"):
            metric(torch.rand(shape), torch.rand(shape))


def test_bad_numbers():
    cube = torch.rand(3, 16, 16)
    with pytest.raises(ValueError, match=r"peak must .* got 0"):
        metrics.psnr(cube, cube, peak=0)
    with pytest.raises(ValueError, match=r"ratio must .* got -4"):
        metrics.ergas(cube, cube, ratio=-4)
    with pytest.raises(ValueError, match=r"^p must .* got 0.5"):
        metrics.d_lambda(cube, cube, p=0.5)
    with pytest.raises(ValueError, match=r"alpha must .* got -1"):
        metrics.qnr(cube, cube, cube, srf=torch.eye(3), alpha=-1)


def test_too_small_for_the_window():
    with pytest.raises(ValueError, match=r"at least 6 x 6 .* got 5 x 8"):
        metrics.ssim(torch.rand(3, 5, 8), torch.rand(3, 5, 8))
    with pytest.raises(ValueError, match=r"lr_hsi: expected at least 11 x 11 .* got 10 x 20"):
        metrics.d_lambda(torch.rand(3, 20, 40), torch.rand(3, 10, 20))


def test_images_that_do_not_fit_together():
    fused, lr_hsi, hr_msi = torch.rand(4, 24, 24), torch.rand(4, 12, 12), torch.rand(2, 24, 24)
    srf = torch.rand(2, 4)
    with pytest.raises(ValueError, match="lr_hsi: expected the batch and bands"):
        metrics.d_lambda(fused, lr_hsi[:3])
    with pytest.raises(ValueError, match=r"srf: expected .*\(2, 4\), got \(4, 2\)"):
        metrics.d_s(fused, lr_hsi, hr_msi, srf=srf.T)
    with pytest.raises(TypeError, match="srf: expected a tensor"):
        metrics.d_s(fused, lr_hsi, hr_msi, srf=srf.numpy())
    with pytest.raises(ValueError, match="hr_msi: expected the sides"):
        metrics.d_s(fused, lr_hsi, hr_msi[:, :20], srf=srf)
    with pytest.raises(ValueError, match=r"lr_msi: expected \(2, 12, 12\), got \(2, 24, 24\)"):
        metrics.d_s(fused, lr_hsi, hr_msi, srf=srf, lr_msi=hr_msi)
    with pytest.raises(ValueError, match="lr_hsi: expected sides that divide"):
        metrics.d_s(fused, torch.rand(4, 11, 11), hr_msi, srf=srf)
