"""SpeCAM's spectral coordinate mixing.

The mathematics, the kernels and their costs: README.md in this folder.
"""

from __future__ import annotations

from torch import Tensor

from fastfusion.ops import checks
from fastfusion.ops.coordinate_mixing import reference
from fastfusion.ops.operator import Operator

mixing = Operator(
    "coordinate_mixing(Tensor candidates, Tensor state, SymInt k) -> Tensor",
    reference=reference.coordinate_mixing,
    fake=lambda candidates, state, k: state.new_empty(state.shape),
    # One addition an entry for the saliency; ranking and sweeping only compare.
    flops=lambda candidates, state, k: candidates[0] * candidates[1] * candidates[2],
    backward_flops=lambda candidates, state, k, wanted: (
        candidates[0] * candidates[1] * candidates[2]
    ),
    batched=("candidates", "state"),
    autocast="widest",
)
mixing.add_cpp()
mixing.add_cuda()
mixing.add_triton("fastfusion.ops.coordinate_mixing.kernels")


def coordinate_mixing(
    candidates: Tensor, state: Tensor, *, k: int, backend: str = "auto"
) -> Tensor:
    """Let the k most salient coordinates overwrite a state, from left to right.

    CoFusion, Algorithm 1. The coordinates (columns) are ranked by ``sum_c |candidates[b, c, n]|``,
    accumulated in float64; a tie goes to the lower index. The k most salient are kept in their
    order and swept: where an entry is not exactly 0 it replaces the state, where it is 0 the state
    stays. The gradient flows to the entry that was accepted last, or to ``state`` where none was;
    none flows to the ranking.

    Args:
        candidates: ``(B, C, N)``, float32, float64, float16 or bfloat16.
        state: ``(B, C)``, or ``(C,)`` for the same state in every image.
        k: how many coordinates to keep, from 1 to N.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C)`` in the dtype of ``candidates``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> candidates = torch.tensor([[[5.0, 1.0, 0.0], [4.0, 0.0, 2.0]]])
    >>> coordinate_mixing(candidates, torch.zeros(2), k=2)  # columns 0 and 2 are kept
    tensor([[5., 2.]])
    """
    checks.tensor("candidates", candidates, dims=3, shape="(B, C, N)")
    batch, channels, coordinates = candidates.shape
    checks.tensor("state", state, dims=(1, 2), shape="(B, C) or (C,)")
    expected = (channels,) if state.dim() == 1 else (batch, channels)
    checks.parameter(
        "state",
        state,
        expected,
        shape="(C,)" if state.dim() == 1 else "(B, C)",
        like=candidates,
        like_name="candidates",
    )
    checks.integer("k", k, low=1, high=coordinates)
    if state.dim() == 1:
        state = state.expand(batch, channels)
    return mixing(candidates, state, k, backend=backend)


__all__ = ["coordinate_mixing"]
