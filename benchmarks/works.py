"""The pieces of work of the GPU's tables: an operator on an image's shape, forward or backward.

What is called on what, its bytes and its FLOPs stand in `fastfusion.benchmarking`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfusion import ops
from fastfusion.benchmarking import (
    Operation,
    costs,
    depthwise,
    frequency_filter,
    haar,
    large_attention,
    latent,
    mixing,
    multiscale,
    op_called,
)
from fastfusion.ops.haar import spectral_maxima, spectral_mix
from fastfusion.ops.operator import Operator

SMALL, LARGE = (1, 64, 256, 256), (8, 64, 512, 512)


@dataclasses.dataclass(frozen=True)
class Work:
    """One line of the tables: an operation on the shape ``(B, C, H, W)``."""

    operation: Operation
    label: str
    shape: tuple[int, ...]
    channels_last: bool = False
    backward: bool = False

    def __str__(self) -> str:
        operator, (image, *_) = self._called("meta", torch.float32)
        layout = ", channels_last" if self.channels_last else ""
        train = ", forward and backward" if self.backward else ""
        size = " x ".join(map(str, image.shape))
        return " ".join(filter(None, [operator.name, self.label])) + f", {size}{layout}{train}"

    @property
    def definition(self) -> Operator:
        return self._called("meta", torch.float32)[0]

    def arguments(self, device: str, dtype: torch.dtype) -> list[Any]:
        """The op's arguments, on fresh random tensors."""
        return self._called(device, dtype)[1]

    def costs(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes if each input is read once and each output written once, and FLOPs."""
        return costs(*self._called("meta", dtype), self.backward)

    def _called(self, device: str, dtype: torch.dtype) -> tuple[Operator, list[Any]]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype)

        image, *others = self.operation.make(self.shape, draw)
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return op_called(lambda: self.operation.call(image, *others, backend="auto"))


LSO = (latent(), "LSO 4x4")
LSM = (latent(4, 12, 16, squash=False), "LSM 16x16")
WHOLE = (latent(4, 12, None, squash=False), "whole image")
DEPTHWISE = {k: (depthwise(k), f"{k}x{k}") for k in (3, 7, 31)}
DILATED = (depthwise(7, 3), "7x7 dilation 3")
FREQUENCY = {mode: (frequency_filter(mode), mode) for mode in ("zeros", "circular")}
LARGE_ATTENTION = (large_attention(), "")
MULTISCALE = (multiscale(), "3x3 5x5")
DWT, IDWT, SPLIT = ((haar(name), "") for name in ("haar_dwt2d", "haar_idwt2d", "haar_split2d"))
MIXING = (mixing(), "")


def _response(size: int = 7) -> Operation:
    """The filtered spectrum by itself."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        channels = shape[1]
        matrices = draw(2, channels, channels) / channels**0.5
        return draw(*shape), matrices, draw(2, channels, size, size) / size

    return Operation(ops.frequency_response2d, make)


RESPONSE = (_response(), "")


def _stage(call: Callable[..., Any], gates: int) -> Operation:
    """SpeCAM's first stage: a 3x3 filter and a bias for each band, and gates of an image."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        batch, channels = shape[:2]
        filters = [draw(channels, 1, 3, 3) / 3, draw(channels)] * 2
        return draw(*shape), *filters, *(draw(batch, channels) for _ in range(gates))

    return Operation(call, make)


MAXIMA, MIXTURE = (_stage(spectral_maxima, 0), ""), (_stage(spectral_mix, 2), "")


def _step(name: str, tokens: int = 8, basis: int = 24, patch: int = 4) -> Operation:
    """One step of LSO's latent operator by itself."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        batch, channels, rows, columns = shape
        latents = (batch, -(-rows // patch) * -(-columns // patch), tokens, channels)
        linear = [draw(channels, channels) / channels**0.5, draw(channels)]
        if name == "latent_encode":
            return draw(*shape), draw(8, tokens, channels // 8), *linear, *linear
        if name == "latent_decode":
            return draw(*shape), draw(*latents), *linear
        return draw(*latents), *(draw(channels, basis) / basis for _ in range(2))

    options = {} if name == "trigonometric_solve" else {"patch_size": patch}
    return Operation(functools.partial(getattr(ops, name), **options), make)


STEPS = [(_step(f"latent_{name}"), "LSO 4x4") for name in ("encode", "decode")]
STEPS.append((_step("trigonometric_solve"), "LSO"))

#: In the order of their weight: what comes last is left out first when time is short.
WORKS = [
    Work(*LSO, SMALL),
    Work(*DILATED, SMALL),
    Work(*FREQUENCY["zeros"], SMALL),
    Work(*FREQUENCY["circular"], SMALL),
    Work(*LARGE_ATTENTION, SMALL),
    Work(*MULTISCALE, SMALL),
    Work(*DWT, SMALL),
    Work(*SPLIT, SMALL),
    Work(*MIXING, (4, 128, 1, 1)),
    Work(*DEPTHWISE[3], SMALL),
    Work(*DEPTHWISE[7], SMALL),
    Work(*DEPTHWISE[7], SMALL, channels_last=True),
    Work(*DEPTHWISE[31], SMALL),
    Work(*LSM, SMALL),
    Work(*WHOLE, SMALL),
    Work(*DEPTHWISE[7], LARGE),
    Work(*SPLIT, LARGE),
    Work(*LARGE_ATTENTION, LARGE),
    Work(*FREQUENCY["circular"], LARGE),
    Work(*LSO, LARGE),
    Work(*LSO, SMALL, backward=True),
    Work(*DEPTHWISE[7], SMALL, backward=True),
    Work(*LARGE_ATTENTION, SMALL, backward=True),
    Work(*MULTISCALE, SMALL, backward=True),
    Work(*FREQUENCY["zeros"], SMALL, backward=True),
    Work(*FREQUENCY["circular"], SMALL, backward=True),
    Work(*IDWT, SMALL),
    Work(*RESPONSE, SMALL),
    Work(*MAXIMA, SMALL),
    Work(*MIXTURE, SMALL),
    *(Work(*step, SMALL) for step in STEPS),
    Work(*LSM, SMALL, backward=True),
    Work(*WHOLE, SMALL, backward=True),
    *(Work(*work, SMALL, backward=True) for work in (DWT, IDWT, SPLIT, RESPONSE, MAXIMA, MIXTURE)),
    Work(*MIXING, (4, 128, 1, 1), backward=True),
    *(Work(*step, SMALL, backward=True) for step in STEPS),
]
