"""The definition of the local map in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfusion.ops.precision import wide


def interpolate(samples: Tensor, dim: int, size: int, scale: int, first: float) -> Tensor:
    """Linear interpolation along one dimension: ``samples`` lie at ``first + scale*i``."""
    count = samples.shape[dim]
    place = (torch.arange(size, dtype=torch.float64, device=samples.device) - first) / scale
    cell = place.floor().clamp(0, max(count - 2, 0))
    far = (place - cell).to(samples)
    far = far if dim == -1 else far[:, None]
    before = cell.long()
    behind = (before + 1).clamp(max=count - 1)
    return samples.index_select(dim, before) * (1 - far) + samples.index_select(dim, behind) * far


def local_map(
    coefficients: Tensor,
    guides: Tensor,
    detail: Tensor | None,
    sharpness: Tensor | None,
    scale: int,
    first_row: float,
    first_column: float,
) -> Tensor:
    """See :func:`fastfusion.ops.local_map.local_map`."""
    dtype = guides.dtype
    coefficients, guides = wide(coefficients), wide(guides)
    maps = interpolate(coefficients, -2, guides.shape[-2], scale, first_row)
    maps = interpolate(maps, -1, guides.shape[-1], scale, first_column)
    used = guides[:, None]
    if detail is not None and sharpness is not None:
        used = used + wide(sharpness)[:, None, None, None] * wide(detail)[:, None]
    return (maps[:, :, 0] + (maps[:, :, 1:] * used).sum(2)).to(dtype)
