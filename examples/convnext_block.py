"""A ConvNeXt block, written in plain PyTorch, accelerated in one line.

Prints what was swapped, by how much the outputs differ, and how many times faster the block runs
here. Then the same for a block with a wide, dilated filter, where PyTorch has no fast kernel.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import fastfusion


class Block(nn.Module):
    """Liu et al., CVPR 2022: 7x7 depthwise, norm, four times wider and back, scaled residual."""

    def __init__(self, width: int, kernel: int = 7, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.dwconv = nn.Conv2d(
            width, width, kernel, padding=padding, dilation=dilation, groups=width
        )
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


def main() -> None:
    """Accelerate both blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=56, help="rows and columns of the image")
    parser.add_argument("--width", type=int, default=96)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(4, options.width, options.size, options.size)
    x = x.contiguous(memory_format=torch.channels_last)
    for title, settings in {
        "7x7": {},
        "13x13, dilated by 2": {"kernel": 13, "dilation": 2},
    }.items():
        model = nn.Sequential(*(Block(options.width, **settings) for _ in range(2))).eval()
        plain = copy.deepcopy(model)
        report = fastfusion.accelerate(model, example=x)
        with torch.inference_mode():
            truth, y = plain(x), model(x)
        error = float((y - truth).norm() / truth.norm())
        print(f"Two blocks, {title}: {tuple(x.shape)}, {torch.get_num_threads()} threads")
        print(report)
        print(f"  outputs differ by {error:.1e} (relative L2)\n")


if __name__ == "__main__":
    main()
