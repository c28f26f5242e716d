"""Inner functions of the smaller kernels at their edges, for every instruction set."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import special

from tests.native.module import load

KINDS = [("", np.float32, 1e-6), ("_double", np.float64, 1e-14)]


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> ModuleType:
    return load(Path(__file__).with_name("elements.cpp"), request.param)


def ways(native: ModuleType) -> tuple[int, ...]:
    """One by one, whole vectors, and parts of them."""
    return (0, native.lanes, 3)


ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_every_number_of_two_bytes_is_widened(native, kind) -> None:
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}[kind]
    exact = torch.from_numpy(ALL_BITS.view(np.int16)).view(dtype).float().numpy()
    for count in ways(native):
        bits = ALL_BITS[: ALL_BITS.size // max(count, 1) * max(count, 1)]
        np.testing.assert_array_equal(
            getattr(native, f"widen_{kind}")(bits, count), exact[: bits.size]
        )


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_narrowing_rounds_to_even(native, kind) -> None:
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}[kind]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 15, dtype=np.uint64).astype(np.uint32)
    # All numbers of the type, those half way between two of them, and their neighbours.
    grid = torch.from_numpy(ALL_BITS.view(np.int16)).view(dtype).float().numpy()
    grid = grid[np.isfinite(grid)]
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    x = np.concatenate([bits.view(np.float32), grid, middle, np.nextafter(middle, np.inf)])
    x = np.concatenate([x, np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 65519.9, 65520.0])])
    x = x[: x.size // 48 * 48]
    exact = torch.from_numpy(x).to(dtype)
    for count in ways(native):
        found = getattr(native, f"narrow_{kind}")(x, count, False)
        got = torch.from_numpy(found.view(np.int16)).view(dtype)
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


def test_the_processors_own_narrowing(native) -> None:
    cpus = Path("/proc/cpuinfo")
    if not (cpus.exists() and " avx512_bf16" in cpus.read_text()):
        pytest.skip("this processor has no conversion to bfloat16")
    bits = np.random.default_rng(1).integers(0, 1 << 32, 1 << 15, dtype=np.uint64)
    x = bits.astype(np.uint32).view(np.float32)
    x[:4] = [np.inf, -np.inf, np.nan, -0.0]
    exact = torch.from_numpy(x).bfloat16()
    for count in (native.lanes, 3):
        size = x.size // count * count
        found = native.narrow_bfloat16(x[:size], count, True)
        got = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        normal = torch.from_numpy(~(np.abs(x[:size]) < np.finfo(np.float32).tiny))
        torch.testing.assert_close(
            got[normal], exact[:size][normal], rtol=0, atol=0, equal_nan=True
        )
        if native.lanes == 16:  # only then is it asked
            assert not got[~normal].any()


def test_exp_and_erf(native) -> None:
    x = np.linspace(-80, 80, 4001).astype(np.float32)
    assert np.max(np.abs(native.exp(x) / np.exp(x.astype(np.float64)) - 1)) < 3e-7
    x = np.concatenate([np.linspace(-5, 5, 4001), 10.0 ** -np.arange(1, 30)]).astype(np.float32)
    assert np.max(np.abs(native.erf(x) - special.erf(x.astype(np.float64)))) < 3e-7
    tiny = x[-20:]
    assert np.max(np.abs(native.erf(tiny) / special.erf(tiny.astype(np.float64)) - 1)) < 3e-7
    edges = np.float32([np.inf, -np.inf, np.nan, 200, -200, 0])
    np.testing.assert_array_equal(native.exp(edges), np.float32([np.inf, 0, np.nan, np.inf, 0, 1]))
    ends = np.float32([1, -1, np.nan, 1, -1, 0])
    np.testing.assert_allclose(native.erf(edges), ends, rtol=3e-7, atol=0)


@pytest.mark.parametrize("part", [1, 2, 5, 64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 60.0, 1e4])
def test_online_softmax(native, part, scale) -> None:
    scores = (np.random.default_rng(0).normal(size=37) * scale).astype(np.float32)
    for order in (scores, np.sort(scores), np.sort(scores)[::-1].copy()):
        weights = native.online_softmax(order, part)
        exact = special.softmax(order.astype(np.float64))
        # The shift -max log2(e) is rounded: a factor 2^(its error), at each new maximum.
        assert np.max(np.abs(weights - exact)) < 4e-7 + 1.2e-7 * np.abs(scores).max()
    scores[11] = np.nan
    assert np.isnan(native.online_softmax(scores, part)).all()


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
def test_shuffles(native, suffix, dtype, bound) -> None:
    lanes = getattr(native, f"lanes{suffix}")
    x = np.arange(2 * lanes, dtype=dtype)
    even, odd, back, turned = getattr(native, f"shuffled{suffix}")(x)
    np.testing.assert_array_equal(even, x[::2])
    np.testing.assert_array_equal(odd, x[1::2])
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(turned, x[:lanes][::-1])


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
def test_the_most_salient_are_kept_from_left_to_right(native, count) -> None:
    rng = np.random.default_rng(count)
    cases = {
        "distinct": rng.permutation(count).astype(float),
        "equals": rng.integers(0, 3, count).astype(float),
        "all equal": np.ones(count),
        "zeros": np.zeros(count),
        "infinite": np.where(rng.random(count) < 0.3, np.inf, rng.random(count)),
        "NaN": np.where(rng.random(count) < 0.3, np.nan, rng.random(count)),
        "tiny": rng.random(count) * 5e-324 * 100,
    }
    for name, saliency in cases.items():
        rank = np.where(np.isnan(saliency), np.inf, saliency)
        # NaN above infinity above all others; of equals the leftmost first.
        order = sorted(range(count), key=lambda n: (not np.isnan(saliency[n]), -rank[n], n))
        for k in {1, (count + 1) // 2, count}:
            assert native.most_salient(list(saliency), k) == sorted(order[:k]), (name, k)


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("columns", [1, 2, 3, 8, 31, 64, 65, 130])
def test_two_rows_share_a_transform(native, suffix, dtype, bound, rows, columns) -> None:
    x = np.random.default_rng(0).normal(size=(rows, columns))
    spectrum = np.fft.rfft(x, axis=1)
    # What numpy's inverse would ignore: imaginary parts where there can be none.
    spectrum[:, 0] += 3j
    if columns % 2 == 0:
        spectrum[:, -1] -= 2j
    wanted = np.fft.irfft(spectrum, columns, axis=1)
    split = np.stack([spectrum.real, spectrum.imag], axis=-1).astype(dtype)
    pairs = getattr(native, f"pairs{suffix}")(split, columns)
    back = np.fft.ifft(pairs[..., 0] + 1j * pairs[..., 1].astype(np.complex128), axis=1)
    parts = np.stack([back.real, back.imag], axis=-1).astype(dtype)
    found = getattr(native, f"rows{suffix}")(parts, rows)
    assert np.max(np.abs(found - wanted)) < 4 * bound


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
@pytest.mark.parametrize(
    ("size", "samples", "scale", "first"),
    [(16, 4, 4, 1.5), (9, 3, 4, 0.0), (7, 1, 8, 3.5), (30, 7, 5, -2.0)],
)
def test_between_which_samples_a_pixel_lies(
    native, suffix, dtype, bound, size, samples, scale, first
) -> None:
    before, near, far = map(
        np.asarray, getattr(native, f"axis{suffix}")(size, samples, scale, first)
    )
    values = np.random.default_rng(0).normal(size=samples + 1)
    values[samples] = values[samples - 1]  # as the kernel's line ends
    found = values[before] * near + values[before + 1] * far
    places = first + scale * np.arange(samples)
    inside = (np.arange(size) >= places[0]) & (np.arange(size) <= places[-1])
    wanted = np.interp(np.arange(size), places, values[:samples])
    assert np.allclose(found[inside], wanted[inside], atol=10 * bound)
    assert np.allclose(near + far, 1, atol=bound)
    assert before.min() >= 0 and before.max() <= max(samples - 2, 0)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 15, 16, 17, 33, 64])
def test_blocks_cover_all_and_nothing_else(native, count) -> None:
    assert all(times >= 1 for times in native.covered(count))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
def test_a_row_is_written_and_nothing_beside_it(native, streaming, count) -> None:
    x = np.arange(count, dtype=np.float32)
    for before in (0, 1, 5):
        row = native.write_row(x, before, 7, streaming)
        np.testing.assert_array_equal(row[before : before + count], x)
        assert (row[:before] == -1).all() and (row[before + count :] == -1).all()


# 1 and 2, each radix alone and mixed, squares of primes, the largest prime that is taken
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 25, 30, 49, 96, 121, 127, 210, 254, 256, 512]


@pytest.mark.parametrize(("suffix", "dtype", "bound"), KINDS)
def test_fourier_transforms_of_any_length(native, suffix, dtype, bound) -> None:
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        assert native.takes(length)
        x = rng.standard_normal((length, 2, getattr(native, f"lanes{suffix}"))).astype(dtype)
        found = getattr(native, f"transformed{suffix}")(x).astype(np.float64)
        exact = np.fft.fft(x[:, 0].astype(np.float64) + 1j * x[:, 1], axis=0)
        difference = np.linalg.norm(found[:, 0] + 1j * found[:, 1] - exact)
        assert difference <= bound * np.linalg.norm(exact), length


def test_lengths_with_a_large_prime_are_not_taken(native) -> None:
    assert not any(native.takes(length) for length in (131, 262, 131 * 127, 257))
    assert native.takes(127 * 127)
