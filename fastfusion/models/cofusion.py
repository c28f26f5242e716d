"""CoFusion: fusion by spectral coordinate attention (arXiv:2604.10584)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastfusion.models.base import ResidualModel
from fastfusion.nn.blocks import ResidualBlock, conv3x3, doubled
from fastfusion.nn.cofusion import SSCFM, MultiScaleGenerator, SpaCAM, SpeCAM
from fastfusion.ops import checks

SCALES = 3


class CoFusion(ResidualModel):
    """A three-level pyramid with a spatial and a spectral branch at each scale, cross-fused.

    The paper gives the blocks, the width and the number of parameters (4.91 M at 103 and 4 bands;
    4.86 M here), but not how many blocks there are. ``depths`` and the expansions of the blocks
    are chosen so that the three modules weigh what its ablation says (1.33, 0.76 and 0.29 M more
    than the residual block that replaces each at each scale); there are fewer blocks at the
    finer scales, where each costs most.

    Args:
        hsi_bands, msi_bands, scale: see `FusionModel`.
        width: ``D``, a multiple of 4.
        depths: blocks at each of the three scales, finest first: so many SpaCAM, SpeCAM, and
            residual blocks in the generator's encoders.
        spatial: ``"spacam"``, or ``"residual"``: a residual block instead (the paper's ablation).
        spectral: ``"specam"`` or ``"residual"``.
        cross: ``"sscfm"`` or ``"residual"``.
        prior: ``"bicubic"`` (the paper's) or ``"regression"``, see `ResidualModel`.

    Shape:
        ``lr_hsi (B, G, h, w)`` and ``hr_msi (B, g, H, W)``, ``H = scale*h``, in [0, 1], to
        ``(B, G, H, W)``, not clamped. Any size; where ``H`` or ``W`` is no multiple of 4 the
        images are padded inside.

    Raises:
        TypeError, ValueError: an argument is not as above.

    >>> model = CoFusion(31, 3, 4, width=8, depths=(1, 1, 1))
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
        depths: Sequence[int] = (3, 5, 7),
        spatial: str = "spacam",
        spectral: str = "specam",
        cross: str = "sscfm",
        prior: str = "bicubic",
    ) -> None:
        super().__init__(hsi_bands, msi_bands, scale, prior=prior)
        checks.integer("width", width, low=4)
        if not isinstance(depths, (tuple, list)):
            raise TypeError(f"depths must be {SCALES} ints, got {type(depths).__name__}")
        if len(depths) != SCALES:
            raise ValueError(f"depths must be {SCALES} ints, got {len(depths)}")
        for depth in depths:
            checks.integer("depths", depth, low=1)
        checks.choice("spatial", spatial, ("spacam", "residual"))
        checks.choice("spectral", spectral, ("specam", "residual"))
        checks.choice("cross", cross, ("sscfm", "residual"))
        self.width, self.depths = width, tuple(depths)
        self.spatial, self.spectral, self.cross = spatial, spectral, cross

        self.generator = MultiScaleGenerator(hsi_bands + msi_bands, width, depths)
        self.scales = nn.ModuleList(
            Scale(width, depth, spatial, spectral, cross) for depth in depths
        )
        self.aggregate = nn.ModuleList(conv3x3(width, width) for _ in range(SCALES - 1))
        self.head = conv3x3(width, hsi_bands)
        self.start_from_prior(self.head)

    def correction(self, prior: Tensor, hr_msi: Tensor) -> Tensor:
        local, proxies = self.generator(torch.cat([prior, hr_msi], dim=1))
        # From coarse to fine; each pair is let go as soon as it is used.
        y = self.scales[-1](local.pop(), proxies.pop())
        for scale, aggregate in zip(self.scales[-2::-1], self.aggregate, strict=True):
            y = scale(local.pop(), proxies.pop()) + aggregate(doubled(y))
        return self.head(y)


class Scale(nn.Module):
    """Both branches at one scale, cross-fused and merged: two of ``(B, D, H, W)`` to one."""

    def __init__(self, width: int, depth: int, spatial: str, spectral: str, cross: str) -> None:
        super().__init__()
        self.spatial = (
            nn.Sequential(*(SpaCAM(width) for _ in range(depth)))
            if spatial == "spacam"
            else ResidualBlock(width)
        )
        self.spectral = (
            nn.Sequential(*(SpeCAM(width) for _ in range(depth)))
            if spectral == "specam"
            else ResidualBlock(width)
        )
        self.cross = SSCFM(width) if cross == "sscfm" else None
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.refine = ResidualBlock(width) if cross == "residual" else nn.Identity()

    def forward(self, local: Tensor, proxy: Tensor) -> Tensor:
        spatial, spectral = self.spatial(local), self.spectral(proxy)
        if self.cross is not None:
            spatial, spectral = self.cross(spatial, spectral)
        return self.refine(self.merge(torch.cat([spatial, spectral], dim=1)))
