"""Degradation against SciPy, the TianGong-1 pair, and spectral responses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.io import loadmat, savemat

from fastfusion.data import (
    Degradation,
    SpectralResponse,
    apply_srf,
    gaussian_psf,
    read_response,
    read_srf,
    srf_from_bands,
    srf_from_response,
    wald,
)
from fastfusion.data.sensors import BOUNDARIES

SCIPY = {
    "circular": "wrap",
    "reflect": "mirror",
    "symmetric": "reflect",
    "replicate": "nearest",
    "zeros": "constant",
}
WAVELENGTHS = np.arange(400.0, 701.0, 10.0)


# Kernels of odd and even sides, one of them wider than the image; an image of several blocks.
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 6), (31, 25)])
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("offset", [0, 3])
def test_degradation_is_scipys_correlation(shape, separable, boundary, offset):
    if separable:
        psf = torch.outer(*(torch.rand(n, dtype=torch.float64) for n in shape))
    else:
        psf = torch.rand(shape, dtype=torch.float64)
    cube = torch.rand(2, 76, 20, dtype=torch.float64)
    low = Degradation(psf, 4, offset, boundary)(cube)
    blurred = [ndimage.correlate(band, psf.numpy(), mode=SCIPY[boundary]) for band in cube.numpy()]
    assert np.abs(low.numpy() - np.stack(blurred)[:, offset::4, offset::4]).max() < 1e-11


def test_separable_and_general_pass_agree():
    separable = Degradation.gaussian(4)
    general = Degradation(separable.psf.clone().requires_grad_(), 4)
    assert separable.factors is not None and general.factors is None
    cube = torch.rand(3, 2, 24, 32)
    assert torch.allclose(separable(cube), general(cube), atol=1e-6)


def test_authors_degradation_is_the_default():
    degradation = Degradation.gaussian(8)
    assert degradation.psf.shape == (25, 25)
    assert torch.equal(degradation.psf, gaussian_psf(25, 4.0))
    assert (degradation.offset, degradation.boundary) == (0, "circular")


def test_blocks_are_the_weighted_means_of_tiangong(scenes):
    lr_hsi, hr_msi, psf = (
        torch.from_numpy(loadmat(scenes / "tg1" / f"{name}.mat")[name])
        for name in ("lr_hsi", "hr_msi", "psf_gt")
    )
    srf = read_srf(scenes / "tg1" / "srf_gt.mat")
    degraded = Degradation.block(12, psf)(hr_msi.movedim(2, 0))
    assert (degraded - apply_srf(lr_hsi.movedim(2, 0), srf)).abs().max() < 1e-12


def test_plain_blocks_are_average_pooling():
    cube = torch.rand(5, 12, 20)
    pooled = torch.nn.functional.avg_pool2d(cube, 4)
    assert torch.allclose(Degradation.block(4)(cube), pooled, atol=1e-6)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_degradation_is_linear_with_the_adjoint_that_autograd_gives(boundary):
    degradation = Degradation.gaussian(3, boundary=boundary, offset=1)
    x = torch.rand(2, 15, 18, dtype=torch.float64, requires_grad=True)
    y = torch.rand(2, 5, 6, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(degradation(x), x, y)
    other = torch.rand_like(x)
    assert torch.allclose((degradation(other) * y).sum(), (other * adjoint).sum(), rtol=1e-12)
    assert torch.allclose(degradation(2 * other), 2 * degradation(other))


def test_a_learnable_psf_gets_its_gradient():
    psf = gaussian_psf(3, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: Degradation(p, 2)(torch.ones(1, 4, 4, dtype=torch.float64).cumsum(2)), psf
    )


def test_centre_is_the_centre_of_mass():
    assert Degradation.block(4).centre == pytest.approx((1.5, 1.5))
    assert Degradation.gaussian(5, offset=2).centre == pytest.approx((2, 2))
    ramp = torch.arange(24.0, dtype=torch.float64).expand(1, 24, 24)
    degradation = Degradation(torch.tensor([[0.0, 0.2, 0.8]]), 4, 1, "replicate")
    assert degradation(ramp)[0, 0, 1].item() == pytest.approx(4 + degradation.centre[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(3), 2), "psf: expected a 2-D"),
        ((torch.ones(3, 3, dtype=torch.int64), 2), "psf: expected a 2-D floating-point"),
        ((torch.rand(3, 3), 0), "scale must be at least 1"),
        ((torch.rand(3, 3), 2, 2), "offset must be from 0 to 1"),
        ((torch.rand(3, 3), 2, 0, "periodic"), "boundary must be one of 'circular'"),
    ],
)
def test_bad_degradations(arguments, message):
    with pytest.raises(ValueError, match=message):
        Degradation(*arguments)


def test_bad_cubes_and_types():
    with pytest.raises(TypeError, match="psf: expected a 2-D tensor"):
        Degradation(np.ones((3, 3)), 2)
    with pytest.raises(TypeError, match="scale must be an int"):
        Degradation(torch.ones(3, 3), 2.0)
    with pytest.raises(ValueError, match="multiples of the scale 4, got 10 x 12"):
        Degradation.gaussian(4)(torch.rand(3, 10, 12))
    with pytest.raises(ValueError, match="shape of one block"):
        Degradation.block(4, torch.rand(3, 3))


def test_empty_cubes_stay_empty():
    assert Degradation.gaussian(4)(torch.rand(0, 8, 8)).shape == (0, 2, 2)
    assert Degradation.gaussian(4)(torch.rand(3, 0, 8)).shape == (3, 0, 2)


# ------------------------------------------------------------------------------------------------


def test_a_table_on_the_hsis_own_bands_is_kept():
    table = torch.rand(3, 31).double().numpy()
    srf = srf_from_response(SpectralResponse(WAVELENGTHS, table, list("RGB")), WAVELENGTHS)
    assert np.allclose(srf, table / table.sum(1, keepdims=True))


def test_a_response_sees_a_linear_spectrum_exactly():
    fine = np.arange(380.0, 720.0)
    response = SpectralResponse(fine, np.exp(-0.5 * ((fine - 553) / 31) ** 2)[None], ["G"])
    srf = srf_from_response(response, WAVELENGTHS)
    seen = (response.responses @ (3 + 0.01 * fine)) / response.responses.sum()
    assert (srf.numpy() @ (3 + 0.01 * WAVELENGTHS)).item() == pytest.approx(seen.item(), rel=1e-4)


def test_a_narrow_band_between_two_hsi_bands_is_theirs():
    srf = srf_from_bands([553.0], [2.0], WAVELENGTHS)
    assert srf[0, 15:17].tolist() == pytest.approx([0.7, 0.3], abs=0.01)
    assert srf.sum().item() == pytest.approx(1)


def test_a_band_outside_the_hsi_is_refused_with_its_share():
    with pytest.raises(ValueError, match=r"100% of band at 860 nm lies outside .*400 to 700 nm"):
        srf_from_bands([550, 860], [50, 50], WAVELENGTHS)
    with pytest.raises(ValueError, match=r"5\d% of band at 705 nm"):
        srf_from_bands([705], [50], WAVELENGTHS)


def test_a_gap_is_not_bridged():
    gap = np.r_[400:500:10, 600:701:10].astype(float)
    with pytest.raises(ValueError, match="band at 550 nm lies outside"):
        srf_from_bands([550], [40], gap)
    wide = srf_from_bands([550], [40], gap, np.full(len(gap), 100.0))
    assert wide.sum().item() == pytest.approx(1)


def test_files_of_responses(scenes, tmp_path):
    matrix = read_srf(scenes / "srf" / "nikon_d700_P_N_V2.mat")
    table = read_srf(scenes / "srf" / "nikon_d700_cave_31.csv", WAVELENGTHS)
    assert matrix.shape == (3, 31)
    assert torch.allclose(matrix, table, atol=1e-12)
    np.save(tmp_path / "srf.npy", matrix.T.numpy())
    assert torch.allclose(read_srf(tmp_path / "srf.npy"), matrix)
    quickbird = read_response(scenes / "srf" / "quickbird.csv")
    assert quickbird.names == ["Blue", "Green", "Red", "NIR"]
    assert read_srf(scenes / "srf" / "quickbird.csv", np.linspace(400, 1000, 60)).shape == (4, 60)


def test_bad_files_of_responses(tmp_path):
    path = tmp_path / "srf.csv"
    for text, message in (
        ("", "wavelength_nm"),
        ("nm,R\n400,1\n", "wavelength_nm"),
        ("wavelength_nm,R\n400,high\n", "table of numbers"),
        ("wavelength_nm,R\n400,nan\n", "finite"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_response(path)
    savemat(tmp_path / "srf.mat", {"unknown": np.ones((3, 31))})
    with pytest.raises(ValueError, match="expected a variable P, R, srf, SRF or srf_gt, got"):
        read_srf(tmp_path / "srf.mat")
    with pytest.raises(ValueError, match=r"as \.csv, \.mat or \.npy"):
        read_srf(tmp_path / "srf.txt")


def test_wald_and_apply_srf():
    reference, srf = torch.rand(2, 31, 16, 24), torch.rand(3, 31)
    degradation = Degradation.gaussian(4)
    lr_hsi, hr_msi = wald(reference, degradation, srf)
    assert torch.allclose(hr_msi, torch.einsum("gk,bkhw->bghw", srf, reference), atol=1e-5)
    # The two sensors commute: one is spatial, the other spectral.
    assert torch.allclose(degradation(hr_msi), apply_srf(lr_hsi, srf), atol=1e-5)
    with pytest.raises(ValueError, match=r"srf: expected \(msi bands, hsi bands\)"):
        apply_srf(reference, srf.T)
