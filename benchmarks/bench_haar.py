"""The Haar transforms and SpeCAM's first stage, which stands on them.

The transforms against PyWavelets, pytorch_wavelets and ptwt as well, where they are installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Row, against_reference, for_each, of_operation, record, training_step
from fastfusion.benchmarking import haar as transform
from fastfusion.ops import haar
from fastfusion.ops.haar import reference

SIZE = (1, 64, 256, 256)
BYTES = 4 * 64 * 256 * 256
TARGET = {"eager": 4.0, "compiled": 2.0, "PyWavelets": 5.0, "pytorch_wavelets": 5.0, "share": 0.8}


def _bands() -> tuple[Any, ...]:
    return tuple(torch.randn(1, 64, 128, 128) for _ in range(4))


def _others(inverse: bool) -> dict[str, Any]:
    """What a user would install instead."""
    found: dict[str, Any] = {}
    if importlib.util.find_spec("pywt"):

        def pywavelets() -> Any:
            import pywt

            if inverse:
                low, *details = (band.numpy() for band in _bands())
                return lambda: pywt.idwt2((low, tuple(details)), "haar")
            x = torch.randn(SIZE).numpy()
            return lambda: pywt.dwt2(x, "haar", mode="symmetric")

        found["PyWavelets"] = pywavelets
    if importlib.util.find_spec("pytorch_wavelets"):

        def pytorch_wavelets() -> Any:
            from pytorch_wavelets import DWTForward, DWTInverse

            if inverse:
                low, *details = _bands()
                module = DWTInverse(wave="haar", mode="symmetric")
                return lambda: module((low, [torch.stack(details, dim=2)]))
            module, x = DWTForward(J=1, wave="haar", mode="symmetric"), torch.randn(SIZE)
            return lambda: module(x)

        found["pytorch_wavelets"] = pytorch_wavelets
    if importlib.util.find_spec("ptwt"):

        def ptwt() -> Any:
            import ptwt as library

            if inverse:
                low, *details = _bands()
                return lambda: library.waverec2((low, tuple(details)), "haar")
            x = torch.randn(SIZE)
            return lambda: library.wavedec2(x, "haar", mode="symmetric", level=1)

        found["ptwt"] = ptwt
    return found


def _row(name: str, others: dict[str, Any]) -> Row:
    row = of_operation(name, transform(name), SIZE, TARGET)
    return dataclasses.replace(row, contestants={**row.contestants, **others})


def _stage(layout: torch.memory_format, train: bool) -> Row:
    """Split, both convolutions, GELU, maxima, and with gates made of these the weighted sum."""

    def make() -> tuple[Any, ...]:
        shapes = [(64, 1, 3, 3), (64,), (64, 1, 3, 3), (64,)]
        tensors = [torch.randn(SIZE).contiguous(memory_format=layout)]
        tensors += [torch.randn(shape) / 3 for shape in shapes]
        return tuple(t.requires_grad_(train) for t in tensors)

    def ours(x: Tensor, *filters: Tensor) -> Tensor:
        low, high = haar.spectral_maxima(x, *filters).sigmoid().chunk(2, dim=1)
        return haar.spectral_mix(x, *filters, low, high)

    def theirs(x: Tensor, *filters: Tensor) -> Tensor:
        low, high = reference.spectral_bands(x, *filters)
        gates = torch.cat([low.amax((2, 3)), high.amax((2, 3))], dim=1).sigmoid()[..., None, None]
        return low * gates[:, :64] + high * gates[:, 64:]

    if train:
        ours, theirs = training_step(ours), training_step(theirs)
    name = "channels_last" if layout == torch.channels_last else "NCHW"
    flops = haar.maxima.flops(SIZE) + haar.mix.flops(SIZE)
    return Row(
        work=f"SpeCAM's first stage, {name}" + (", forward and backward" if train else ""),
        operators=("haar_split2d", "depthwise_conv2d"),
        contestants=against_reference(ours, theirs, make),
        # x twice, since the gates depend on all of it; backward x, the gradient and that of x.
        moved=(3 + 3 * train) * BYTES,
        flops=flops * (3 if train else 1),
        target={} if train else {"eager": 6.0, "compiled": 6.0, "share": 0.5},
    )


ROWS = [
    _row("haar_dwt2d", _others(False)),
    _row("haar_idwt2d", _others(True)),
    _row("haar_split2d", {}),
    *(
        _stage(layout, train)
        for layout in (torch.contiguous_format, torch.channels_last)
        for train in (False, True)
    ),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
