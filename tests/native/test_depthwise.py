"""The inner functions of the depthwise kernels at their edges, for every instruction set."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import signal

from tests.native.module import load

KINDS = [("", np.float32, 2e-6), ("_double", np.float64, 1e-13)]
NONE = np.zeros(0)


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> ModuleType:
    return load(Path(__file__).with_name("depthwise.cpp"), request.param)


def error(result: np.ndarray, expected: np.ndarray) -> float:
    assert result.shape == expected.shape
    gap = np.linalg.norm(result.astype(np.float64) - expected)
    return float(gap / max(np.linalg.norm(expected), 1e-300))


def image(shape: tuple[int, ...], across: bool, dtype: type, seed: int = 0) -> np.ndarray:
    """Random values (B, C, H, W), dense along the columns or across the channels."""
    x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    return x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) if across else x


def spread(weight: np.ndarray, dilation: tuple[int, int]) -> np.ndarray:
    """A dilated filter with the zeros between its taps."""
    rows, columns = weight.shape
    full = np.zeros(((rows - 1) * dilation[0] + 1, (columns - 1) * dilation[1] + 1))
    full[:: dilation[0], :: dilation[1]] = weight
    return full


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize(
    ("first", "count"), [(0, 37), (-3, 43), (5, 0), (-9, 4), (37, 6), (20, 40)]
)
def test_copies_end_in_zeros(native, suffix, dtype, bound, first, count) -> None:
    x = image((1, 5, 2, 37), False, dtype)
    padded = np.zeros((5, 37 + 100), dtype)
    padded[:, 50:87] = x[0, :, 1]
    expected = padded[:, 50 + first : 50 + first + count]
    copy_columns = getattr(native, f"copy_columns{suffix}")
    copy_pixels = getattr(native, f"copy_pixels{suffix}")
    for layout in (x, image((1, 5, 2, 37), True, dtype), np.repeat(x, 2, axis=3)[..., ::2]):
        np.testing.assert_array_equal(copy_columns(layout, 3, 1, first, count), expected[3])
        pixels = copy_pixels(layout, 1, 4, 1, first, count)
        np.testing.assert_array_equal(pixels[:, :4], expected[1:].T)
        assert not pixels[:, 4:].any()


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize("flip", [False, True])
def test_filters_are_packed_by_tap_columns(native, suffix, dtype, bound, flip) -> None:
    lanes = getattr(native, f"lanes{suffix}")
    channels = lanes + 3
    weight = np.random.default_rng(0).normal(size=(channels, 3, 5)).astype(dtype)
    bias = np.arange(channels).astype(dtype)
    pack = getattr(native, f"pack{suffix}")
    turned = weight[:, ::-1, ::-1] if flip else weight
    taps, biases = pack(weight, bias, False, flip)
    np.testing.assert_array_equal(taps.reshape(channels, 5, 3), turned.transpose(0, 2, 1))
    np.testing.assert_array_equal(biases, bias)
    taps, biases = pack(weight, NONE, True, flip)
    count = -(-channels // lanes)
    blocks = taps.reshape(count, 5, 3, lanes).transpose(0, 3, 2, 1).reshape(count * lanes, 3, 5)
    np.testing.assert_array_equal(blocks[:channels], turned)
    assert not blocks[channels:].any() and not biases.any()


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize(
    "kernel", [(1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (1, 9), (9, 1), (13, 3)]
)
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("across", [False, True])
def test_tiles(native, suffix, dtype, bound, kernel, dilation, across) -> None:
    """All numbers of rows and columns that a tile may be left with, next to memory that is NaN."""
    rng = np.random.default_rng(0)
    lanes = getattr(native, f"lanes{suffix}")
    rows, columns = kernel
    edge = columns // 2 * dilation
    sizes = [(1, 1, 1), (2, 3, 2), (3, 4, lanes), (7, 5, lanes + 1), (13, 9, 2 * lanes - 1)]
    for count, wide, channels in sizes:
        channels = channels if across else 1
        wide = wide if across else wide * lanes // 2 + 1
        x = rng.normal(size=(count + rows - 1, wide + 2 * edge, channels)).astype(dtype)
        weight = rng.normal(size=(channels, rows, columns)).astype(dtype)
        bias = rng.normal(size=channels).astype(dtype)
        present = [True] * len(x)
        if rows > 1:  # the image ends below the first row and above the last
            present[0] = present[-1] = False
        held = x * np.array(present)[:, None, None]
        expected = np.stack(
            [
                signal.correlate(
                    held[..., c].astype(float), spread(weight[c], (1, dilation)), mode="valid"
                )
                + bias[c]
                for c in range(channels)
            ],
            axis=-1,
        )
        for stream in (False, True):
            y = getattr(native, f"convolve{suffix}")(
                x, present, weight, bias, dilation, across, stream
            )
            if across:
                step = -(-channels // lanes) * lanes + lanes
                pixels = y[:, : wide * step].reshape(count, wide, step)
                assert error(pixels[..., :channels], expected) < bound
                assert (pixels[..., channels:] == -1).all() and (y[:, wide * step :] == -1).all()
            else:
                assert error(y[:, :wide], expected[..., 0]) < bound
                assert (y[:, wide:] == -1).all()


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("kernel", "dilation"), [((5, 5), (1, 1)), ((7, 3), (3, 2))])
@pytest.mark.parametrize("at_a_time", [1, 4, 30])
def test_a_slab_follows_the_filter(
    native, suffix, dtype, bound, across, kernel, dilation, at_a_time
) -> None:
    rng = np.random.default_rng(0)
    x = image((1, 3, 23, 19), across, dtype)
    weight = rng.normal(size=(3, *kernel)).astype(dtype)
    y = getattr(native, f"convolve_slab{suffix}")(x, weight, NONE, *dilation, across, at_a_time)
    for c in range(3):
        expected = signal.correlate(x[0, c], spread(weight[c], dilation), mode="same")
        assert error(y[c], expected) < bound


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [
        ((2, 3, 9, 11), (3, 3), (1, 1)),
        ((1, 18, 40, 70), (5, 7), (1, 2)),  # more than one chunk, a block that is not full
        ((1, 2, 3, 5), (7, 7), (3, 3)),  # taps that no pixel meets
        ((1, 1, 1, 1), (31, 1), (1, 1)),
        ((1, 2, 70, 600), (1, 1), (1, 1)),
    ],
)
def test_weight_gradient(native, suffix, dtype, bound, across, shape, kernel, dilation) -> None:
    x, grad = image(shape, across, dtype), image(shape, across, dtype, seed=1)
    call = getattr(native, f"weight_gradient{suffix}")
    weight, bias = call(x, grad, *kernel, *dilation, across, 1)
    assert error(bias, grad.astype(np.float64).sum((0, 2, 3))) < 10 * bound
    edges = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *((e, e) for e in edges)])
    expected = np.zeros((shape[1], *kernel))
    for p in range(kernel[0]):
        for q in range(kernel[1]):
            rows, columns = p * dilation[0], q * dilation[1]
            part = padded[:, :, rows : rows + shape[2], columns : columns + shape[3]]
            expected[:, p, q] = (part * grad).sum((0, 2, 3))
    assert error(weight, expected) < 2 * bound
    for threads in (2, 7):  # who does what changes no bit
        again = call(x, grad, *kernel, *dilation, across, threads)
        np.testing.assert_array_equal(again[0], weight)
        np.testing.assert_array_equal(again[1], bias)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 9, 13, 63])
def test_taps_are_cut_evenly(native, size) -> None:
    tiles = native.tiles(size)
    assert [first for first, _ in tiles] == list(np.cumsum([0] + [n for _, n in tiles])[:-1])
    counts = [count for _, count in tiles]
    assert sum(counts) == size and max(counts) <= native.most_taps
    assert max(counts) - min(counts) <= 1
