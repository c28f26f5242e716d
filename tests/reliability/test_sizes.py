"""Sizes at the ends: thousands of channels, prime sides, one row, more than 2^31 elements."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastfusion import ops
from fastfusion.ops.operator import OPERATORS
from tests.closeness import assert_close
from tests.ops.cases import Case
from tests.ops.test_parity import check
from tests.reliability.effort import TORTURE, counted

MANY = 4096


def _depthwise(size: tuple[int, ...], kernel: tuple[int, int]) -> Case:
    shapes = {"x": size, "weight": (size[1], 1, *kernel), "bias": (size[1],)}
    return Case(
        "depthwise_conv2d",
        f"{size}-{kernel}",
        shapes,
        lambda t, b: ops.depthwise_conv2d(t["x"], t["weight"], t["bias"], backend=b),
    )


def _haar(size: tuple[int, ...]) -> Case:
    return Case(
        "haar_split2d", f"{size}", {"x": size}, lambda t, b: ops.haar_split2d(t["x"], backend=b)
    )


def _mixing(channels: int, count: int) -> Case:
    return Case(
        "coordinate_mixing",
        f"{channels}x{count}",
        {"candidates": (1, channels, count), "state": (channels,)},
        lambda t, b: ops.coordinate_mixing(t["candidates"], t["state"], k=2, backend=b),
        images=("candidates",),
        bounds=(0.0, 0.0),
    )


def _filter(size: tuple[int, ...], mode: str) -> Case:
    shapes = {
        "x": size,
        "mixing": (2, size[1], size[1]),
        "kernel": (2, size[1], 3, 3),
    }
    return Case(
        "frequency_filter2d",
        f"{size}-{mode}",
        shapes,
        lambda t, b: ops.frequency_filter2d(
            t["x"], t["mixing"], t["kernel"], padding_mode=mode, backend=b
        ),
    )


def _multiscale(size: tuple[int, ...]) -> Case:
    return Case(
        "multiscale_attention",
        f"{size}",
        {"x": size, "one": (size[1], 1, 3, 3), "two": (size[1], 1, 5, 5)},
        lambda t, b: ops.multiscale_attention(t["x"], [t["one"], t["two"]], None, backend=b),
    )


def _latent(size: tuple[int, ...], heads: int) -> Case:
    channels = size[1]
    square, flat = (channels, channels), (channels,)
    shapes = {
        "x": size,
        "prompts": (heads, 2, channels // heads),
        **{f"{role}_weight": square for role in ("key", "value", "query")},
        **{f"{role}_bias": flat for role in ("key", "value", "query")},
        "sine": (channels, 2),
        "cosine": (channels, 2),
    }
    return Case(
        "latent_operator",
        f"{size}",
        shapes,
        lambda t, b: ops.latent_operator(**t, patch_size=4, backend=b),
        scale_of={"key_bias": "key_weight"},
        bounds=(1e-5, 5e-5),
    )


EXTREMES = [
    _depthwise((1, MANY, 3, 5), (3, 3)),
    _haar((1, MANY, 3, 5)),
    _mixing(MANY, 5),
    _multiscale((1, MANY, 2, 3)),
    _filter((1, 1, 97, 101), "zeros"),
    _filter((1, 3, 61, 127), "zeros"),
    _filter((1, 2, 89, 3), "circular"),
    _filter((1, 2, 2, 251), "zeros"),
    _depthwise((1, 1, 1, 5003), (7, 7)),
    _depthwise((1, 2, 5003, 1), (31, 31)),
    _depthwise((1, 1, 53, 59), (63, 63)),
    _haar((1, 1, 1, 5003)),
    _latent((1, 1, 1, 503), 1),
    _latent((1, 512, 1, 5), 8),
    _multiscale((1, 1, 1, 5003)),
]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_extreme_sizes(case: Case, backend: str) -> None:
    if backend == "cpp" and (reason := OPERATORS[case.operator].why_no_cpp()) is not None:
        pytest.skip(f"cpp: {reason}")
    if (case.operator, backend) == ("latent_operator", "reference") and case.shapes["x"][1] == 512:
        pytest.skip("512 channels: sums in float32 of the reference itself are beyond its bound")
    check(case, backend, torch.float32, "contiguous")
    counted("sizes", "extreme sizes")


# ------------------------------------------------------------------------------------------------
# More elements than 32 bits count: a small image, repeated along the batch without memory
# ------------------------------------------------------------------------------------------------

BEYOND = 2**31
#: GiB that have to be free: the results in float16, and what the kernels need beside.
NEEDED = 11


def _free() -> float:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) / 2**20


LARGE = [
    _haar((1, 3, 500, 600)),
    _depthwise((1, 3, 500, 600), (3, 3)),
    _mixing(64, 4000),
    _multiscale((1, 8, 300, 300)),
    _latent((1, 8, 300, 300), 2),
]


@pytest.mark.skipif(not TORTURE, reason="takes minutes and 11 GiB: in make torture")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_than_2_31_elements(case: Case) -> None:
    if (reason := OPERATORS[case.operator].why_no_cpp()) is not None:
        pytest.skip(f"cpp: {reason}")
    if _free() < NEEDED:
        pytest.skip(f"{NEEDED} GiB of memory have to be free, {_free():.0f} are")
    tensors = {name: value.half() for name, value in case.tensors().items()}
    image = case.images[0]
    one = case.outputs(tensors, "cpp")
    repeats = BEYOND // tensors[image].numel() + 2
    x = tensors[image].expand(repeats, *tensors[image].shape[1:])
    assert x.numel() > BEYOND
    if case.operator == "haar_split2d":  # its two results would take twice the memory
        bands = ops.haar_dwt2d(x, backend="cpp")
        truth: tuple[Tensor, ...] = ops.haar_dwt2d(tensors[image], backend="cpp")
    else:
        bands, truth = case.outputs({**tensors, image: x}, "cpp"), one
    for y, expected in zip(bands, truth, strict=True):
        for at in (0, repeats // 2, repeats - 1):
            assert_close(y[at], expected[0], 1e-6, f"image {at} of {repeats}")
    counted("sizes", "calls on more than 2^31 elements")


def test_strides_beyond_32_bits() -> None:
    """Strides, not sizes, that lead beyond 2^31 elements, in a mapping of pages nobody touches."""
    rows, columns, apart = 4, 64, 2**30 + 16
    size = 4 * ((rows - 1) * apart + columns)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
    base = torch.frombuffer(room, dtype=torch.float32)
    view = base.as_strided((1, 1, rows, columns), (1, 1, apart, 1))
    values = torch.randn(1, 1, rows, columns)
    view.copy_(values)
    weight = torch.randn(1, 1, 3, 3)
    for name, call in (
        ("depthwise", lambda x: ops.depthwise_conv2d(x, weight)),
        ("haar", lambda x: ops.haar_dwt2d(x)[0]),
        ("split", lambda x: ops.haar_split2d(x)[1]),
    ):
        assert_close(call(view), call(values), 1e-6, name)
    counted("sizes", "views with strides beyond 2^31 elements")
