"""The Haar transforms, against PyWavelets, pytorch_wavelets and ptwt where they are installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.rows import Row, against_reference, for_each, record
from fastfusion import ops
from fastfusion.ops.haar import reference

SIZE = (1, 64, 256, 256)
BYTES = 4 * 64 * 256 * 256
TARGET = {"eager": 4.0, "compiled": 2.0, "PyWavelets": 5.0, "pytorch_wavelets": 5.0, "share": 0.8}


def _image() -> tuple[Any, ...]:
    return (torch.randn(SIZE),)


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
            x = _image()[0].numpy()
            return lambda: pywt.dwt2(x, "haar", mode="symmetric")

        found["PyWavelets"] = pywavelets
    if importlib.util.find_spec("pytorch_wavelets"):

        def pytorch_wavelets() -> Any:
            from pytorch_wavelets import DWTForward, DWTInverse

            if inverse:
                low, *details = _bands()
                module = DWTInverse(wave="haar", mode="symmetric")
                return lambda: module((low, [torch.stack(details, dim=2)]))
            module, x = DWTForward(J=1, wave="haar", mode="symmetric"), _image()[0]
            return lambda: module(x)

        found["pytorch_wavelets"] = pytorch_wavelets
    if importlib.util.find_spec("ptwt"):

        def ptwt() -> Any:
            import ptwt as library

            if inverse:
                low, *details = _bands()
                return lambda: library.waverec2((low, tuple(details)), "haar")
            x = _image()[0]
            return lambda: library.wavedec2(x, "haar", mode="symmetric", level=1)

        found["ptwt"] = ptwt
    return found


def _row(name: str, ours: Any, theirs: Any, make: Any, images: int, others: dict[str, Any]) -> Row:
    return Row(
        work=name,
        operators=(name,),
        contestants={**against_reference(ours, theirs, make), **others},
        moved=images * BYTES,
        flops=4 * BYTES / 4,
        target=TARGET,
    )


def _inverse(*bands: Any) -> Any:
    return reference.haar_idwt2d(*bands, 256, 256)


ROWS = [
    _row("haar_dwt2d", ops.haar_dwt2d, reference.haar_dwt2d, _image, 2, _others(False)),
    _row("haar_idwt2d", ops.haar_idwt2d, _inverse, _bands, 2, _others(True)),
    _row("haar_split2d", ops.haar_split2d, reference.haar_split2d, _image, 3, {}),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
