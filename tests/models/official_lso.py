"""LSO written down a second time, from the description of the authors' network and with its names.

Plain modules, whole sine and cosine tensors, einsum attention: slow, independent of the library.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class OfficialLSO(nn.Module):
    def __init__(self, hsi, msi, scale, width=64, tokens=8, basis=24, heads=8, guide=128, blocks=4):
        super().__init__()
        self.scale = scale
        self.spatial_encoder = Encoder(hsi + msi, guide, blocks)
        self.inc = Pair(guide + 2, width, width)
        self.down1, self.down2 = Down(width), Down(width)
        self.process1, self.process2, self.process3 = (
            Process(width, tokens, basis, heads) for _ in range(3)
        )
        self.up1, self.up2 = Up(width, msi), Up(width, msi)
        self.outc = Out(width, hsi)

    def forward(self, lr_hsi, msi):
        lms = F.interpolate(lr_hsi, scale_factor=self.scale, mode="bicubic", align_corners=False)
        x = self.spatial_encoder(torch.cat([msi, lms], 1))
        lines = [torch.linspace(0, 1, n, dtype=x.dtype) for n in x.shape[-2:]]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"))[None].repeat(len(x), 1, 1, 1)
        x1 = self.inc(torch.cat([x, grid], 1))
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        half = F.interpolate(msi, scale_factor=0.5, mode="bicubic", align_corners=False)
        y = self.up1(self.process3(x3), self.process2(x2), half) + x2
        y = self.up2(y, self.process1(x1), msi) + x1
        return lms + self.outc(y)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        conv = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.body = nn.Sequential(conv[0], nn.ReLU(), conv[1])

    def forward(self, x):
        return x + self.body(x)


class Encoder(nn.Module):
    def __init__(self, bands, width, blocks):
        super().__init__()
        self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)  # dead
        self.head = nn.Sequential(nn.Conv2d(bands, width, 3, padding=1))
        body = [Residual(width) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        x = self.head(x)
        return self.body(x) + x


class Pair(nn.Module):
    def __init__(self, bands, middle, out):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(bands, middle, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(middle, out, 3, padding=1),
            nn.LeakyReLU(0.2),
        )

    def forward(self, x):
        return self.double_conv(x)


class Half(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down = nn.Sequential(Half(), Pair(width, width, width))

    def forward(self, x):
        return self.down(x)


class Up(nn.Module):
    def __init__(self, width, msi):
        super().__init__()
        self.conv = Pair(2 * width + msi, (2 * width + msi) // 2, width)

    def forward(self, x, skip, msi):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv(torch.cat([x, skip, msi], 1))


class Out(nn.Module):
    def __init__(self, width, hsi):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, hsi, 1)
        )

    def forward(self, x):
        return self.conv(x)


class Process(nn.Module):
    """One latent operator on 4x4 patches."""

    def __init__(self, width, tokens, basis, heads, patch=4):
        super().__init__()
        self.heads, self.patch = heads, patch
        self.weights = nn.Parameter(torch.rand(width, 2 * basis) / width)
        self.latent = nn.Parameter(torch.rand(heads, tokens, width // heads) / width)
        self.modes_list = nn.Parameter(torch.arange(1.0, basis + 1), requires_grad=False)
        self.encoder_attn = nn.Conv2d(width, 2 * width, 1)
        self.decoder_attn = nn.Conv2d(width, width, 1)

    def forward(self, x):
        batch, channels, rows, columns = x.shape
        p, heads, d = self.patch, self.heads, channels // self.heads
        x = x.view(batch, channels, rows // p, p, columns // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, p, p)
        n, pixels = x.shape[0], p * p
        # To the tokens.
        both = self.encoder_attn(x).view(n, 2 * channels, pixels).permute(0, 2, 1)
        keys, values = both.reshape(n, pixels, heads, d, 2).permute(4, 0, 2, 1, 3)
        tokens = self.latent[None].repeat(n, 1, 1, 1)
        tokens = attend(tokens, keys, values) + tokens
        # The solver.
        z = torch.sigmoid(tokens.permute(0, 1, 3, 2).reshape(n, channels, -1)) * math.pi
        phase = self.modes_list * z[..., None] * math.pi
        sine, cosine = self.weights.chunk(2, dim=-1)
        z = (
            z
            + torch.einsum("bctq,cq->bct", phase.sin(), sine)
            + torch.einsum("bctq,cq->bct", phase.cos(), cosine)
        )
        # And back.
        tokens = z.view(n, heads, d, -1).permute(0, 1, 3, 2)
        queries = self.decoder_attn(x).view(n, heads, d, pixels).permute(0, 1, 3, 2)
        y = attend(queries, tokens, tokens).permute(0, 1, 3, 2).reshape(x.shape) + x
        y = y.view(batch, rows // p, columns // p, channels, p, p)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows, columns)


def attend(queries, keys, values):
    scores = torch.einsum("nhqd,nhkd->nhqk", queries, keys) / math.sqrt(queries.shape[-1])
    return torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), values)
