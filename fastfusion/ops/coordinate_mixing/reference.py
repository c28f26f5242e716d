"""The definition of SpeCAM's spectral coordinate mixing (CoFusion, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def coordinate_mixing(candidates: Tensor, state: Tensor, k: int) -> Tensor:
    """See :func:`fastfusion.ops.coordinate_mixing`; ``state`` is ``(B, C)`` here."""
    # Saliency of each coordinate, in float64 so that rounding decides no rank.
    saliency = candidates.detach().double().abs().sum(dim=1)
    # Stable, so that a tie goes to the lower index; then back in the order from left to right.
    ranked = saliency.sort(dim=-1, descending=True, stable=True).indices
    kept = ranked[:, :k].sort(dim=-1).values
    entries = candidates.gather(2, kept[:, None, :].expand(-1, candidates.shape[1], -1))
    # The sweep ends with the last entry that is not 0, or with the state where there is none.
    place = torch.arange(1, k + 1, device=candidates.device)
    last = torch.where(entries != 0, place, 0).amax(dim=-1, keepdim=True)
    accepted = entries.gather(2, (last - 1).clamp(min=0)).squeeze(-1)
    return torch.where(last.squeeze(-1) > 0, accepted, state)
