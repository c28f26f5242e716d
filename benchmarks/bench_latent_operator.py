"""The latent operator in LSO's and LSM's configurations and with the whole image as one patch."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.rows import Row, against_reference, for_each, record, training_step
from fastfusion import ops
from fastfusion.ops.latent_operator import operator, reference

C, SIDE = 64, 256
PIXELS = SIDE * SIDE


def row(
    name: str,
    heads: int,
    tokens: int,
    basis: int,
    patch: int | None,
    squash: bool,
    target: dict[str, float],
    *,
    train: bool = False,
) -> Row:
    size = patch or SIDE
    fundamental = math.pi if squash else math.pi / basis

    def make() -> tuple[Any, ...]:
        scale = 1 / math.sqrt(C)
        tensors = [torch.randn(1, C, SIDE, SIDE), torch.rand(heads, tokens, C // heads)]
        for _ in range(3):
            tensors += [scale * torch.randn(C, C), scale * torch.randn(C)]
        tensors += [torch.rand(C, basis) / C, torch.rand(C, basis) / C]
        return tuple(t.requires_grad_(train) for t in tensors)

    def ours(*args: Any) -> Any:
        return ops.latent_operator(*args, patch_size=patch, fundamental=fundamental, squash=squash)

    def theirs(*args: Any) -> Any:
        return reference.latent_operator(*args, None, size, size, fundamental, squash)

    flops = operator.flops(
        (1, C, SIDE, SIDE),
        (heads, tokens, C // heads),
        *[()] * 6,
        (C, basis),
        (C, basis),
        None,
        size,
        size,
    )
    if train:
        ours, theirs = training_step(ours), training_step(theirs)
    return Row(
        work=f"latent_operator {name}" + (", forward and backward" if train else ""),
        operators=("latent_operator",),
        contestants=against_reference(ours, theirs, make),
        moved=(5 if train else 2) * 4 * C * PIXELS,
        flops=(3 if train else 1) * flops,
        target=target,
    )


LSO = (8, 8, 24, 4, True)
ROWS = [
    row("LSO 4x4", *LSO, {"eager": 40, "compiled": 11, "share": 0.5}),
    row("LSO 4x4", *LSO, {"eager": 20, "compiled": 6, "share": 0.4}, train=True),
    row("LSM 16x16", 8, 4, 12, 16, False, {"eager": 12, "compiled": 4, "share": 0.5}),
    row("whole image", 8, 4, 12, None, False, {"eager": 12, "compiled": 4, "share": 0.5}),
]


@for_each(ROWS)
def bench(benchmark, row, contestant):
    record(benchmark, row, contestant)
