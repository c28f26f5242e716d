"""A closed form that fuses one pair without any training.

An MSI pixel ``m`` tells an HSI pixel by a linear map that changes slowly over the scene.  At the
low resolution, where both are seen, that map is fitted: one for the whole scene, then, on what
remains, one for each low-resolution pixel from the Gaussian window around it (a guided filter with
``g`` guides and ``G`` targets).  Interpolated to full resolution it is applied to the sharp MSI.

Bands of one scene are not equally sharp (lenses do not focus all wavelengths alike).  How much
sharper or blurrier than the MSI a band is shows in the pair and is carried over: band ``b`` is
predicted from ``m + sharpness[b] * (blur(m) - m)``.  The maps are fitted once more to what that
leaves, and then above all to the finest detail that the HSI holds, what a pixel differs by from its
neighbours: it is the nearest to the detail that is wanted, and what a map leaves of it is hardly
correlated from pixel to pixel, as least squares take it to be.

At last the prediction is brought back to both sensors: the part of the HSI that it does not explain
is interpolated and added, and the spectra are moved, as little as possible, to give the MSI.

Only the maps of the whole scene (`RegressionModel.weights`, `RegressionModel.sharpness`) depend on
far-away pixels; everything else looks a few low-resolution pixels around, so that tiles with a
margin agree with the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastfusion.data.estimation import estimate_sensors, pair_moments
from fastfusion.data.sensors import Degradation, apply_srf, fold
from fastfusion.ops import checks
from fastfusion.ops.local_map import local_map

__all__ = ["Regression", "RegressionModel", "regression"]

#: Blur, in low-resolution pixels, whose presence in a band `RegressionModel.sharpness` measures:
#: half the width of the authors' PSF, the widest that still tells bands apart at every scale.
SHARPNESS_SIGMA = 0.25
#: Window variances below this share of the scene's are noise, not colour to regress on.
NOISE_FLOOR = 1e-6
#: Weight of the detail's covariances in the last windows, beside the ordinary ones.
FINE = 10.0
#: Mean of the four pixels beside one.
NEIGHBOURS = torch.tensor([[0, 0.25, 0], [0.25, 0, 0.25], [0, 0.25, 0]], dtype=torch.float64)
#: HSI bands that go through the windows and the interpolation at a time, which bounds memory.
BANDS_AT_A_TIME = 8


@torch.no_grad()
def regression(
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor | None = None,
    psf: Tensor | Degradation | None = None,
    local: bool = True,
    ridge: float = 1e-4,
    iterations: int = 4,
    window_sigma: float | None = None,
    clamp: bool = True,
) -> Tensor:
    """Fuse one pair, or each pair of a batch, in closed form.

    Args:
        lr_hsi: ``(G, h, w)`` or ``(B, G, h, w)``, floating point.
        hr_msi: ``(g, H, W)`` or ``(B, g, H, W)`` with ``H == scale*h``, ``W == scale*w``.
        srf: ``(g, G)`` spectral response of the MSI; estimated where None.
        psf: the HSI's `Degradation`; or its kernel alone, taken as weights of blocks if it is
            ``scale`` x ``scale`` and as LSO's convention (offset 0, circular) otherwise; estimated
            where None.
        local: fit a map for every low-resolution pixel, and the bands' sharpness, not only one map
            for the whole scene.
        ridge: of the windows' regressions, as a share of the trace of the guides' covariance.
        iterations: how often the unexplained part of the HSI is interpolated and added.
        window_sigma: of the Gaussian windows, in low-resolution pixels; None for windows that hold
            about twice as many pixels as a map has coefficients.
        clamp: clip the result to [0, 1].

    Returns:
        ``(G, H, W)`` or ``(B, G, H, W)``, the dtype of ``lr_hsi``.

    Raises:
        TypeError, ValueError: where an argument is not as said above, or not finite.

    >>> regression(torch.rand(31, 8, 8), torch.rand(3, 32, 32)).shape
    torch.Size([31, 32, 32])
    """
    check_pair(lr_hsi, hr_msi)
    checks.flag("clamp", clamp)
    work = torch.promote_types(torch.promote_types(lr_hsi.dtype, hr_msi.dtype), torch.float32)
    fused = lr_hsi.new_empty(*lr_hsi.shape[:-2], *hr_msi.shape[-2:])
    batch = lr_hsi.shape[0] if lr_hsi.ndim == 4 else 1
    for i in range(batch):
        one_hsi, one_msi, out = (
            cube[i] if cube.ndim == 4 else cube for cube in (lr_hsi, hr_msi, fused)
        )
        one_hsi, one_msi = one_hsi.to(work), one_msi.to(work)
        model = RegressionModel.fit(
            one_hsi,
            one_msi,
            srf=srf,
            psf=psf,
            local=local,
            ridge=ridge,
            iterations=iterations,
            window_sigma=window_sigma,
        )
        out.copy_(model.apply(one_hsi, one_msi))
    return fused.clamp_(0, 1) if clamp else fused


class Regression(nn.Module):
    """`regression` as a module without parameters, to stand beside other models.

    Options are those of `regression`.

    >>> Regression(local=False)(torch.rand(1, 31, 8, 8), torch.rand(1, 3, 32, 32)).shape
    torch.Size([1, 31, 32, 32])
    """

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
        return regression(lr_hsi, hr_msi, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def check_pair(lr_hsi: Tensor, hr_msi: Tensor) -> int:
    """The scale of a pair, or what is wrong with it."""
    for name, cube in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        if not isinstance(cube, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(cube).__name__}")
        if not cube.is_floating_point():
            raise ValueError(f"{name}: expected floating point, got {cube.dtype}")
        checks.dense(name, cube)
        if cube.ndim not in (3, 4) or 0 in cube.shape[-3:]:
            raise ValueError(
                f"{name}: expected (bands, height, width) or (batch, bands, height, width), "
                f"got shape {tuple(cube.shape)}"
            )
    if lr_hsi.shape[:-3] != hr_msi.shape[:-3]:
        raise ValueError(
            f"lr_hsi, hr_msi: expected the same batch, "
            f"got {tuple(lr_hsi.shape)} and {tuple(hr_msi.shape)}"
        )
    if lr_hsi.device != hr_msi.device or lr_hsi.device.type == "meta":
        raise ValueError(
            f"lr_hsi, hr_msi: expected one device that holds values, "
            f"got {lr_hsi.device} and {hr_msi.device}"
        )
    (low_h, low_w), (height, width) = lr_hsi.shape[-2:], hr_msi.shape[-2:]
    if low_h > height and low_w > width:
        raise ValueError(
            f"lr_hsi, hr_msi: they look swapped: lr_hsi has {lr_hsi.shape[-3]} bands of {low_h} x "
            f"{low_w} pixels, hr_msi {hr_msi.shape[-3]} bands of {height} x {width}"
        )
    if height % low_h or width % low_w or height // low_h != width // low_w:
        raise ValueError(
            f"hr_msi: expected a height and width that are one whole multiple of lr_hsi's "
            f"{low_h} x {low_w}, got {height} x {width}"
        )
    for name, cube in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        if not torch.isfinite(cube).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return height // low_h


@dataclass(frozen=True, eq=False)
class RegressionModel:
    """What one scene taught: the sensors, one map for all of it and the sharpness of its bands.

    `fit` looks at a whole scene; `apply` at the scene or, with a margin of `halo` low-resolution
    pixels, at any tile of it.
    """

    degradation: Degradation
    srf: Tensor  #: ``(g, G)``
    weights: Tensor  #: ``(G, 1 + g)``, float64: offset and slopes of the scene's one map
    sharpness: Tensor  #: ``(G,)``, 0 for a band as sharp as the MSI, towards 1 for a blurred one
    local: bool
    ridge: float
    back: Tensor  #: ``(G, g)``, float64: how a spectrum is moved by what its MSI pixel misses
    floor: float  #: variance of the guides below which there is only noise
    iterations: int
    window_sigma: float

    @classmethod
    def fit(
        cls,
        lr_hsi: Tensor,
        hr_msi: Tensor,
        *,
        srf: Tensor | None = None,
        psf: Tensor | Degradation | None = None,
        local: bool = True,
        ridge: float = 1e-4,
        iterations: int = 4,
        window_sigma: float | None = None,
    ) -> RegressionModel:
        """Arguments and errors as in `regression`; one pair, without a batch."""
        scale = check_pair(lr_hsi, hr_msi)
        hsi_bands, msi_bands = len(lr_hsi), len(hr_msi)
        if lr_hsi.dtype != hr_msi.dtype:
            raise ValueError(
                f"hr_msi: expected the dtype of lr_hsi, {lr_hsi.dtype}, got {hr_msi.dtype}"
            )
        if srf is not None:
            checks.response("srf", srf, (msi_bands, hsi_bands))
        _check_options(local, ridge, iterations, window_sigma)
        degradation = as_degradation(psf, scale)
        if srf is None or degradation is None:
            degradation, srf = estimate_sensors(
                lr_hsi, hr_msi, scale, degradation=degradation, srf=srf
            )

        model = cls.from_moments(
            pair_moments(lr_hsi, degradation(hr_msi.double())),
            degradation,
            srf,
            local=local,
            ridge=ridge,
            iterations=iterations,
            window_sigma=window_sigma,
        )
        return model.with_sharpness(model.sharpness_moments(lr_hsi, hr_msi)) if local else model

    @classmethod
    def from_moments(
        cls,
        moments: Tensor,
        degradation: Degradation,
        srf: Tensor,
        *,
        local: bool = True,
        ridge: float = 1e-4,
        iterations: int = 4,
        window_sigma: float | None = None,
    ) -> RegressionModel:
        """The model of a scene by its `pair_moments`; its bands are taken to be equally sharp
        until `with_sharpness` is told otherwise. Other arguments and errors as in `fit`."""
        _check_options(local, ridge, iterations, window_sigma)
        msi_bands, hsi_bands = srf.shape
        if window_sigma is None:
            # A Gaussian window weighs like 4 pi sigma^2 equal pixels.
            window_sigma = math.sqrt((msi_bands + 1) / (2 * math.pi))
        weights = global_weights(moments[: 1 + msi_bands])
        variance = moments.diagonal()[1 : 1 + msi_bands] / moments[0, 0]
        variance = variance - (moments[0, 1 : 1 + msi_bands] / moments[0, 0]) ** 2
        floor = max(NOISE_FLOOR * variance.sum().item(), 1e-12)
        return cls(
            degradation,
            srf,
            weights,
            weights.new_zeros(hsi_bands),
            local,
            ridge,
            back_projection(srf.double(), weights, moments),
            floor,
            iterations,
            window_sigma,
        )

    def sharpness_moments(
        self, lr_hsi: Tensor, hr_msi: Tensor, inside: tuple[slice, slice] | None = None
    ) -> Tensor:
        """Sums ``(4, G)`` over a scene, or over the pixels ``inside`` of a tile with a margin of
        `maps_halo`, for `with_sharpness`; the sums of tiles add up."""
        inside = inside or (slice(None), slice(None))
        return _LowResolution(self, lr_hsi, hr_msi).sharpness_moments(inside)

    def with_sharpness(self, moments: Tensor) -> RegressionModel:
        """The same model, told by `sharpness_moments` how sharp the bands are."""
        return replace(self, sharpness=sharpness(moments))

    @property
    def maps_halo(self) -> int:
        """How many low-resolution pixels around one its map depends on."""
        windows = 2 * math.ceil(3 * self.window_sigma) + 2 if self.local else 0
        return 2 * self._blur_reach + windows + 1

    @property
    def refine_halo(self) -> int:
        """How many low-resolution pixels around a tile `refine` depends on."""
        round_trips = self.iterations * _round_trip_radius(self.degradation)
        return self._blur_reach + round_trips + 2

    @property
    def halo(self) -> int:
        """How many low-resolution pixels around a tile its result depends on."""
        return self.maps_halo + self.iterations * _round_trip_radius(self.degradation) + 2

    @property
    def _blur_reach(self) -> int:
        size = max(self.degradation.psf.shape) + max(map(abs, self.degradation.centre))
        return math.ceil(size / self.degradation.scale)

    def apply(self, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
        """Fuse ``lr_hsi (G, h, w)`` and ``hr_msi (g, H, W)`` to ``(G, H, W)``, not clamped."""
        scale, boundary = self.degradation.scale, self.degradation.boundary
        low = _LowResolution(self, lr_hsi, hr_msi)
        detail = low.detail(hr_msi)
        centre = self.degradation.centre
        fused = lr_hsi.new_empty(len(lr_hsi), *hr_msi.shape[-2:])
        for start in range(0, len(fused), BANDS_AT_A_TIME):
            bands = slice(start, start + BANDS_AT_A_TIME)
            slopes, offset = low.coefficients(bands)
            maps, first = surrounded(torch.cat([offset[None], slopes]), scale, centre, boundary)
            sharpness = self.sharpness[bands].to(maps)
            fused[bands] = local_map(
                maps.transpose(0, 1)[None],
                hr_msi[None],
                detail[None] if self.local else None,
                sharpness if self.local else None,
                scale=scale,
                first=first,
            )[0]
        return self.refine(fused, lr_hsi, hr_msi)

    def refine(self, fused: Tensor, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
        """Bring ``fused (G, H, W)``, contiguous, back to what both sensors saw, in place."""
        return consistent(
            fused,
            lr_hsi,
            hr_msi,
            degradation=self.degradation,
            srf=self.srf,
            back=self.back,
            iterations=self.iterations,
        )


def _check_options(local: bool, ridge: float, iterations: int, window_sigma: float | None) -> None:
    checks.flag("local", local)
    checks.positive("ridge", ridge)
    checks.integer("iterations", iterations, low=0)
    if window_sigma is not None:
        checks.positive("window_sigma", window_sigma)


def as_degradation(psf: Tensor | Degradation | None, scale: int) -> Degradation | None:
    """A `Degradation` from what users give as ``psf``."""
    if psf is None:
        return None
    if isinstance(psf, Tensor):
        block = tuple(psf.shape) == (scale, scale)
        return Degradation.block(scale, psf) if block else Degradation(psf, scale)
    if not isinstance(psf, Degradation):
        raise TypeError(f"psf: expected a tensor or a Degradation, got {type(psf).__name__}")
    if psf.scale != scale:
        raise ValueError(f"psf: expected one of scale {scale} like the pair, got {psf.scale}")
    return psf


# ------------------------------------------------------------------------------------------------
# Statistics of the whole scene: sums, which add up over tiles
# ------------------------------------------------------------------------------------------------


def global_weights(moments: Tensor) -> Tensor:
    """The scene's one linear map ``(G, 1+g)`` by least squares, from ``(1+g, 1+g+G)`` moments.

    A ridge far below the data's accuracy settles what the data leave open: constant images,
    MSI bands that are copies of each other, fewer pixels than coefficients.
    """
    features = len(moments)
    gram, target = moments[:, :features], moments[:, features:]
    ridge = 1e-12 * gram.diagonal().mean().clamp_min(1e-12)
    damping = ridge * torch.eye(features, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + damping, target).T


def back_projection(srf: Tensor, weights: Tensor, moments: Tensor) -> Tensor:
    """How to move a spectrum when its MSI pixel misses something: ``(G, g)``.

    The least change that gives the MSI, if the srf and the pair agree; the less of it, the worse
    the srf explains the degraded MSI, compared with how well the scene's map explains the HSI.
    ``moments`` are `pair_moments`: of ``d`` times them, summed over pixels, come the squares of
    the disagreement ``m - srf y`` and of the map's error ``y - weights [1, m]``.
    """
    msi_bands, hsi_bands = srf.shape
    identity = torch.eye(msi_bands + hsi_bands).to(srf)
    disagreement = torch.cat(
        [srf.new_zeros(msi_bands, 1), identity[:msi_bands, :msi_bands], -srf], 1
    )
    error = torch.cat([-weights, identity[msi_bands:, msi_bands:]], 1)
    misses = disagreement @ moments @ disagreement.T
    errors = ((error @ moments) * error).sum(1)
    noise = misses / errors.mean().clamp_min(1e-30)
    return srf.T @ torch.linalg.pinv(srf @ srf.T + noise, hermitian=True)


def sharpness(moments: Tensor) -> Tensor:
    """Least squares from sums ``(4, G)``: pixels, ``u u``, ``u r``, ``r r`` (see
    `_LowResolution.sharpness_moments`), shrunk to 0 by its own uncertainty."""
    count, uu, ur, rr = moments
    amount = ur / uu.clamp_min(1e-30)
    uncertainty = (rr - amount * ur).clamp_min(0) / count / uu.clamp_min(1e-30)
    return amount * amount**2 / (amount**2 + 16 * uncertainty).clamp_min(1e-30)


# ------------------------------------------------------------------------------------------------
# The low resolution: windows, small solves, coefficients
# ------------------------------------------------------------------------------------------------


class _LowResolution:
    """The pair at the HSI's resolution, and the maps fitted there."""

    def __init__(self, model: RegressionModel, lr_hsi: Tensor, hr_msi: Tensor) -> None:
        self.model = model
        self.hsi = lr_hsi
        self.msi = model.degradation(hr_msi)
        if model.local:
            boundary = _without_zeros(model.degradation.boundary)
            self.blur = Degradation.gaussian(
                1, SHARPNESS_SIGMA * model.degradation.scale, boundary=boundary
            )
            self.detail_low = model.degradation(self.detail(hr_msi))
            fit = model.ridge, model.floor
            self.windows = Windows(self.msi, model.window_sigma, *fit, boundary)
            self.narrow = Windows(self.msi, 0.75 * model.window_sigma, *fit, boundary)
            self.fine = Windows(self.msi, model.window_sigma, *fit, boundary, fine=FINE)

    def detail(self, hr_msi: Tensor) -> Tensor:
        """What a band that is blurred has of the MSI more than one that is not."""
        return self.blur(hr_msi) - hr_msi if self.model.local else hr_msi

    def _first_maps(self, bands: slice) -> tuple[Tensor, Tensor]:
        """Slopes ``(g, b, h, w)`` and offsets ``(b, h, w)`` before sharpness is accounted for."""
        weights = self.model.weights[bands].to(self.hsi)
        shape = (-1, len(weights), *self.hsi.shape[-2:])
        slopes = weights[:, 1:].T[:, :, None, None].expand(shape)
        offset = weights[:, 0, None, None].expand(shape[1:])
        if self.model.local:
            more, rest = self.windows.fit(self.hsi[bands] - predict(slopes, offset, self.msi))
            slopes, offset = slopes + more, offset + rest
        return slopes, offset

    def coefficients(self, bands: slice) -> tuple[Tensor, Tensor]:
        """The final slopes ``(g, b, h, w)`` and offsets ``(b, h, w)``."""
        slopes, offset = self._first_maps(bands)
        if self.model.local:
            sharpness = self.model.sharpness[bands, None, None].to(self.hsi)
            seen = predict(slopes, offset, self.msi)
            seen = seen + sharpness * predict(slopes, 0, self.detail_low)
            more, rest = self.fine.fit(self.hsi[bands] - seen)
            slopes, offset = slopes + more, offset + rest
        return slopes, offset

    def sharpness_moments(self, inside: tuple[slice, slice]) -> Tensor:
        """Sums for `sharpness`: what the maps leave of the HSI (``r``) against what blurring the
        MSI would change in it (``u``), both freed of what narrower windows could explain."""
        sums = []
        for start in range(0, len(self.hsi), BANDS_AT_A_TIME):
            bands = slice(start, start + BANDS_AT_A_TIME)
            slopes, offset = self._first_maps(bands)
            rest = self.narrow.remainder(self.hsi[bands] - predict(slopes, offset, self.msi))
            change = self.narrow.remainder(predict(slopes, 0, self.detail_low))
            change, rest = (x[:, inside[0], inside[1]].flatten(1).double() for x in (change, rest))
            count = change.new_full((len(change),), change.shape[1])
            sums.append(
                torch.stack([count, (change**2).sum(1), (change * rest).sum(1), (rest**2).sum(1)])
            )
        return torch.cat(sums, 1)


class Windows:
    """Ridge regression on ``guides (g, h, w)`` in the Gaussian window around every pixel.

    Its moments are those of what pixels differ by from the window's mean, and ``fine`` times those
    of the detail, what they differ by from their neighbours.
    """

    def __init__(
        self,
        guides: Tensor,
        sigma: float,
        ridge: float,
        floor: float,
        boundary: str,
        fine: float = 0.0,
    ) -> None:
        self.mean = Degradation.gaussian(1, sigma, boundary=boundary)
        self.neighbours = Degradation(NEIGHBOURS, 1, boundary=boundary)
        self.guides, self.fine = guides, fine
        exact = guides.double()  # a variance is a small difference of large moments
        guide_mean = self.mean(exact)
        variance = self.mean(exact[:, None] * exact) - guide_mean[:, None] * guide_mean
        self.guide_mean = guide_mean.to(guides)
        if fine:
            detail = self.detail(exact)
            variance += fine * self.mean(detail[:, None] * detail)
            self.guide_detail = detail.to(guides)
        self.inverse = ridge_inverse(variance, ridge, floor).to(guides)

    def detail(self, image: Tensor) -> Tensor:
        """What pixels differ by from their neighbours."""
        return image - self.neighbours(image)

    def fit(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes ``(g, b, h, w)`` and offsets ``(b, h, w)`` of ``target (b, h, w)``."""
        target_mean = self.mean(target)
        products = self.guides[:, None] * target
        if self.fine:
            products += self.fine * (self.guide_detail[:, None] * self.detail(target))
        covariance = self.mean(products)
        covariance -= self.guide_mean[:, None] * target_mean
        slopes = torch.einsum("ijhw,jbhw->ibhw", self.inverse, covariance)
        return slopes, target_mean - (slopes * self.guide_mean[:, None]).sum(0)

    def remainder(self, target: Tensor) -> Tensor:
        """What the regression leaves of ``target (b, h, w)``."""
        return target - predict(*self.fit(target), self.guides)


def ridge_inverse(variance: Tensor, ridge: float, floor: float) -> Tensor:
    """``(V + (ridge*trace(V) + floor) I)^-1`` at every pixel of ``variance (g, g, h, w)``."""
    matrices = variance.permute(2, 3, 0, 1)
    damping = ridge * matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0) + floor
    identity = torch.eye(len(variance), dtype=variance.dtype, device=variance.device)
    return torch.linalg.inv(matrices + damping[..., None, None] * identity).permute(2, 3, 0, 1)


def predict(slopes: Tensor, offset: Tensor | float, guides: Tensor) -> Tensor:
    """``sum_i slopes[i] * guides[i] + offset``: ``(g, b, h, w)``, ``(b, h, w)``, ``(g, h, w)``."""
    return (slopes * guides[:, None]).sum(0) + offset


# ------------------------------------------------------------------------------------------------
# From the low resolution to the full one
# ------------------------------------------------------------------------------------------------


def surrounded(
    maps: Tensor, scale: int, centre: tuple[float, float], boundary: str
) -> tuple[Tensor, tuple[float, float]]:
    """``maps (..., h, w)`` with what lies beyond their edges, as far as pixels of the full grid do;
    and where their first sample then lies there."""
    boundary = _without_zeros(boundary)
    first = []
    for dim, start in ((-2, centre[0]), (-1, centre[1])):
        low = maps.shape[dim]
        before = max(math.ceil(start / scale), 0)
        behind = max(math.ceil((scale - 1 - start) / scale), 0)
        index = fold(torch.arange(-before, low + behind), low, boundary)
        maps = maps.index_select(dim, index.to(maps.device))
        first.append(start - before * scale)
    return maps, (first[0], first[1])


def cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution, a = -1/2."""
    d = distance.abs()
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0))


def upsample(
    cube: Tensor, scale: int, centre: tuple[float, float], boundary: str, kernel
) -> Tensor:
    """Interpolate ``cube (..., h, w)`` to ``(..., h*scale, w*scale)``.

    Its first sample lies at pixel ``centre`` of the full grid (see `Degradation.centre`), so that
    nothing is shifted; ``kernel`` weighs samples by their distance.
    """
    boundary = _without_zeros(boundary)
    for dim, first in ((-1, centre[1]), (-2, centre[0])):
        low = cube.shape[dim]
        blocks = []
        for start in range(0, low, 16):  # a few rows of the banded matrix at a time
            stop = min(start + 16, low)
            position = (
                torch.arange(start * scale, stop * scale, dtype=torch.float64) - first
            ) / scale
            index = torch.arange(
                math.floor(position[0].item()) - 1, math.floor(position[-1].item()) + 3
            )
            matrix = kernel(position[:, None] - index).to(cube)
            if index[0] >= 0 and index[-1] < low:
                stretch = cube.narrow(dim, int(index[0]), len(index))
            else:
                stretch = cube.index_select(dim, fold(index, low, boundary).to(cube.device))
            blocks.append(stretch @ matrix.T if dim == -1 else matrix @ stretch)
        cube = torch.cat(blocks, dim)
    return cube


# ------------------------------------------------------------------------------------------------
# Back to both sensors
# ------------------------------------------------------------------------------------------------


def consistent(
    fused: Tensor,
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    degradation: Degradation,
    srf: Tensor,
    back: Tensor,
    iterations: int = 4,
) -> Tensor:
    """Bring ``fused (G, H, W)`` back to what both sensors saw, in place.

    ``fused`` is contiguous; ``back (G, g)`` is `back_projection`'s; the other arguments are those
    of `RegressionModel`.
    """
    scale, centre = degradation.scale, degradation.centre
    boundary = _without_zeros(degradation.boundary)
    srf, back = srf.to(fused), back.to(fused)

    # Degrading and projecting commute (one is spatial, one spectral), so that what the HSI still
    # misses after a projection is known without doing it at full resolution; and each round of
    # interpolating, adding and degrading again is a small filter on the HSI's grid.
    low = degradation(fused)
    low = low + apply_srf(degradation(hr_msi) - apply_srf(low, srf), back)
    missing, total = lr_hsi - low, torch.zeros_like(lr_hsi)
    seen_again = _round_trip(degradation, boundary)
    for _ in range(iterations):
        total += missing
        missing = missing - seen_again(missing)
    for start in range(0, len(fused), BANDS_AT_A_TIME):
        bands = slice(start, start + BANDS_AT_A_TIME)
        fused[bands] += upsample(total[bands], scale, centre, boundary, cubic)
    difference = hr_msi - apply_srf(fused, srf)
    fused.view(len(fused), -1).addmm_(back, difference.flatten(1))
    return fused


def _round_trip(degradation: Degradation, boundary: str) -> Degradation:
    """Interpolating and degrading again, as one filter on the low-resolution grid."""
    scale, radius = degradation.scale, _round_trip_radius(degradation)
    # Far from its edges, the response to one bright pixel holds the filter, mirrored.
    impulse = torch.zeros(4 * radius + 1, 4 * radius + 1, dtype=torch.float64)
    impulse[2 * radius, 2 * radius] = 1
    image = upsample(impulse, scale, degradation.centre, boundary, cubic)
    response = degradation(image)[radius : 3 * radius + 1, radius : 3 * radius + 1]
    return Degradation(response.flip(0, 1).contiguous(), 1, 0, boundary)


def _round_trip_radius(degradation: Degradation) -> int:
    reach = max(degradation.psf.shape) / 2 + max(map(abs, degradation.centre))
    return math.ceil(reach / degradation.scale) + 2


def _without_zeros(boundary: str) -> str:
    """Maps and means do not fall to zero beyond the edge, whatever the blur met there."""
    return "replicate" if boundary == "zeros" else boundary
