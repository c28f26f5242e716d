"""Triton kernels of the spectral coordinate mixing.

Three passes over a matrix of C channels by N coordinates an image, which for the sizes of the paper
lies in the cache after the first:

1. *saliency*: a tile is BLOCK_N columns; the program walks down all channels and sums in double,
   as the contract says, so that every backend ranks alike. 4 C N bytes read, 8 N written.
2. *selection*: a tile is BLOCK_N columns, compared with all N saliencies: a column is kept when
   fewer than k columns go before it. N bytes written. No sort, no atomics.
3. *sweep*: a tile is BLOCK_C channels; the program walks along all columns and remembers the last
   kept entry that is not 0. Backward it also writes the gradient of each entry.

No program writes what another one writes or waits for another one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.ops.triton import Table, Tile, blocks, launch, meta, strides, tuned

SALIENCY = Table("coordinate saliency", {"": {"": Tile({"BLOCK_C": 16, "BLOCK_N": 32}, warps=4)}})
SELECTION = Table("coordinate selection", {"": {"": Tile({"BLOCK_M": 64, "BLOCK_N": 32}, warps=4)}})
SWEEP = Table("coordinate sweep", {"": {"": Tile({"BLOCK_C": 16, "BLOCK_N": 64}, warps=4)}})
#: The ranking is in double by contract.
FLOAT64_KERNELS = {"mixing_saliency_kernel", "mixing_selection_kernel"}


@triton.jit
def mixing_saliency_kernel(
    candidates, saliency,
    in_b, in_c, in_n,
    channels, size,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``sum_c |candidates[b, c, n]|`` in float64."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(size, BLOCK_N)
    image = pid // parts
    n = (pid % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        place = image * in_b + c[:, None].to(tl.int64) * in_c + n[None, :] * in_n
        there = (c < channels)[:, None] & (n < size)[None, :]
        entry = tl.load(candidates + place, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(tl.abs(entry).to(tl.float64), axis=0)
    tl.store(saliency + image * size + n, total, mask=n < size)


@triton.jit
def mixing_selection_kernel(
    saliency, kept,
    size, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """1 for the k columns that rank first: NaN before numbers, then size, then position."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(size, BLOCK_N)
    image = pid // parts
    n = (pid % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = tl.load(saliency + image * size + n, mask=n < size, other=0.0)[None, :]
    before = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, size, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        # Saliencies are not negative, so that one of -1 goes before none.
        other = tl.load(saliency + image * size + m, mask=m < size, other=-1.0)[:, None]
        first = (m[:, None] < n[None, :]).to(tl.int32)
        tie = tl.where(other == mine, first, 0)
        order = tl.where(other > mine, 1, tie)
        unknown = tl.where(mine != mine, first, 1)
        order = tl.where(other != other, unknown, tl.where(mine != mine, 0, order))
        before += tl.sum(order, axis=0)
    tl.store(kept + image * size + n, (before < k).to(tl.int8), mask=n < size)


@triton.jit
def _last_accepted(
    candidates, kept, image, c, in_b, in_c, in_n, channels, size, BLOCK_N: tl.constexpr
):
    """For each channel 1 + the last kept column whose entry is not 0, or 0."""
    last = tl.zeros((c.shape[0],), tl.int32)
    for start in range(0, size, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keep = tl.load(kept + image * size + n, mask=n < size, other=0)
        place = image * in_b + c[:, None] * in_c + n[None, :].to(tl.int64) * in_n
        there = (c < channels)[:, None] & (keep != 0)[None, :]
        entry = tl.load(candidates + place, mask=there, other=0.0).to(tl.float32)
        last = tl.maximum(last, tl.max(tl.where(entry != 0.0, n[None, :] + 1, 0), axis=1))
    return last


@triton.jit
def mixing_fwd_kernel(
    candidates, kept, state, out,
    in_b, in_c, in_n, state_b, state_c, out_b, out_c,
    channels, size,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state after the sweep."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(channels, BLOCK_C)
    image = pid // parts
    c = (pid % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = _last_accepted(candidates, kept, image, c, in_b, in_c, in_n, channels, size, BLOCK_N)
    there = c < channels
    place = image * in_b + c * in_c + (last - 1).to(tl.int64) * in_n
    accepted = tl.load(candidates + place, mask=there & (last > 0), other=0.0)
    old = tl.load(state + image * state_b + c * state_c, mask=there, other=0.0)
    tl.store(out + image * out_b + c * out_c, tl.where(last > 0, accepted, old), mask=there)


@triton.jit
def mixing_bwd_kernel(
    candidates, kept, grad, grad_candidates, grad_state,
    in_b, in_c, in_n, grad_b, grad_c, state_b, state_c,
    channels, size,
    CANDIDATES: tl.constexpr, STATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient goes to the entry that was accepted last, or to the state."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(channels, BLOCK_C)
    image = pid // parts
    c = (pid % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = _last_accepted(candidates, kept, image, c, in_b, in_c, in_n, channels, size, BLOCK_N)
    there = c < channels
    flow = tl.load(grad + image * grad_b + c * grad_c, mask=there, other=0.0)
    nothing = tl.zeros_like(flow)
    if STATE:
        passed = tl.where(last > 0, nothing, flow)
        tl.store(grad_state + image * state_b + c * state_c, passed, mask=there)
    if CANDIDATES:
        for start in range(0, size, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            # The gradient of the candidates is contiguous.
            place = (image * channels + c[:, None]) * size + n[None, :]
            value = tl.where(n[None, :] + 1 == last[:, None], flow[:, None], nothing[:, None])
            tl.store(grad_candidates + place, value, mask=there[:, None] & (n < size)[None, :])


# -- launchers ---------------------------------------------------------------------------------


def _kept(candidates: Tensor, k: int) -> Tensor:
    """Which columns are kept, (B, N) of 0 and 1."""
    batch, channels, size = candidates.shape
    saliency = torch.empty((batch, size), dtype=torch.float64, device=candidates.device)
    kept = torch.empty((batch, size), dtype=torch.int8, device=candidates.device)

    def rank(tile: Tile) -> None:
        launch(
            mixing_saliency_kernel,
            (batch * blocks(size, tile["BLOCK_N"]),),
            tile,
            candidates=candidates,
            saliency=saliency,
            **strides(candidates, "in_b", "in_c", "in_n"),
            channels=channels,
            size=size,
        )

    def select(tile: Tile) -> None:
        launch(
            mixing_selection_kernel,
            (batch * blocks(size, tile["BLOCK_N"]),),
            tile,
            saliency=saliency,
            kept=kept,
            size=size,
            k=k,
        )

    tuned(SALIENCY, "", candidates, rank)
    tuned(SELECTION, "", candidates, select)
    return kept


def coordinate_mixing(candidates: Tensor, state: Tensor, k: int) -> Tensor:
    """See ``reference.py``."""
    batch, channels, size = candidates.shape
    kept = _kept(candidates, k)
    out = torch.empty(state.shape, dtype=state.dtype, device=state.device)

    def sweep(tile: Tile) -> None:
        launch(
            mixing_fwd_kernel,
            (batch * blocks(channels, tile["BLOCK_C"]),),
            tile,
            candidates=candidates,
            kept=kept,
            state=state,
            out=out,
            **strides(candidates, "in_b", "in_c", "in_n"),
            **strides(state, "state_b", "state_c"),
            **strides(out, "out_b", "out_c"),
            channels=channels,
            size=size,
        )

    tuned(SWEEP, "", candidates, sweep)
    return out


def coordinate_mixing_backward(
    grad: Tensor, candidates: Tensor, state: Tensor, k: int, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of the candidates and of the state."""
    batch, channels, size = candidates.shape
    kept = _kept(candidates, k)
    grad_candidates = grad.new_empty(candidates.shape if mask[0] else 0)
    grad_state = grad.new_empty(state.shape if mask[1] else (0, 0))

    def sweep(tile: Tile) -> None:
        launch(
            mixing_bwd_kernel,
            (batch * blocks(channels, tile["BLOCK_C"]),),
            tile,
            candidates=candidates,
            kept=kept,
            grad=grad,
            grad_candidates=grad_candidates,
            grad_state=grad_state,
            **strides(candidates, "in_b", "in_c", "in_n"),
            **strides(grad, "grad_b", "grad_c"),
            **strides(grad_state, "state_b", "state_c"),
            channels=channels,
            size=size,
            CANDIDATES=mask[0],
            STATE=mask[1],
        )

    tuned(SWEEP, "", candidates, sweep)
    return grad_candidates, grad_state if mask[1] else grad_state.view(0)


# -- what is compiled without a GPU ------------------------------------------------------------


def _examples(dtype: torch.dtype) -> None:
    candidates, state = meta(1, 256, 256, dtype=dtype), meta(1, 256, dtype=dtype)
    coordinate_mixing(candidates, state, 64)
    coordinate_mixing_backward(state, candidates, state, 64, [True, True])


EXAMPLES = {
    "float32": lambda: _examples(torch.float32),
    "bfloat16": lambda: _examples(torch.bfloat16),
}
