"""The losses that the papers train with."""

from __future__ import annotations

from torch import Tensor, nn

from fastfusion.metrics import ssim
from fastfusion.ops import checks

__all__ = ["CoFusionLoss", "FSRVLLoss", "RelativeLoss"]


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
        self.weight = checks.at_least("weight", weight, 0)

    def forward(self, fused: Tensor, reference: Tensor) -> Tensor:
        similarity = ssim(fused, reference)  # checks the cubes
        return (fused - reference).abs().mean() + self.weight * (1 - similarity)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class FSRVLLoss(nn.Module):
    """FSRVL's loss (eq. 16), with mean absolute errors.

    ``alpha (|Y - Y^| + |X - X^|) + beta (|Y - Y~| + |X - X~|)``: the images as their own abundances
    and endmembers give them, and as the sensors would see the fused image.

    Args:
        alpha, beta: the paper's weights.

    Shape:
        ``lr_hsi`` ``Y``, ``lr_reconstructed`` ``Y^`` and ``lr_degraded`` ``Y~``: ``(B, G, h, w)``;
        ``hr_msi`` ``X``, ``hr_reconstructed`` ``X^`` and ``hr_degraded`` ``X~``:
        ``(B, g, H, W)``; the loss has no dimensions.

    Raises:
        ValueError: images of one sensor differ in shape; a weight is negative.

    >>> import torch
    >>> y, x = torch.rand(1, 31, 4, 4), torch.rand(1, 3, 16, 16)
    >>> FSRVLLoss()(y, y, y, x, x, x + 0.5).item()
    5.0
    """

    def __init__(self, alpha: float = 100.0, beta: float = 10.0) -> None:
        super().__init__()
        self.alpha, self.beta = checks.at_least("alpha", alpha, 0), checks.at_least("beta", beta, 0)

    def forward(
        self,
        lr_hsi: Tensor,
        lr_reconstructed: Tensor,
        lr_degraded: Tensor,
        hr_msi: Tensor,
        hr_reconstructed: Tensor,
        hr_degraded: Tensor,
    ) -> Tensor:
        checks.dense("lr_hsi", lr_hsi, dims=4)
        checks.dense("hr_msi", hr_msi, dims=4)
        checks.alike("hr_msi", hr_msi, "lr_hsi", lr_hsi)
        for name, image, like_name, like in (
            ("lr_reconstructed", lr_reconstructed, "lr_hsi", lr_hsi),
            ("lr_degraded", lr_degraded, "lr_hsi", lr_hsi),
            ("hr_reconstructed", hr_reconstructed, "hr_msi", hr_msi),
            ("hr_degraded", hr_degraded, "hr_msi", hr_msi),
        ):
            checks.dense(name, image)
            if image.shape != like.shape:
                raise ValueError(
                    f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, "
                    f"got {tuple(image.shape)}"
                )
            checks.alike(name, image, like_name, like)
        reconstruction = _mean_error(lr_hsi, lr_reconstructed) + _mean_error(
            hr_msi, hr_reconstructed
        )
        consistency = _mean_error(lr_hsi, lr_degraded) + _mean_error(hr_msi, hr_degraded)
        return self.alpha * reconstruction + self.beta * consistency

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}"


class RelativeLoss(nn.Module):
    """Mean square error, of each band in units of how large it was before: ``mean ((f - r)/e)^2``.

    Bands and scenes then weigh as in PSNR, which is a logarithm, however dark they are or however
    well they are known already; and within a scene its worst pixels weigh most, as in PSNR too.

    Shape:
        ``fused``, ``reference``: ``(B, G, H, W)``; ``error``, root mean squares above 0:
        ``(B, G, 1, 1)``; the loss has no dimensions.

    Raises:
        ValueError: the shapes are not as above.

    >>> import torch
    >>> reference = torch.zeros(1, 3, 4, 4)
    >>> RelativeLoss()(reference + 0.1, reference, torch.full((1, 3, 1, 1), 0.1)).item()
    1.0
    """

    def forward(self, fused: Tensor, reference: Tensor, error: Tensor) -> Tensor:
        checks.dense("reference", reference, dims=4)
        for name, cube, shape in (
            ("fused", fused, reference.shape),
            ("error", error, (*reference.shape[:2], 1, 1)),
        ):
            checks.dense(name, cube)
            if cube.shape != shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(shape)} for a reference "
                    f"{tuple(reference.shape)}, got {tuple(cube.shape)}"
                )
            checks.alike(name, cube, "reference", reference)
        return ((fused - reference) / error).square().mean()


def _mean_error(image: Tensor, estimate: Tensor) -> Tensor:
    return (image - estimate).abs().mean()
