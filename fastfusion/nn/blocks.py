"""Small blocks that more than one model is built of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(in_channels: int, out_channels: int, **kind: Any) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **kind)


def doubled(x: Tensor) -> Tensor:
    """Twice the rows and columns, bilinear."""
    size = 2 * x.shape[-2], 2 * x.shape[-1]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def redraw(module: nn.Module) -> None:
    """Draw the parameters of everything inside a block afresh."""
    for child in module.children():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()  # type: ignore[operator]
        else:
            redraw(child)


class ResidualBlock(nn.Module):
    """``x + conv(relu(conv(x)))``, both 3x3, no norm (EDSR's block).

    Shape: ``(B, C, H, W)`` to the same.
    """

    def __init__(self, channels: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.body = nn.Sequential(
            conv3x3(channels, channels, **kind),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels, **kind),
        )

    def reset_parameters(self) -> None:
        """Draw the parameters afresh."""
        redraw(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
