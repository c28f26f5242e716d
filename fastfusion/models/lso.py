"""LSO: solving spatial-spectral fusion with latent spectral operators (ICML 2026)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfusion.models.base import ResidualModel
from fastfusion.nn.blocks import ResidualBlock, conv3x3, doubled
from fastfusion.nn.layers import LatentOperator2d
from fastfusion.ops import checks

LEVELS = 3


class LSO(ResidualModel):
    """Latent Spectral Operators: a pyramid of latent operators that corrects a prior image.

    A residual network turns both images into guide features; with a coordinate grid they enter a
    pyramid of three levels, each half as large, with one latent operator (see
    `fastfusion.ops.latent_operator`) a level; a decoder brings the levels together. This is the
    authors' published network: 1,942,679 parameters at 31 and 3 bands, 223 GFLOP for 256x256
    pixels. No parameter depends on ``scale``: setting it afterwards makes the same network fuse
    pairs of another scale.

    Args:
        hsi_bands, msi_bands, scale: see `FusionModel`.
        width: channels of the pyramid. tokens: of each head and patch. basis: terms of the
            solver's series. heads: of the attention. patch_size: of the latent operators.
        guide_width: channels of the guide network. guide_blocks: its residual blocks.
        prior: ``"bicubic"`` (the paper's skip connection) or ``"regression"``, see
            `ResidualModel`.

    Shape:
        ``lr_hsi (B, G, h, w)`` and ``hr_msi (B, g, H, W)``, ``H = scale*h``, in [0, 1], to
        ``(B, G, H, W)``, not clamped. Any size; where ``H`` or ``W`` is no multiple of 4 the
        images are padded inside.

    Raises:
        TypeError, ValueError: an argument is not as above.

    >>> model = LSO(31, 3, 4, width=16, guide_width=16, guide_blocks=1)
    >>> model(torch.rand(1, 31, 4, 4), torch.rand(1, 3, 16, 16)).shape
    torch.Size([1, 31, 16, 16])
    """

    def __init__(
        self,
        hsi_bands: int,
        msi_bands: int,
        scale: int,
        *,
        width: int = 64,
        tokens: int = 8,
        basis: int = 24,
        heads: int = 8,
        patch_size: int = 4,
        guide_width: int = 128,
        guide_blocks: int = 4,
        prior: str = "bicubic",
    ) -> None:
        super().__init__(hsi_bands, msi_bands, scale, prior=prior)
        checks.integer("width", width, low=1)
        checks.integer("guide_width", guide_width, low=1)
        checks.integer("guide_blocks", guide_blocks, low=0)
        checks.integer("patch_size", patch_size, low=1)
        self.width, self.tokens, self.basis, self.heads = width, tokens, basis, heads
        self.patch_size = patch_size
        self.guide_width, self.guide_blocks = guide_width, guide_blocks

        self.coordinates = Coordinates()
        self.guide = GuideNetwork(hsi_bands + msi_bands, guide_width, guide_blocks)
        self.operators = nn.ModuleList(
            LatentOperator2d(width, heads=heads, tokens=tokens, basis=basis, patch_size=patch_size)
            for _ in range(LEVELS)
        )
        self.encoders = nn.ModuleList(
            conv_pair(guide_width + 2 if level == 0 else width, width, width)
            for level in range(LEVELS)
        )
        joined = 2 * width + msi_bands
        self.decoders = nn.ModuleList(
            conv_pair(joined, joined // 2, width) for _ in range(LEVELS - 1)
        )
        last = nn.Conv2d(width, hsi_bands, 1)
        self.head = nn.Sequential(conv3x3(width, width), nn.LeakyReLU(0.2, inplace=True), last)
        self.start_from_prior(last)
        # A way around the pyramid: what is left of the closed form's errors is mostly fine detail,
        # which a few residual blocks learn in a fraction of the time.
        self.direct = conv3x3(guide_width, hsi_bands) if prior == "regression" else None
        if self.direct is not None:
            self.start_from_prior(self.direct)

    def correction(self, prior: Tensor, hr_msi: Tensor) -> Tensor:
        x = self.guide(torch.cat([hr_msi, prior], dim=1))
        direct = 0 if self.direct is None else self.direct(x)
        x1 = self.encoders[0](torch.cat([x, self.coordinates(x)], dim=1))
        del x  # twice as wide as what follows
        x2 = self.encoders[1](_halved(x1))
        x3 = self.encoders[2](_halved(x2))
        y1, y2, y3 = (operator(x) for operator, x in zip(self.operators, (x1, x2, x3), strict=True))
        coarse_msi = F.interpolate(hr_msi, size=x2.shape[-2:], mode="bicubic", align_corners=False)
        y = self.decoders[0](torch.cat([doubled(y3), y2, coarse_msi], dim=1)) + x2
        y = self.decoders[1](torch.cat([doubled(y), y1, hr_msi], dim=1)) + x1
        return self.head(y) + direct

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        scale: int,
        *,
        patch_size: int = 4,
        prior: str = "bicubic",
    ) -> LSO:
        """The model with the weights that the paper's authors published.

        Bands and widths are read from the shapes; scale and patch size do not show in them. The
        authors' dead mean shift (``sub_mean``, ``add_mean``) is left out.

        Args:
            state_dict: of the authors' network, names as they are.
            scale: of the images that it was trained on.
            patch_size: of its latent operators (theirs is 4).
            prior: see `LSO`.

        Raises:
            TypeError: ``state_dict`` is no mapping from names to tensors.
            ValueError: a weight is missing, unknown or of a wrong shape.

        >>> official = {"spatial_encoder.head.0.weight": torch.zeros(128, 34, 3, 3)}
        >>> LSO.from_official(official, scale=4)
        Traceback (most recent call last):
        ...
        ValueError: state_dict lacks process1.weights: it is not the authors' LSO
        """
        if not isinstance(state_dict, Mapping) or not all(
            isinstance(value, Tensor) for value in state_dict.values()
        ):
            raise TypeError("state_dict must be a mapping from names to tensors")
        live = {
            name: value
            for name, value in state_dict.items()
            if not name.startswith(("spatial_encoder.sub_mean.", "spatial_encoder.add_mean."))
        }
        model = cls(**_official_options(live), scale=scale, patch_size=patch_size, prior=prior)
        model.load_state_dict({**model.state_dict(), **_from_official(live, model)})
        return model


class GuideNetwork(nn.Module):
    """EDSR without its upsampler: features of both images at full resolution."""

    def __init__(self, in_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.head = conv3x3(in_channels, width)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.tail = conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(self.body(x)) + x


def conv_pair(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    """(3x3 convolution, LeakyReLU 0.2) twice."""
    return nn.Sequential(
        conv3x3(in_channels, middle),
        nn.LeakyReLU(0.2, inplace=True),
        conv3x3(middle, out_channels),
        nn.LeakyReLU(0.2, inplace=True),
    )


class Coordinates(nn.Module):
    """Row and column of each pixel in [0, 1], ends included: ``(B, 2, H, W)`` for ``(B, C, H, W)``.

    A module, so that a hook can tell a tile where in its scene it lies: see `fastfusion.tiling`.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, _, rows, columns = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 counts to 256 only
        # Not linspace, which fixes the size of an exported graph; there are at least 4 of each.
        down = torch.arange(rows, dtype=wide, device=x.device) / (rows - 1)
        across = torch.arange(columns, dtype=wide, device=x.device) / (columns - 1)
        grid = torch.stack([down[:, None].expand(rows, columns), across.expand(rows, columns)])
        return grid.to(x.dtype).expand(batch, -1, -1, -1)


def _halved(x: Tensor) -> Tensor:
    # Bilinear by 0.5 with align_corners=False and no antialiasing is the mean of 2x2 pixels.
    return F.avg_pool2d(x, 2)


# -- the authors' names ------------------------------------------------------------------------


def _official_options(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Bands and widths of the authors' network, from the shapes of its weights."""

    def shape(name: str, dims: int) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"state_dict lacks {name}: it is not the authors' LSO")
        if state_dict[name].dim() != dims:
            raise ValueError(
                f"{name} must have {dims} dimensions, got {tuple(state_dict[name].shape)}"
            )
        return state_dict[name].shape

    width, terms = shape("process1.weights", 2)
    heads, tokens, _ = shape("process1.latent", 3)
    guide_width, bands = shape("spatial_encoder.head.0.weight", 4)[:2]
    hsi_bands = shape("outc.conv.2.weight", 4)[0]
    blocks = {
        found[1]
        for name in state_dict
        if (found := re.match(r"spatial_encoder\.body\.(\d+)\.body\.", name))
    }
    return {
        "hsi_bands": hsi_bands,
        "msi_bands": bands - hsi_bands,
        "width": width,
        "tokens": tokens,
        "basis": terms // 2,
        "heads": heads,
        "guide_width": guide_width,
        "guide_blocks": len(blocks),
    }


def _official_names(model: LSO) -> dict[str, str]:
    """The authors' name of each of our convolutions' weights and biases."""
    theirs = {
        "guide.head": "spatial_encoder.head.0",
        "guide.tail": f"spatial_encoder.body.{model.guide_blocks}",
        "head.0": "outc.conv.0",
        "head.2": "outc.conv.2",
    }
    for part in (0, 2):
        for block in range(model.guide_blocks):
            theirs[f"guide.body.{block}.body.{part}"] = f"spatial_encoder.body.{block}.body.{part}"
        theirs[f"encoders.0.{part}"] = f"inc.double_conv.{part}"
        for level in range(1, LEVELS):
            theirs[f"encoders.{level}.{part}"] = f"down{level}.down.1.double_conv.{part}"
            theirs[f"decoders.{level - 1}.{part}"] = f"up{level}.conv.double_conv.{part}"
    return {
        f"{ours}.{kind}": f"{name}.{kind}"
        for ours, name in theirs.items()
        for kind in ("weight", "bias")
    }


def _from_official(state_dict: Mapping[str, Tensor], model: LSO) -> dict[str, Tensor]:
    """Our state_dict from the authors'."""
    left = dict(state_dict)

    def take(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        if name not in left:
            raise ValueError(f"state_dict lacks {name}")
        value = left.pop(name)
        # A 1x1 convolution and a linear layer are the same map.
        if value.shape != tuple(shape) and value.shape != (*shape, 1, 1):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        return value.detach().reshape(tuple(shape))

    expected = model.state_dict()
    found = {
        ours: take(theirs, expected[ours].shape) for ours, theirs in _official_names(model).items()
    }
    width, basis = model.width, model.basis
    for level in range(LEVELS):
        ours, theirs = f"operators.{level}", f"process{level + 1}"
        found[f"{ours}.prompts"] = take(f"{theirs}.latent", expected[f"{ours}.prompts"].shape)
        series = take(f"{theirs}.weights", (width, 2 * basis))
        found[f"{ours}.sine"], found[f"{ours}.cosine"] = series.split(basis, dim=1)
        for kind, shape in (("weight", (width,)), ("bias", ())):
            # They view the encoder's output as (head, d, 2): keys and values take turns.
            pairs = take(f"{theirs}.encoder_attn.{kind}", (2 * width, *shape))
            pairs = pairs.unflatten(0, (width, 2))
            found[f"{ours}.key_{kind}"], found[f"{ours}.value_{kind}"] = pairs.unbind(1)
            found[f"{ours}.query_{kind}"] = take(f"{theirs}.decoder_attn.{kind}", (width, *shape))
        _check_modes(f"{theirs}.modes_list", left.pop(f"{theirs}.modes_list", None), basis)
    if left:
        raise ValueError(f"state_dict has unknown weights: {', '.join(sorted(left))}")
    return found


def _check_modes(name: str, modes: Tensor | None, basis: int) -> None:
    """Their list of frequencies, a constant, must be 1 to Q times the fundamental."""
    if modes is None:
        return
    expected = torch.arange(1, basis + 1, dtype=torch.float64)
    got = modes.detach().double().flatten().cpu()
    if got.shape != expected.shape or not torch.allclose(got / got[0], expected):
        raise ValueError(f"{name} must be multiples 1 to {basis} of one frequency, got {got}")
