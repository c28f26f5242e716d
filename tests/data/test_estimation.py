"""Sensors that are known, told from the pair that they took."""

from __future__ import annotations

import pytest
import torch

from fastfusion.data import Degradation, apply_srf, demo_scene, estimate_sensors, srf_from_bands
from fastfusion.data.sensors import BOUNDARIES


@pytest.fixture(scope="module")
def scene() -> torch.Tensor:
    return torch.as_tensor(demo_scene().data)[:, :128, :160].double()


@pytest.fixture(scope="module")
def srf() -> torch.Tensor:
    return srf_from_bands([460, 550, 640], [70, 80, 70], range(400, 701, 10))


@pytest.mark.parametrize("scale", [4, 8])
def test_the_authors_sensors_are_found(scene, srf, scale):
    truth = Degradation.gaussian(scale)
    lr_hsi, hr_msi = truth(scene), apply_srf(scene, srf)
    found, response = estimate_sensors(lr_hsi, hr_msi, scale)
    assert found.centre == pytest.approx(truth.centre, abs=0.01 * scale)
    assert found.boundary == "circular"
    assert (found(hr_msi) - truth(hr_msi)).norm() < 2e-3 * truth(hr_msi).norm()
    assert (response >= 0).all()
    assert response.sum(1).tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert (apply_srf(lr_hsi, response) - truth(hr_msi)).norm() < 2e-3 * truth(hr_msi).norm()


@pytest.mark.parametrize("shift", [(0.3, -0.7), (-1.6, 2.25)])
def test_a_sub_pixel_shift_is_found(scene, srf, shift):
    # A Gaussian, away from the samples by ``shift`` MSI pixels.
    lines = [
        torch.exp(-0.5 * ((torch.arange(-9.0, 10.0, dtype=torch.float64) - s) / 2) ** 2)
        for s in shift
    ]
    truth = Degradation(torch.outer(*(line / line.sum() for line in lines)), 4)
    found, _ = estimate_sensors(truth(scene), apply_srf(scene, srf), 4)
    assert found.centre == pytest.approx(shift, abs=0.05)


def test_block_means_are_found_though_no_gaussian(scene, srf):
    truth, hr_msi = Degradation.block(4), apply_srf(scene, srf)
    found, _ = estimate_sensors(truth(scene), hr_msi, 4)
    assert found.centre == pytest.approx((1.5, 1.5), abs=0.02)
    assert (found(hr_msi) - truth(hr_msi)).norm() < 2e-3 * truth(hr_msi).norm()


@pytest.mark.parametrize("boundary", [b for b in BOUNDARIES if b != "reflect"])
def test_the_boundary_is_found(scene, srf, boundary):
    truth = Degradation.gaussian(4, boundary=boundary)
    found, _ = estimate_sensors(truth(scene), apply_srf(scene, srf), 4)
    assert found.boundary == boundary


def test_what_is_known_is_kept(scene, srf):
    truth = Degradation.gaussian(4)
    lr_hsi, hr_msi = truth(scene), apply_srf(scene, srf)
    degradation, response = estimate_sensors(lr_hsi, hr_msi, 4, degradation=truth)
    assert degradation is truth
    assert (apply_srf(lr_hsi, response) - truth(hr_msi)).abs().max() < 1e-4
    assert estimate_sensors(lr_hsi, hr_msi, 4, srf=srf)[1] is srf


def test_noise_moves_the_estimate_little(scene, srf):
    truth = Degradation.gaussian(4)
    lr_hsi, hr_msi = truth(scene), apply_srf(scene, srf)
    noisy = lr_hsi + 0.005 * torch.randn_like(lr_hsi), hr_msi + 0.005 * torch.randn_like(hr_msi)
    found, _ = estimate_sensors(*noisy, 4)
    assert found.centre == pytest.approx((0, 0), abs=0.1)
    assert (found(hr_msi) - truth(hr_msi)).norm() < 0.02 * truth(hr_msi).norm()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)])
def test_tiny_and_flat_pairs_give_some_sensor(size):
    hsi = torch.full((31, *size), 0.5)
    msi = torch.full((3, 4 * size[0], 4 * size[1]), 0.5)
    degradation, srf = estimate_sensors(hsi, msi, 4)
    assert degradation.psf.isfinite().all() and srf.isfinite().all()
