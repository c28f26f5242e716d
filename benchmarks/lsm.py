"""The latent spectral model (Wu et al., ICML 2023), a U-Net whose skips pass through its blocks.

Written after the paper, with the names of its authors' code, by which `fastfusion.accelerate`
takes a block for one of theirs. With ``squash`` the block is LSO's (Li et al., ICML 2026).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralBlock(nn.Module):
    """Latent tokens attend to a patch, a trigonometric series acts on them, and they are read."""

    def __init__(
        self,
        width: int = 16,
        basis: int = 6,
        patch: tuple[int, int] = (4, 4),
        tokens: int = 3,
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.squash, self.head = patch, squash, 8
        modes = torch.arange(1, basis + 1.0) if squash else torch.arange(basis) / basis
        self.modes_list = modes
        self.weights = nn.Parameter(torch.rand(width, 2 * basis) / width)
        self.latent = nn.Parameter(torch.rand(8, tokens, width // 8) / width)
        self.encoder_attn = nn.Conv2d(width, 2 * width, 1)
        self.decoder_attn = nn.Conv2d(width, width, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhlc,bhsc->bhls", q, k)
        if self.squash:
            scores = scores / math.sqrt(q.shape[-1])
        return torch.einsum("bhls,bhsc->bhlc", scores.softmax(-1), v)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        (ph, pw), d = self.patch_size, c // self.head
        x = x.view(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1, c, ph, pw)
        n, length = len(x), ph * pw
        kv = self.encoder_attn(x).view(n, 2 * c, -1).permute(0, 2, 1)
        kv = kv.reshape(n, length, self.head, d, 2).permute(4, 0, 2, 1, 3)
        tokens = self.latent[None].expand(n, -1, -1, -1)
        z = self.attend(tokens, kv[0], kv[1]) + tokens
        z = z.permute(0, 1, 3, 2).reshape(n, c, -1)
        if self.squash:
            z = math.pi * z.sigmoid()
        phase = self.modes_list * z[..., None] * math.pi
        basis = torch.cat([phase.sin(), phase.cos()], dim=-1)
        z = torch.einsum("bilm,im->bil", basis, self.weights) + z
        z = z.view(n, self.head, d, -1).permute(0, 1, 3, 2)
        q = self.decoder_attn(x).view(n, c, -1).permute(0, 2, 1)
        q = q.reshape(n, length, self.head, d).permute(0, 2, 1, 3)
        y = self.attend(q, z, z).permute(0, 1, 3, 2).reshape(n, c, ph, pw) + x
        y = y.view(b, h // ph, w // pw, c, ph, pw).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(b, c, h, w)


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class LSM(nn.Module):
    """``(B, channels, H, W) -> (B, 1, H, W)``; sides are multiples of ``patch * 2**(scales - 1)``.

    By default as in the paper's Darcy experiments: five scales, 64 channels, 4 tokens, 12 terms.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        scales: int = 5,
        patch: int = 4,
        tokens: int = 4,
        basis: int = 12,
    ) -> None:
        super().__init__()
        # The coarsest scale is no wider than the one before it, since it is enlarged bilinearly.
        widths = [width * 2 ** min(i, scales - 2) for i in range(scales)]
        self.lift = nn.Conv2d(channels + 2, width, 1)
        self.first = _two_convolutions(width, width)
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(_two_convolutions(a, b) for a, b in pairs)
        self.process = nn.ModuleList(
            SpectralBlock(w, basis, (patch, patch), tokens) for w in widths
        )
        self.up = nn.ModuleList(_two_convolutions(a + b, a) for a, b in pairs)
        self.head = nn.Sequential(nn.Conv2d(width, 128, 1), nn.GELU(), nn.Conv2d(128, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.linspace(0, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1)
        columns = torch.linspace(0, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w)
        x = torch.cat([x, rows.expand(b, 1, h, w), columns.expand(b, 1, h, w)], dim=1)
        levels = [self.first(self.lift(x))]
        for layer in self.down:
            levels.append(layer(F.max_pool2d(levels[-1], 2)))
        y = self.process[-1](levels[-1])
        for i in reversed(range(len(self.up))):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            y = self.up[i](torch.cat([self.process[i](levels[i]), y], dim=1))
        return self.head(y)
