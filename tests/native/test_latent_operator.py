"""The inner functions of the latent operator's CPU kernels, at their edges."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.native.module import load

KINDS = [("", np.float32, 2e-6), ("_double", np.float64, 1e-13)]


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> ModuleType:
    return load(Path(__file__).with_name("latent_operator.cpp"), request.param)


def error(result: np.ndarray, expected: np.ndarray) -> float:
    assert result.shape == expected.shape
    gap = np.linalg.norm(result.astype(np.float64) - expected)
    return float(gap / max(np.linalg.norm(expected), 1e-300))


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 1, 1), (8, 5, 3), (9, 64, 4), (24, 64, 16), (5, 0, 2)]
)
def test_packed_product(native, suffix, dtype, bound, rows, depth, columns) -> None:
    rng = np.random.default_rng(rows)
    lanes = getattr(native, f"lanes{suffix}")
    matrix, bias = rng.normal(size=(rows, depth)).astype(dtype), rng.normal(size=rows).astype(dtype)
    x = rng.normal(size=(depth, columns, lanes)).astype(dtype)
    start = rng.normal(size=(rows, columns, lanes)).astype(dtype)
    product = np.einsum("rk,kcl->rcl", matrix.astype(np.float64), x) + bias[:, None, None]
    project = getattr(native, f"project{suffix}")
    assert error(project(matrix, bias, x, np.full_like(start, np.nan), False), product) < bound
    assert error(project(matrix, bias, x, start.copy(), True), product + start) < bound


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 1), (4, 4, 8), (7, 9, 3), (8, 5, 0)])
def test_products_of_blocks(native, suffix, dtype, bound, rows, columns, depth) -> None:
    rng = np.random.default_rng(rows)
    lanes = getattr(native, f"lanes{suffix}")
    a = rng.normal(size=(rows, depth, lanes)).astype(dtype)
    b = rng.normal(size=(columns, depth, lanes)).astype(dtype)
    by_lane = np.einsum("rkl,ckl->rcl", a.astype(np.float64), b)
    assert error(getattr(native, f"multiply{suffix}")(a, b), by_lane) < bound
    start = rng.normal(size=(rows, columns)).astype(dtype)
    summed = getattr(native, f"multiply_lanes{suffix}")(a, b, start.copy())
    assert error(summed, by_lane.sum(-1) + start) < bound


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
def test_transposition(native, suffix, dtype, bound) -> None:
    lanes = getattr(native, f"lanes{suffix}")
    x = np.arange(lanes * lanes, dtype=dtype).reshape(lanes, lanes)
    np.testing.assert_array_equal(getattr(native, f"transpose{suffix}")(x), x.T)


def test_exponential(native) -> None:
    x = np.linspace(-125.9, 0, 16 * 4000, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.max(np.abs(native.exp2(x) / exact - 1)) < 3e-7
    edges = np.full(16, -np.inf, np.float32)
    edges[:5] = [0, -126.5, -1e30, np.nan, -1e-30]
    y = native.exp2(edges)
    assert abs(y[0] - 1) < 2e-7 and abs(y[4] - 1) < 2e-7
    assert np.isnan(y[3])
    assert (y[[1, 2, 5, 15]] == 0).all()


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6, 3e7])
def test_sine_and_cosine_of_any_phase(native, suffix, dtype, bound, scale) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=1600) * scale).astype(dtype)
    sine, cosine = getattr(native, f"sincos{suffix}")(x, math.pi)
    # The truth: the phase modulo its period is exact in double for a float32 x.
    phase = math.pi * np.fmod(x.astype(np.float64), 2)
    slack = 1.5e-7 if dtype == np.float32 else 1e-15 * (1 + 4 * np.abs(x))
    assert (np.abs(sine - np.sin(phase)) <= slack).all()
    assert (np.abs(cosine - np.cos(phase)) <= slack).all()


def test_sine_near_its_zeros_keeps_its_digits(native) -> None:
    x = np.concatenate([10.0 ** -np.arange(1, 17), -(10.0 ** -np.arange(1, 17))])
    sine, _ = native.sincos(x.astype(np.float32), math.pi)
    exact = np.sin(math.pi * x.astype(np.float32).astype(np.float64))
    assert np.max(np.abs(sine / exact - 1)) < 3e-7


def test_sine_of_what_has_none(native) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 1e38] * 4, np.float32)
    sine, cosine = native.sincos(x, math.pi)
    assert np.isnan(sine[:3]).all() and np.isnan(cosine[:3]).all()
    assert abs(sine[3]) <= 1.0001 and abs(cosine[3]) <= 1.0001


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize("basis", [0, 1, 4, 7, 8, 9, 24, 40])
@pytest.mark.parametrize("centre", [0.0, 1.0, 0.37, 2.0])
def test_series(native, suffix, dtype, bound, basis, centre) -> None:
    """Value, slope and gradients, on and around multiples of pi (centres 0, 1 and 2)."""
    rng = np.random.default_rng(basis)
    offsets = np.concatenate([[0.0], 10.0 ** -np.arange(1, 8), -(10.0 ** -np.arange(1, 9))])
    z = np.tile(centre + offsets, 4)[:64].astype(dtype)
    sine, cosine = (rng.normal(size=basis).astype(dtype) for _ in range(2))
    value, slope, by_sine, by_cosine = getattr(native, f"series{suffix}")(z, sine, cosine, math.pi)
    q = np.arange(1, basis + 1)
    angle = np.pi * np.fmod(q * z[:, None].astype(np.float64), 2)
    expected = np.sin(angle) @ sine.astype(np.float64) + np.cos(angle) @ cosine.astype(np.float64)
    turn = np.pi * q
    expected_slope = np.cos(angle) @ (turn * sine) - np.sin(angle) @ (turn * cosine)
    assert error(value, expected) < 2 * bound
    assert error(slope, expected_slope) < 2 * bound
    # Sums of sines may cancel to nothing: the cosines' sums give the scale.
    scale = max(np.linalg.norm(np.cos(angle).sum(0)), 1.0)
    assert np.linalg.norm(by_sine - np.sin(angle).sum(0)) < 2 * bound * scale
    assert np.linalg.norm(by_cosine - np.cos(angle).sum(0)) < 2 * bound * scale


@pytest.mark.parametrize("shape", [(1, 3, 16, 64), (2, 1, 7, 9), (1, 2, 1, 1), (1, 5, 33, 130)])
@pytest.mark.parametrize("patch", [(4, 4), (1, 1), (2, 8), (3, 5), (16, 16)])
@pytest.mark.parametrize("run", [0, 16, 48, 64])
def test_pixels_come_home(native, shape, patch, run) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(native.round_trip(x, *patch, run), x)
