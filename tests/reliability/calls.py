"""Random legal calls of every operator: shapes, options, layouts in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastfusion import ops
from fastfusion.ops import haar
from fastfusion.ops.local_map import local_map
from fastfusion.ops.operator import OPERATORS
from tests.cuda_on_cpu import library
from tests.ops.cases import Case
from tests.reliability.effort import TORTURE

Draw = Callable[..., Any]

#: Kernels that an interpreter or the host runtime goes through, value by value, get small images.
SLOW = os.environ.get("TRITON_INTERPRET") == "1" or library.installed
ELEMENTS = 500 if SLOW else 20_000
SIDE = st.one_of(st.integers(1, 9), st.integers(10, 70 if TORTURE else 24))
ODD = st.sampled_from([1, 3, 5, 7])


def images(draw: Draw, channels: st.SearchStrategy[int] | None = None) -> tuple[int, ...]:
    """``(B, C, H, W)`` of at most so many elements."""
    channels = st.one_of(st.integers(1, 9), st.integers(10, 40)) if channels is None else channels
    batch, depth, rows, columns = (
        draw(st.integers(1, 3)),
        draw(channels),
        draw(SIDE),
        draw(SIDE),
    )
    while batch * depth * rows * columns > ELEMENTS and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    return batch, depth, rows, columns


@st.composite
def haar_dwt2d(draw: Draw) -> Case:
    call = lambda t, b: ops.haar_dwt2d(t["x"], backend=b)  # noqa: E731
    return Case("haar_dwt2d", "drawn", {"x": images(draw)}, call)


@st.composite
def haar_split2d(draw: Draw) -> Case:
    call = lambda t, b: ops.haar_split2d(t["x"], backend=b)  # noqa: E731
    return Case("haar_split2d", "drawn", {"x": images(draw)}, call)


@st.composite
def haar_idwt2d(draw: Draw) -> Case:
    shape = images(draw)
    size = tuple(2 * n - draw(st.integers(0, 1)) for n in shape[2:])
    bands = ("ll", "lh", "hl", "hh")
    return Case(
        "haar_idwt2d",
        f"{size}",
        dict.fromkeys(bands, shape),
        lambda t, b: ops.haar_idwt2d(*(t[band] for band in bands), size=size, backend=b),
        images=bands,
    )


@st.composite
def coordinate_mixing(draw: Draw) -> Case:
    batch, channels = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    count = draw(st.integers(1, 60))
    k = draw(st.integers(1, count))
    state = (channels,) if draw(st.booleans()) else (batch, channels)
    zeros, ties = draw(st.sampled_from([0.0, 0.6, 1.0])), draw(st.booleans())

    def prepare(tensors: dict[str, Tensor]) -> None:
        candidates = tensors["candidates"]
        if ties:
            candidates.sign_()
        generator = torch.Generator().manual_seed(1)
        candidates[torch.rand(candidates.shape, generator=generator) < zeros] = 0

    return Case(
        "coordinate_mixing",
        f"k{k}-zeros{zeros}-ties{ties}",
        {"candidates": (batch, channels, count), "state": state},
        lambda t, b: ops.coordinate_mixing(t["candidates"], t["state"], k=k, backend=b),
        images=("candidates",),
        bounds=(0.0, 0.0),
        prepare=prepare,
    )


@st.composite
def depthwise_conv2d(draw: Draw) -> Case:
    size = images(draw)
    odd = st.one_of(ODD, st.sampled_from([9, 13] if SLOW else [9, 13, 21, 31, 41, 63]))
    kernel = (draw(odd), draw(odd))
    dilation = draw(st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    activation = draw(st.sampled_from([None, "relu", "gelu", "silu"]))
    shapes: dict[str, tuple[int, ...]] = {"x": size, "weight": (size[1], 1, *kernel)}
    if draw(st.booleans()):
        shapes["bias"] = (size[1],)
    return Case(
        "depthwise_conv2d",
        f"k{kernel}-d{dilation}-{activation}",
        shapes,
        lambda t, b: ops.depthwise_conv2d(
            t["x"],
            t["weight"],
            t.get("bias"),
            dilation=dilation,
            activation=activation,
            backend=b,
        ),
    )


@st.composite
def large_kernel_attention(draw: Draw) -> Case:
    size = images(draw)
    channels = size[1]
    shapes: dict[str, tuple[int, ...]] = {
        "x": size,
        "local_weight": (channels, 1, draw(ODD), draw(ODD)),
        "context_weight": (channels, 1, draw(ODD), draw(ODD)),
        "mix_weight": (channels, channels),
    }
    for bias in ("local_bias", "context_bias", "mix_bias"):
        if draw(st.booleans()):
            shapes[bias] = (channels,)
    dilation = draw(st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    return Case(
        "large_kernel_attention",
        f"d{dilation}",
        shapes,
        lambda t, b: ops.large_kernel_attention(
            t["x"],
            t["local_weight"],
            t.get("local_bias"),
            t["context_weight"],
            t.get("context_bias"),
            t["mix_weight"],
            t.get("mix_bias"),
            dilation=dilation,
            backend=b,
        ),
    )


@st.composite
def multiscale_attention(draw: Draw) -> Case:
    size = images(draw)
    scales = draw(st.integers(1, 3))
    shapes: dict[str, tuple[int, ...]] = {"x": size}
    for scale in range(scales):
        shapes[f"weight{scale}"] = (size[1], 1, draw(ODD), draw(ODD))
        if draw(st.booleans()):
            shapes[f"bias{scale}"] = (size[1],)
    return Case(
        "multiscale_attention",
        "drawn",
        shapes,
        lambda t, b: ops.multiscale_attention(
            t["x"],
            [t[f"weight{scale}"] for scale in range(scales)],
            [t.get(f"bias{scale}") for scale in range(scales)],
            backend=b,
        ),
    )


def _frequency_shapes(draw: Draw, extras: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    size = images(draw, st.integers(1, 9))
    filters, m = draw(st.integers(1, 9)), draw(ODD)
    shapes: dict[str, tuple[int, ...]] = {
        "x": size,
        "mixing": (2, filters, size[1]),
        "kernel": (2, filters, m, m),
    }
    for extra in extras:
        if draw(st.booleans()):
            shapes[extra] = (2, filters)
    return shapes


@st.composite
def frequency_filter2d(draw: Draw) -> Case:
    extras = ("mixing_bias", "gain", "bias")
    shapes = _frequency_shapes(draw, extras)
    mode = draw(st.sampled_from(["zeros", "circular"]))
    return Case(
        "frequency_filter2d",
        mode,
        shapes,
        lambda t, b: ops.frequency_filter2d(
            t["x"],
            t["mixing"],
            t["kernel"],
            **{name: t.get(name) for name in extras},
            padding_mode=mode,
            backend=b,
        ),
    )


@st.composite
def frequency_response2d(draw: Draw) -> Case:
    return Case(
        "frequency_response2d",
        "drawn",
        _frequency_shapes(draw, ("mixing_bias",)),
        lambda t, b: ops.frequency_response2d(
            t["x"], t["mixing"], t["kernel"], mixing_bias=t.get("mixing_bias"), backend=b
        ),
    )


def _latent(operator: str) -> Callable[[], st.SearchStrategy[Case]]:
    @st.composite
    def drawn(draw: Draw) -> Case:
        heads, depth = draw(st.sampled_from([(1, 1), (1, 5), (2, 4), (4, 4), (3, 5), (8, 8)]))
        channels = heads * depth
        size = images(draw, st.just(channels))
        tokens, basis = draw(st.integers(1, 9)), draw(st.integers(1, 12))
        patch = draw(
            st.one_of(st.integers(1, 5), st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
        )
        ph, pw = patch if isinstance(patch, tuple) else (patch or size[2], patch or size[3])
        patches = -(-size[2] // ph) * -(-size[3] // pw)
        x, latents = {"x": size}, {"latents": (size[0], patches, tokens, channels)}
        square, flat = (channels, channels), (channels,)
        prompts = {"prompts": (heads, tokens, depth)}
        keys = {"key_weight": square, "key_bias": flat, "value_weight": square, "value_bias": flat}
        query = {"query_weight": square, "query_bias": flat}
        series: dict[str, tuple[int, ...]] = {
            "sine": (channels, basis),
            "cosine": (channels, basis),
        }
        if draw(st.booleans()):
            series["offset"] = flat
        solving = {
            "fundamental": draw(st.sampled_from([math.pi, math.pi / 12, 0.5])),
            "squash": draw(st.booleans()),
        }
        # The keys' bias shifts all scores of a token alike: its gradient is 0. Where there is one
        # score, as every patch has one pixel, so is that of the keys' weights.
        zero = {"key_bias": "key_weight"}
        if min(ph, size[2]) * min(pw, size[3]) == 1:
            zero = {"key_bias": "value_bias", "key_weight": "value_weight"}
        shapes, options = {
            "latent_operator": (
                {**x, **prompts, **keys, **query, **series},
                {"patch_size": patch, **solving},
            ),
            "latent_encode": ({**x, **prompts, **keys}, {"patch_size": patch}),
            "trigonometric_solve": ({**latents, **series}, solving),
            "latent_decode": ({**x, **latents, **query}, {"patch_size": patch, "heads": heads}),
        }[operator]
        return Case(
            operator,
            f"{options}",
            shapes,
            lambda t, b: getattr(ops, operator)(**t, **options, backend=b),
            images=tuple(name for name in ("x", "latents") if name in shapes),
            scale_of=zero if "key_bias" in shapes else {},
            bounds=(1e-5, 5e-5),
        )

    return drawn


def _stage(operator: str) -> Callable[[], st.SearchStrategy[Case]]:
    """SpeCAM's first stage: its maxima, or its weighted sum."""

    @st.composite
    def drawn(draw: Draw) -> Case:
        size = images(draw)
        shapes: dict[str, tuple[int, ...]] = {"x": size}
        biased = draw(st.booleans())
        for band in ("low", "high"):
            shapes[f"{band}_weight"] = (size[1], 1, 3, 3)
            if biased:
                shapes[f"{band}_bias"] = (size[1],)
        gates = ("low_gate", "high_gate") if operator == "spectral_mix" else ()
        shapes |= dict.fromkeys(gates, size[:2])
        absent = {} if biased else {"low_bias": None, "high_bias": None}
        return Case(
            operator,
            "drawn",
            shapes,
            lambda t, b: getattr(haar, operator)(**t, **absent, backend=b),
            images=("x", *gates),
        )

    return drawn


@st.composite
def mapped(draw: Draw) -> Case:
    batch, guides, rows, columns = images(draw, st.integers(1, 4))
    targets, scale = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    first = tuple(-draw(st.integers(0, 4 * scale)) / 4 for _ in range(2))
    samples = [
        1 + math.ceil((n - 1 - at) / scale) for n, at in zip((rows, columns), first, strict=True)
    ]
    shapes: dict[str, tuple[int, ...]] = {
        "coefficients": (batch, targets, 1 + guides, *samples),
        "guides": (batch, guides, rows, columns),
    }
    if draw(st.booleans()):
        shapes |= {"detail": shapes["guides"], "sharpness": (targets,)}
    return Case(
        "local_map",
        f"{scale}-{first}",
        shapes,
        lambda t, b: local_map(**t, scale=scale, first=first, backend=b),
        images=tuple(name for name in shapes if name != "sharpness"),
    )


CALLS: dict[str, st.SearchStrategy[Case]] = {
    "haar_dwt2d": haar_dwt2d(),
    "haar_idwt2d": haar_idwt2d(),
    "haar_split2d": haar_split2d(),
    "coordinate_mixing": coordinate_mixing(),
    "depthwise_conv2d": depthwise_conv2d(),
    "large_kernel_attention": large_kernel_attention(),
    "multiscale_attention": multiscale_attention(),
    "frequency_filter2d": frequency_filter2d(),
    "frequency_response2d": frequency_response2d(),
    **{
        name: _latent(name)()
        for name in ("latent_operator", "latent_encode", "trigonometric_solve", "latent_decode")
    },
    **{name: _stage(name)() for name in ("spectral_maxima", "spectral_mix")},
    "local_map": mapped(),
}
assert CALLS.keys() == OPERATORS.keys()


def scattered(x: Tensor, order: tuple[int, ...], steps: tuple[int, ...], offset: int) -> Tensor:
    """The same values at any strides: dimensions in another order, with gaps, at an offset.

    What lies between is NaN, so that a kernel that reads there is found out.
    """
    sizes = [x.shape[dim] * steps[dim] for dim in order]
    wide = x.new_full((offset + math.prod(sizes),), float("nan"))[offset:].view(sizes)
    back = [order.index(dim) for dim in range(x.dim())]
    view = wide.permute(back)[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(x)


@st.composite
def layouts(draw: Draw, dims: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The arguments of `scattered`, contiguous and channels_last among them."""
    plain = tuple(range(dims))
    last = (0, *range(2, dims), 1) if dims > 1 else plain
    order = draw(st.one_of(st.just(plain), st.just(last), st.permutations(plain).map(tuple)))
    steps = draw(st.one_of(st.just((1,) * dims), st.tuples(*[st.integers(1, 2)] * dims)))
    return order, steps, draw(st.integers(0, 5))
