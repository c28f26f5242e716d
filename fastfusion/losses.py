"""The losses that the papers train with."""

from __future__ import annotations

from torch import Tensor, nn

from fastfusion.metrics import ssim

__all__ = ["CoFusionLoss"]


class CoFusionLoss(nn.Module):
    """CoFusion's loss (eq. 6-8): ``mean |fused - reference| + weight (1 - SSIM)``.

    SSIM is the mean over bands with a Gaussian window of 11, sigma 1.5, for values in [0, 1]; see
    `fastfusion.metrics.ssim`.

    Args:
        weight: the paper's lambda.

    Shape:
        ``fused``, ``reference``: ``(B, G, H, W)`` or ``(G, H, W)``, floating point, at least 6 x 6
        pixels; the loss has no dimensions, in the metrics' dtype (float32, or float64 for float64).

    Raises:
        TypeError, ValueError: the cubes are no tensors, not alike or too small; ``weight`` < 0.
        ImportError: torchmetrics is not installed.

    >>> import torch
    >>> reference = torch.rand(1, 3, 16, 16)
    >>> round(CoFusionLoss()(reference, reference).item(), 6)
    0.0
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight: expected a number from 0 up, got {weight}")
        self.weight = weight

    def forward(self, fused: Tensor, reference: Tensor) -> Tensor:
        similarity = ssim(fused, reference)  # checks the cubes
        return (fused - reference).abs().mean() + self.weight * (1 - similarity)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"
