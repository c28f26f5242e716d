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


class SpectrumNorm(nn.Module):
    """The batch norm of a spectrum's real and imaginary part; its tensors are the subclass's."""

    running_mean: Tensor
    running_var: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    momentum: float

    def _normalize(self, response: Tensor, part: int) -> Tensor:
        """One part in training, which moves the running statistics."""
        return F.batch_norm(
            response,
            self.running_mean[part],
            self.running_var[part],
            self.norm_weight[part],
            self.norm_bias[part],
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )

    def _evaluation_form(self) -> tuple[Tensor, Tensor]:
        """Gain and bias of both parts, ``(2, D)`` each."""
        gain = self.norm_weight * (self.running_var + self.eps).rsqrt()
        return gain, self.norm_bias - self.running_mean * gain


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
