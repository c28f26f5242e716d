"""The definition of LSO's latent operator in plain PyTorch, step by step.

The image is cut into ``P`` patches of ``L = ph*pw`` pixels (row by row, padded with zeros at the
bottom and right). Shapes: ``B`` batch, ``P`` patches, ``h`` heads, ``L`` pixels of a patch,
``T`` tokens, ``d`` channels of a head, ``C = h*d``, channel ``head*d + j``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfusion.ops.precision import wide


def _patches(x: Tensor, ph: int, pw: int) -> Tensor:
    """Pad with zeros to whole patches and cut: (B, C, H, W) to (B, P, L, C)."""
    batch, channels, rows, columns = x.shape
    x = F.pad(x, (0, -columns % pw, 0, -rows % ph))
    down, across = x.shape[2] // ph, x.shape[3] // pw
    x = x.reshape(batch, channels, down, ph, across, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, down * across, ph * pw, channels)


def _image(patches: Tensor, ph: int, pw: int, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`_patches`, cropped to the image."""
    batch, _, _, channels = patches.shape
    down, across = -(-rows // ph), -(-columns // pw)
    x = patches.reshape(batch, down, across, ph, pw, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, down * ph, across * pw)[:, :, :rows, :columns]


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, P, N, C) to (B, P, h, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


def _joined(x: Tensor) -> Tensor:
    """(B, P, h, N, d) to (B, P, N, C)."""
    return x.transpose(2, 3).flatten(-2)


def latent_encode(
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    patch_rows: int,
    patch_columns: int,
) -> Tensor:
    """See :func:`fastfusion.ops.latent_encode`."""
    heads, _, width = prompts.shape
    prompt = wide(prompts)
    pixels = _patches(wide(x), patch_rows, patch_columns)
    keys = _heads(F.linear(pixels, wide(key_weight), wide(key_bias)), heads)
    values = _heads(F.linear(pixels, wide(value_weight), wide(value_bias)), heads)
    scores = prompt @ keys.transpose(-2, -1) / math.sqrt(width)  # (B, P, h, T, L)
    attention = scores.softmax(dim=-1)
    return _joined(attention @ values + prompt).to(x.dtype)


def trigonometric_solve(
    latents: Tensor,
    sine: Tensor,
    cosine: Tensor,
    offset: Tensor | None,
    fundamental: float,
    squash: bool,
) -> Tensor:
    """See :func:`fastfusion.ops.trigonometric_solve`."""
    z = wide(latents)
    if squash:
        z = math.pi * torch.sigmoid(z)
    sine, cosine = wide(sine), wide(cosine)
    solved = z if offset is None else z + wide(offset)
    for q in range(1, sine.shape[1] + 1):
        phase = q * fundamental * z
        solved = solved + sine[:, q - 1] * phase.sin() + cosine[:, q - 1] * phase.cos()
    return solved.to(latents.dtype)


def latent_decode(
    x: Tensor,
    latents: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    heads: int,
    patch_rows: int,
    patch_columns: int,
) -> Tensor:
    """See :func:`fastfusion.ops.latent_decode`; the number of heads is given."""
    rows, columns = x.shape[-2:]
    pixels = _patches(wide(x), patch_rows, patch_columns)
    queries = _heads(F.linear(pixels, wide(query_weight), wide(query_bias)), heads)
    tokens = _heads(wide(latents), heads)
    width = tokens.shape[-1]
    attention = (queries @ tokens.transpose(-2, -1) / math.sqrt(width)).softmax(dim=-1)
    y = _joined(attention @ tokens) + pixels
    return _image(y, patch_rows, patch_columns, rows, columns).to(x.dtype)


def latent_operator(
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    sine: Tensor,
    cosine: Tensor,
    offset: Tensor | None,
    patch_rows: int,
    patch_columns: int,
    fundamental: float,
    squash: bool,
) -> Tensor:
    """See :func:`fastfusion.ops.latent_operator`: exactly decode(solve(encode))."""
    dtype = x.dtype
    x = wide(x)  # so that nothing is rounded between the steps
    latents = latent_encode(
        x,
        wide(prompts),
        wide(key_weight),
        wide(key_bias),
        wide(value_weight),
        wide(value_bias),
        patch_rows,
        patch_columns,
    )
    latents = trigonometric_solve(
        latents, wide(sine), wide(cosine), wide(offset), fundamental, squash
    )
    heads = prompts.shape[0]
    y = latent_decode(
        x, latents, wide(query_weight), wide(query_bias), heads, patch_rows, patch_columns
    )
    return y.to(dtype)
