"""One table of calls for all operators: what the parity, citizenship and gradient tests run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfusion import ops
from fastfusion.ops import haar
from fastfusion.ops.local_map import local_map


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an operator on random tensors.

    ``shapes`` gives the tensors by name; ``call(tensors, backend)`` the outputs. ``images`` are
    the tensors whose layout may change. ``scale_of`` names, for a gradient that is 0 in exact
    arithmetic, the tensor by whose gradient's norm its error is measured. ``bounds`` are the
    relative L2 errors allowed in float32: of the outputs and of each gradient.
    """

    operator: str
    label: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[dict[str, Tensor], str], Any]
    images: tuple[str, ...] = ("x",)
    scale_of: dict[str, str] = dataclasses.field(default_factory=dict)
    bounds: tuple[float, float] = (2e-6, 1e-5)
    prepare: Callable[[dict[str, Tensor]], None] = lambda tensors: None

    def __str__(self) -> str:
        return f"{self.operator}-{self.label}"

    @property
    def elements(self) -> int:
        """How many elements the images have."""
        return sum(math.prod(self.shapes[name]) for name in self.images)

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """The tensors in float64, of a size that keeps every part of the operator alive."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name not in self.images and len(shape) > 1:
                value = value / math.sqrt(math.prod(shape[1:]))
            drawn[name] = value
        self.prepare(drawn)
        return drawn

    def outputs(self, tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        """The outputs as a tuple."""
        result = self.call(tensors, backend)
        return result if isinstance(result, tuple) else (result,)


SIZES = [(2, 3, 8, 8), (1, 5, 7, 9), (1, 1, 1, 1), (2, 4, 1, 6), (1, 2, 5, 1), (1, 16, 33, 18)]


def _haar() -> list[Case]:
    cases = []
    for size in SIZES:
        label = "x".join(map(str, size))
        batch, channels, rows, columns = size
        half = (batch, channels, (rows + 1) // 2, (columns + 1) // 2)
        bands = ("ll", "lh", "hl", "hh")
        cases += [
            Case("haar_dwt2d", label, {"x": size}, lambda t, b: ops.haar_dwt2d(t["x"], backend=b)),
            Case(
                "haar_split2d", label, {"x": size}, lambda t, b: ops.haar_split2d(t["x"], backend=b)
            ),
            Case(
                "haar_idwt2d",
                label,
                dict.fromkeys(bands, half),
                lambda t, b, s=(rows, columns): ops.haar_idwt2d(
                    t["ll"], t["lh"], t["hl"], t["hh"], size=s, backend=b
                ),
                images=bands,
            ),
        ]
    return cases


def _some_zeros(tensors: dict[str, Tensor]) -> None:
    candidates = tensors["candidates"]
    mask = torch.rand(candidates.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    candidates[mask] = 0


def _ties(tensors: dict[str, Tensor]) -> None:
    tensors["candidates"].copy_(tensors["candidates"].sign())
    _some_zeros(tensors)


def _mixing() -> list[Case]:
    def mixing(k: int) -> Callable[[dict[str, Tensor], str], Tensor]:
        return lambda t, b: ops.coordinate_mixing(t["candidates"], t["state"], k=k, backend=b)

    rows = [
        ("quarter", (2, 8, 8), (2, 8), 2, _some_zeros),
        ("shared-state", (3, 16, 12), (16,), 5, _some_zeros),
        ("ties", (2, 6, 40), (2, 6), 9, _ties),
        ("all", (1, 5, 7), (1, 5), 7, _some_zeros),
        ("one", (1, 1, 1), (1, 1), 1, lambda t: None),
        ("wide", (2, 64, 64), (64,), 16, _some_zeros),
    ]
    return [
        Case(
            "coordinate_mixing",
            label,
            {"candidates": candidates, "state": state},
            mixing(k),
            images=("candidates",),
            bounds=(0.0, 0.0),
            prepare=prepare,
        )
        for label, candidates, state, k, prepare in rows
    ]


def _depthwise() -> list[Case]:
    def convolution(dilation: Any, activation: str | None) -> Any:
        return lambda t, b: ops.depthwise_conv2d(
            t["x"],
            t["weight"],
            t.get("bias"),
            dilation=dilation,
            activation=activation,
            backend=b,
        )

    rows: list[tuple[Any, ...]] = [
        ((2, 3, 8, 8), (3, 3), 1, None, True),
        ((1, 5, 7, 9), (5, 5), 1, "gelu", True),
        ((1, 1, 1, 1), (3, 3), 1, "silu", True),
        ((2, 4, 1, 6), (7, 7), 3, None, False),
        ((1, 2, 5, 1), (1, 1), 1, "relu", False),
        ((1, 16, 33, 18), (3, 5), (1, 2), "silu", True),
        ((1, 8, 21, 40), (7, 7), 3, "gelu", True),
        ((1, 17, 12, 35), (13, 13), 1, None, True),
        ((1, 3, 40, 21), (31, 31), 1, None, True),
        ((1, 2, 10, 66), (1, 63), 1, None, False),
        ((2, 32, 16, 17), (3, 3), (4, 2), "relu", True),
        ((1, 4, 26, 70), (5, 5), 2, None, True),
        ((2, 3, 40, 36), (41, 35), 1, None, True),  # by the transform
    ]
    cases = []
    for size, kernel, dilation, activation, bias in rows:
        label = f"{'x'.join(map(str, size))}-k{kernel[0]}x{kernel[1]}-d{dilation}-{activation}"
        shapes: dict[str, tuple[int, ...]] = {"x": size, "weight": (size[1], 1, *kernel)}
        if bias:
            shapes["bias"] = (size[1],)
        cases.append(Case("depthwise_conv2d", label, shapes, convolution(dilation, activation)))
    return cases


def _attention() -> list[Case]:
    def large(dilation: Any) -> Any:
        return lambda t, b: ops.large_kernel_attention(
            t["x"],
            t["local_weight"],
            t.get("local_bias"),
            t["context_weight"],
            t.get("context_bias"),
            t["mix_weight"],
            t.get("mix_bias"),
            dilation=dilation,
            backend=b,
        )

    def multiscale(scales: int, biased: bool) -> Any:
        return lambda t, b: ops.multiscale_attention(
            t["x"],
            [t[f"weight{s}"] for s in range(scales)],
            [t[f"bias{s}"] for s in range(scales)] if biased else None,
            backend=b,
        )

    cases = []
    for size, local, context, dilation, biased in [
        ((1, 8, 12, 13), 5, 7, 3, True),
        ((2, 3, 5, 4), 3, 3, 1, False),
        ((1, 1, 1, 1), 5, 7, 3, True),
        ((1, 33, 20, 41), 5, 7, (3, 2), True),
        ((1, 5, 90, 150), 5, 7, 3, True),  # more than one band and strip
    ]:
        channels = size[1]
        shapes: dict[str, tuple[int, ...]] = {
            "x": size,
            "local_weight": (channels, 1, local, local),
            "context_weight": (channels, 1, context, context),
            "mix_weight": (channels, channels),
        }
        if biased:
            shapes |= dict.fromkeys(("local_bias", "context_bias", "mix_bias"), (channels,))
        label = f"{'x'.join(map(str, size))}-d{dilation}"
        cases.append(Case("large_kernel_attention", label, shapes, large(dilation)))
    for size, sizes, biased in [
        ((2, 4, 9, 10), (3, 5), True),
        ((1, 3, 7, 5), (3,), False),
        ((1, 1, 1, 1), (3, 5, 7), True),
        ((1, 24, 19, 37), (3, 5), True),
        ((1, 66, 9, 20), (3, 5), True),  # more than one block of channels
        ((1, 2, 20, 530), (3, 5), True),  # and, along the columns, of columns
    ]:
        channels = size[1]
        shapes = {"x": size}
        for scale, kernel in enumerate(sizes):
            shapes[f"weight{scale}"] = (channels, 1, kernel, kernel)
            if biased:
                shapes[f"bias{scale}"] = (channels,)
        label = f"{'x'.join(map(str, size))}-{sizes}"
        cases.append(Case("multiscale_attention", label, shapes, multiscale(len(sizes), biased)))
    return cases


def _frequency() -> list[Case]:
    def filtering(mode: str) -> Any:
        return lambda t, b: ops.frequency_filter2d(
            t["x"],
            t["mixing"],
            t["kernel"],
            mixing_bias=t.get("mixing_bias"),
            gain=t.get("gain"),
            bias=t.get("bias"),
            padding_mode=mode,
            backend=b,
        )

    def response(t: dict[str, Tensor], b: str) -> Any:
        return ops.frequency_response2d(
            t["x"], t["mixing"], t["kernel"], mixing_bias=t.get("mixing_bias"), backend=b
        )

    cases = []
    for size, filters, m, extras in [
        ((2, 3, 8, 8), 4, 3, True),
        ((1, 5, 7, 9), 5, 5, False),
        ((1, 1, 1, 1), 5, 3, True),
        ((2, 4, 1, 6), 2, 7, False),
        ((1, 2, 5, 1), 3, 3, True),
        ((1, 16, 33, 18), 16, 7, True),
        ((1, 6, 16, 31), 6, 7, False),
    ]:
        channels = size[1]
        shapes: dict[str, tuple[int, ...]] = {
            "x": size,
            "mixing": (2, filters, channels),
            "kernel": (2, filters, m, m),
        }
        if extras:
            shapes |= dict.fromkeys(("mixing_bias", "gain", "bias"), (2, filters))
        label = f"{'x'.join(map(str, size))}-D{filters}-m{m}"
        for mode in ("zeros", "circular"):
            cases.append(Case("frequency_filter2d", f"{label}-{mode}", shapes, filtering(mode)))
        spectral = {n: s for n, s in shapes.items() if n not in ("gain", "bias")}
        cases.append(Case("frequency_response2d", label, spectral, response))
    return cases


def _latent() -> list[Case]:
    bounds = (1e-5, 5e-5)
    # The keys' bias shifts all scores of a token alike: its gradient is 0 in exact arithmetic.
    zero_gradient = {"key_bias": "key_weight"}
    # size, heads, tokens, basis, patch, squash, fundamental, offset
    rows: list[tuple[Any, ...]] = [
        ("lso", (1, 64, 12, 16), 8, 8, 24, 4, True, math.pi, False),
        ("lso-ragged", (2, 64, 7, 9), 8, 8, 24, 4, True, math.pi, False),
        ("lsm", (1, 32, 32, 32), 8, 4, 12, 16, False, math.pi / 12, True),
        ("whole", (2, 16, 11, 13), 2, 4, 6, None, True, math.pi, True),
        ("whole-large", (1, 8, 70, 65), 2, 3, 4, None, False, 0.5, True),
        ("whole-narrow", (1, 2, 27, 25), 1, 3, 4, None, True, math.pi, True),
        ("tiny", (1, 1, 1, 1), 1, 1, 1, 4, True, math.pi, True),
        ("odd", (1, 15, 6, 5), 3, 5, 7, (2, 3), False, math.pi / 7, False),
        ("one-row", (1, 8, 1, 9), 4, 2, 3, 2, True, math.pi, False),
    ]
    cases = []
    for label, size, heads, tokens, basis, patch, squash, fundamental, offset in rows:
        channels = size[1]
        rows_, columns_ = (
            patch if isinstance(patch, tuple) else (patch or size[2], patch or size[3])
        )
        patches = -(-size[2] // rows_) * -(-size[3] // columns_)
        latents = (size[0], patches, tokens, channels)
        prompts = {"prompts": (heads, tokens, channels // heads)}
        key_value = {
            f"{role}_{part}": (channels, channels) if part == "weight" else (channels,)
            for role in ("key", "value")
            for part in ("weight", "bias")
        }
        query = {"query_weight": (channels, channels), "query_bias": (channels,)}
        series = {"sine": (channels, basis), "cosine": (channels, basis)}
        if offset:
            series["offset"] = (channels,)
        options = {"fundamental": fundamental, "squash": squash}

        def whole(t: dict[str, Tensor], b: str, p: Any = patch, o: Any = options) -> Tensor:
            return ops.latent_operator(**t, patch_size=p, backend=b, **o)

        def encode(t: dict[str, Tensor], b: str, p: Any = patch) -> Tensor:
            return ops.latent_encode(**t, patch_size=p, backend=b)

        def solve(t: dict[str, Tensor], b: str, o: Any = options) -> Tensor:
            return ops.trigonometric_solve(**t, backend=b, **o)

        def decode(t: dict[str, Tensor], b: str, p: Any = patch, h: int = heads) -> Tensor:
            return ops.latent_decode(**t, patch_size=p, heads=h, backend=b)

        cases += [
            Case(
                "latent_operator",
                label,
                {"x": size, **prompts, **key_value, **query, **series},
                whole,
                scale_of=zero_gradient,
                bounds=bounds,
            ),
            Case(
                "latent_encode",
                label,
                {"x": size, **prompts, **key_value},
                encode,
                scale_of=zero_gradient,
                bounds=bounds,
            ),
            Case(
                "trigonometric_solve",
                label,
                {"latents": latents, **series},
                solve,
                images=("latents",),
                bounds=bounds,
            ),
            Case(
                "latent_decode",
                label,
                {"x": size, "latents": latents, **query},
                decode,
                bounds=bounds,
            ),
        ]
    return cases


CASES: list[Case] = [
    *_haar(),
    *_mixing(),
    *_depthwise(),
    *_attention(),
    *_frequency(),
    *_latent(),
]


def _internal() -> list[Case]:
    shapes = {"x": (2, 3, 9, 8)}
    for band in ("low", "high"):
        shapes |= {f"{band}_weight": (3, 1, 3, 3), f"{band}_bias": (3,)}
    gates = {"low_gate": (2, 3), "high_gate": (2, 3)}

    def mapped(t: dict[str, Tensor], b: str) -> Tensor:
        return local_map(**t, scale=4, first=(-1.5, -2.0), backend=b)

    maps = {"coefficients": (2, 5, 4, 4, 4), "guides": (2, 3, 9, 8), "detail": (2, 3, 9, 8)}
    return [
        Case("spectral_maxima", "9x8", shapes, lambda t, b: haar.spectral_maxima(**t, backend=b)),
        Case("spectral_mix", "9x8", shapes | gates, lambda t, b: haar.spectral_mix(**t, backend=b)),
        Case("local_map", "9x8", maps | {"sharpness": (5,)}, mapped, images=("guides", "detail")),
    ]


#: Operators that the layers and models use and the public interface has not; their values are held
#: by tests/ops/test_haar.py and tests/ops/test_local_map.py.
INTERNAL: list[Case] = _internal()
#: The first case of each operator, for what need not run over all.
FIRST: list[Case] = list({case.operator: case for case in reversed(CASES)}.values())
#: The first two of each: for most an even and an odd size.
FIRST_TWO: list[Case] = [
    case
    for first in FIRST
    for case in [other for other in CASES if other.operator == first.operator][:2]
]

#: One call of every operator.
EVERY: list[Case] = [*FIRST, *INTERNAL]
