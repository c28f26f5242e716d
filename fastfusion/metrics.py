"""How far a fused cube is from a reference, or, without one, from the two images it was made of.

Papers differ in what they call by the same name (range 1 or the cube's peak, degrees or radians, a
fixed 100/4), so every function says its convention, and `CONVENTIONS` holds them in a line each
for reports. Cubes are tensors ``(B, G, H, W)`` or ``(G, H, W)`` in [0, 1]. Each metric is the mean
of the images' own values over the batch, a tensor without dimensions: float64 for float64 cubes,
float32 for all others. NaN in gives NaN out. All are differentiable.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion._optional import need
from fastfusion.data.sensors import apply_srf
from fastfusion.ops import checks

__all__ = ["CONVENTIONS", "d_lambda", "d_s", "ergas", "mrae", "psnr", "qnr", "sam", "ssim"]

#: What each figure means, for the reports that show it.
CONVENTIONS = {
    "psnr": "dB, mean over bands of each band's own, range 1",
    "sam": "degrees, mean over pixels; pixels whose spectrum is zero are left out",
    "ergas": "factor 100/scale; bands whose reference is zero are left out",
    "ssim": "mean over bands, Gaussian window 11, sigma 1.5, range 1",
    "mrae": "mean of |fused - reference| / reference; reference values of zero are left out",
    "d_lambda": "mean over band pairs of |Q(fused) - Q(lr_hsi)|, Gaussian window 11, sigma 1.5",
    "d_s": "mean over msi bands of |Q(srf fused, msi) - Q(srf lr_hsi, lr_msi)|, the same window",
    "qnr": "(1 - d_lambda) (1 - d_s)",
}

_WINDOW = 11  # SSIM's Gaussian (Wang et al. 2004); torchmetrics takes the same for Q
_SIGMA = 1.5


# ------------------------------------------------------------------------------------------------
# With a reference
# ------------------------------------------------------------------------------------------------


def psnr(fused: Tensor, reference: Tensor, *, peak: float = 1.0, per_band: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB: the mean over bands of ``10 log10(peak^2 / MSE)``.

    Each band has its own mean squared error, as in the fusion papers (torchmetrics takes one error
    over all bands). A band without error counts as infinite, and so does the mean.

    Args:
        fused, reference: ``(B, G, H, W)`` or ``(G, H, W)``.
        peak: the range of the values. The convention of the cube's own peak is
            ``peak=reference.max().item()``: some 5 dB less on dark scenes.
        per_band: give each band's figure, ``(B, G)`` or ``(G,)``, and not the mean.

    Raises:
        TypeError, ValueError: the cubes are no tensors or not alike; ``peak`` is not positive.

    >>> reference = torch.zeros(31, 8, 8)
    >>> round(psnr(reference + 0.1, reference).item(), 4)
    20.0
    """
    fused, reference = _alike(fused, reference)
    checks.positive("peak", peak)
    checks.flag("per_band", per_band)
    error = (fused - reference).square().mean(dim=(-2, -1))
    bands = 20 * math.log10(peak) - 10 * error.log10()
    return bands if per_band else bands.mean()


def sam(fused: Tensor, reference: Tensor, *, per_pixel: bool = False) -> Tensor:
    """Spectral angle in degrees, the mean over pixels; 0 is best.

    Pixels where either spectrum is zero have no angle and are left out; the result is NaN where no
    pixel is left. The angle between the unit vectors u and v is ``2 atan2(|u - v|, |u + v|)``
    (Kahan): the arc cosine of torchmetrics, which is in radians and NaN for a zero spectrum,
    cannot tell angles below 0.03 degrees apart in float32.

    Args:
        fused, reference: ``(B, G, H, W)`` or ``(G, H, W)``.
        per_pixel: give each pixel's angle, ``(B, H, W)`` or ``(H, W)``, NaN where it is left out.

    Raises:
        TypeError, ValueError: the cubes are no tensors or not alike.

    >>> one, two = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> round(sam(one.view(2, 1, 1), two.view(2, 1, 1)).item(), 4)
    45.0
    """
    fused, reference = _alike(fused, reference)
    checks.flag("per_pixel", per_pixel)
    images = [_angles(*pair) for pair in zip(_batched(fused), _batched(reference), strict=True)]
    if not per_pixel:
        return torch.stack([angles.mean() for angles, _ in images]).mean()
    maps = [
        angles.new_full(seen.shape, torch.nan).masked_scatter(seen, angles)
        for angles, seen in images
    ]
    return torch.stack(maps).view(*fused.shape[:-3], *fused.shape[-2:])


def _angles(fused: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of the pixels that have one, and which these are: ``(N,)``, ``(H, W)``."""
    seen = (fused.norm(dim=0) != 0) & (reference.norm(dim=0) != 0)  # a NaN is seen
    u, v = (F.normalize(cube[:, seen], dim=0, eps=0) for cube in (fused, reference))
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=0), (u + v).norm(dim=0))), seen


def ergas(fused: Tensor, reference: Tensor, *, ratio: float) -> Tensor:
    """Relative dimensionless global error (Wald 2000): ``100/ratio rms over bands (RMSE / mean)``.

    ``mean`` is the reference band's. Bands whose reference mean is zero have no relative error and
    are left out; the result is NaN where no band is left. The rest is torchmetrics' definition.

    Args:
        fused, reference: ``(B, G, H, W)`` or ``(G, H, W)``.
        ratio: how many times finer the fused pixels are than the hyperspectral ones (``scale``).
            Much published code keeps 4 whatever the scale: its figures are ``scale/4`` times these.

    Raises:
        TypeError, ValueError: the cubes are no tensors or not alike; ``ratio`` is not positive.
        ImportError: torchmetrics is not installed.

    >>> round(ergas(torch.full((4, 8, 8), 0.3), torch.full((4, 8, 8), 0.2), ratio=4).item(), 4)
    12.5
    """
    fused, reference = map(_batched, _alike(fused, reference))
    checks.positive("ratio", ratio)
    library = need("torchmetrics.functional.image", extra="io", purpose="the metric ERGAS")
    images = []
    for image, truth in zip(fused, reference, strict=True):
        lit = truth.mean(dim=(-2, -1)) != 0
        images.append(
            library.error_relative_global_dimensionless_synthesis(
                image[None, lit], truth[None, lit], ratio
            )
        )
    return torch.stack(images).mean()


def ssim(fused: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), the mean over bands; 1 is best.

    Gaussian window 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, range 1, mirrored at the edges: the
    definition of torchmetrics, which computes it here a band at a time, so that memory is bounded.

    Args:
        fused, reference: ``(B, G, H, W)`` or ``(G, H, W)``, at least 6 x 6 pixels.

    Raises:
        TypeError, ValueError: the cubes are no tensors, not alike or too small.
        ImportError: torchmetrics is not installed.

    >>> cube = torch.rand(3, 16, 16)
    >>> round(ssim(cube, cube).item(), 6)
    1.0
    """
    fused, reference = map(_batched, _alike(fused, reference))
    least = _WINDOW // 2 + 1  # a mirror needs one pixel more than it adds
    _check_sides("fused", fused, least)
    library = need("torchmetrics.functional.image", extra="io", purpose="the metric SSIM")
    bands = [
        library.structural_similarity_index_measure(
            band, truth, kernel_size=_WINDOW, sigma=_SIGMA, data_range=1.0
        )
        for band, truth in zip(fused.split(1, dim=1), reference.split(1, dim=1), strict=True)
    ]
    return torch.stack(bands).mean()


def mrae(fused: Tensor, reference: Tensor) -> Tensor:
    """Mean relative absolute error: the mean of ``|fused - reference| / |reference|``; 0 is best.

    Values where the reference is zero have no relative error and are left out; the result is NaN
    where none is left. Nearly black pixels dominate it.

    Args:
        fused, reference: ``(B, G, H, W)`` or ``(G, H, W)``.

    Raises:
        TypeError, ValueError: the cubes are no tensors or not alike.

    >>> round(mrae(torch.full((4, 8, 8), 0.3), torch.full((4, 8, 8), 0.2)).item(), 4)
    0.5
    """
    images = []
    for image, truth in zip(*map(_batched, _alike(fused, reference)), strict=True):
        lit = truth != 0
        images.append(((image[lit] - truth[lit]) / truth[lit]).abs().mean())
    return torch.stack(images).mean()


# ------------------------------------------------------------------------------------------------
# Without a reference
#
# All three stand on the universal image quality index Q (Wang and Bovik 2002) of two bands, the
# mean over windows of 4 cov mean mean' / ((var + var') (mean^2 + mean'^2)). torchmetrics has it,
# but filters both bands anew for each of the G (G - 1) / 2 pairs (66 s for 31 bands of 128 x 128 in
# float64), and in float32 the 1e-7 that it adds to the denominator outweighs the denominator of
# dark, smooth windows: d_lambda came out at half its value there. Here a band is filtered once, in
# float64; the definition is the same, and tested against it.
# ------------------------------------------------------------------------------------------------


def d_lambda(fused: Tensor, lr_hsi: Tensor, *, p: float = 1) -> Tensor:
    """Spectral distortion (Alparone et al. 2008, eq. 3): do bands relate as they did? 0 is best.

    ``(mean over band pairs of |Q(fused_k, fused_l) - Q(lr_hsi_k, lr_hsi_l)|^p)^(1/p)``, with Q in
    Gaussian windows of 11 (sigma 1.5) that lie wholly inside the image.

    Args:
        fused: ``(B, G, H, W)`` or ``(G, H, W)``.
        lr_hsi: ``(B, G, h, w)`` or ``(G, h, w)``, at least 11 x 11 pixels.
        p: exponent, at least 1: a larger one weighs large differences more.

    Raises:
        TypeError, ValueError: the cubes are no tensors, do not fit together or are too small.

    >>> cube = torch.rand(4, 24, 24)
    >>> d_lambda(cube, cube).item()
    0.0
    """
    _check_pair(fused, lr_hsi)
    _check_exponent("p", p, 1)
    images = [
        _distortion(_pair_qualities(image), _pair_qualities(low), p)
        for image, low in zip(_batched(fused), _batched(lr_hsi), strict=True)
    ]
    return torch.stack(images).mean().to(_result_dtype(fused))


def d_s(
    fused: Tensor,
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor,
    lr_msi: Tensor | None = None,
    q: float = 1,
) -> Tensor:
    """Spatial distortion (Alparone et al. 2008, eq. 4), for several MSI bands; 0 is best.

    The index was defined for one panchromatic band. Here each MSI band stands against its own
    projection of the cubes: ``(mean over MSI bands i of |Q((srf fused)_i, hr_msi_i) -
    Q((srf lr_hsi)_i, lr_msi_i)|^q)^(1/q)``, with Q as in `d_lambda`.

    Args:
        fused: ``(B, G, H, W)`` or ``(G, H, W)``.
        lr_hsi: ``(B, G, h, w)`` or ``(G, h, w)``, at least 11 x 11 pixels; h divides H, w W.
        hr_msi: ``(B, g, H, W)`` or ``(g, H, W)``.
        srf: ``(g, G)``.
        lr_msi: ``hr_msi`` as the hyperspectral sensor's optics would have seen it,
            ``(B, g, h, w)`` or ``(g, h, w)``; by default its block means.
        q: exponent, at least 1.

    Raises:
        TypeError, ValueError: the arguments are no tensors, do not fit together or are too small.

    >>> cube, srf = torch.rand(4, 24, 24), torch.eye(4)[:2]
    >>> d_s(cube, cube, cube[:2], srf=srf).item()
    0.0
    """
    _check_pair(fused, lr_hsi)
    _check_exponent("q", q, 1)
    lr_msi = _check_msi(fused, lr_hsi, hr_msi, srf, lr_msi)
    images = []
    for image, low, msi, low_msi in zip(
        *map(_batched, (fused, lr_hsi, hr_msi, lr_msi)), strict=True
    ):
        sharp = _qualities(_Bands.of(apply_srf(image.double(), srf)), _Bands.of(msi))
        blurred = _qualities(_Bands.of(apply_srf(low.double(), srf)), _Bands.of(low_msi))
        images.append(_distortion(sharp, blurred, q))
    return torch.stack(images).mean().to(_result_dtype(fused))


def qnr(
    fused: Tensor,
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor,
    lr_msi: Tensor | None = None,
    alpha: float = 1,
    beta: float = 1,
) -> Tensor:
    """Quality with no reference (Alparone et al. 2008): ``(1 - d_lambda)^alpha (1 - d_s)^beta``.

    1 is best. The arguments are those of `d_lambda` and `d_s`, and so is what it raises; the batch
    mean is taken of the two indices.

    >>> cube, srf = torch.rand(4, 24, 24), torch.eye(4)[:2]
    >>> qnr(cube, cube, cube[:2], srf=srf).item()
    1.0
    """
    _check_exponent("alpha", alpha, 0)
    _check_exponent("beta", beta, 0)
    spatial = d_s(fused, lr_hsi, hr_msi, srf=srf, lr_msi=lr_msi)
    return (1 - d_lambda(fused, lr_hsi)) ** alpha * (1 - spatial) ** beta


def _distortion(fused: Tensor, original: Tensor, power: float) -> Tensor:
    if not len(fused):  # a single band has no pairs
        return fused.new_zeros(())
    return (fused - original).abs().pow(power).mean().pow(1 / power)


class _Bands(NamedTuple):
    """Bands ``(G, H, W)`` in float64 with their moments in every window."""

    centred: Tensor  #: less their means: a flat band then has no variance by rounding either
    centred_mean: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, cube: Tensor) -> _Bands:
        cube = cube.double()
        level = cube.mean(dim=(-2, -1), keepdim=True)
        centred = cube - level
        mean = _window_mean(centred)
        variance = (_window_mean(centred**2) - mean**2).clamp(min=0)
        return cls(centred, mean, mean + level, variance)

    def pick(self, bands: slice) -> _Bands:
        return _Bands(*(planes[bands] for planes in self))


def _pair_qualities(cube: Tensor) -> Tensor:
    """Q of every pair of bands of ``cube (G, H, W)``: ``(G (G - 1) / 2,)``."""
    bands = _Bands.of(cube)
    together = max(1, 2**20 // cube[0].numel())  # bands filtered at once: stay near the cache
    qualities = [
        _qualities(bands.pick(slice(k, k + 1)), bands.pick(slice(first, first + together)))
        for k in range(len(cube))
        for first in range(k + 1, len(cube), together)
    ]
    return torch.cat(qualities) if qualities else bands.mean.new_zeros(0)


def _qualities(one: _Bands, other: _Bands) -> Tensor:
    """Q of each band of ``one`` with the same band of ``other``; a single band goes with all."""
    covariance = _window_mean(one.centred * other.centred) - one.centred_mean * other.centred_mean
    denominator = (one.variance + other.variance) * (one.mean**2 + other.mean**2)
    tiny = torch.finfo(denominator.dtype).eps  # flat windows: 0 / tiny, as in torchmetrics
    return (4 * covariance * one.mean * other.mean / (denominator + tiny)).mean(dim=(-2, -1))


def _window_mean(planes: Tensor) -> Tensor:
    """Gaussian means of ``planes (..., H, W)`` in all windows inside: ``(..., H - 10, W - 10)``.

    As shifted sums: several times as fast as torch's float64 convolution.
    """
    position = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(position**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    for dim in (-2, -1):
        size = planes.shape[dim] - _WINDOW + 1
        total = torch.zeros_like(planes.narrow(dim, 0, size))
        for shift, weight in enumerate(weights.tolist()):
            total.add_(planes.narrow(dim, shift, size), alpha=weight)
        planes = total
    return planes


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def _alike(fused: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both cubes in the type that is computed in, when they are alike."""
    _check_cube("fused", fused)
    _check_cube("reference", reference)
    if fused.shape != reference.shape:
        raise ValueError(
            f"reference: expected the shape of fused, {tuple(fused.shape)}, "
            f"got {tuple(reference.shape)}"
        )
    _check_kin("reference", reference, fused)
    dtype = _result_dtype(fused)
    return fused.to(dtype), reference.to(dtype)


def _check_pair(fused: Tensor, lr_hsi: Tensor) -> None:
    _check_cube("fused", fused)
    _check_cube("lr_hsi", lr_hsi)
    if fused.shape[:-2] != lr_hsi.shape[:-2]:
        raise ValueError(
            f"lr_hsi: expected the batch and bands of fused {tuple(fused.shape)}, "
            f"got {tuple(lr_hsi.shape)}"
        )
    _check_kin("lr_hsi", lr_hsi, fused)
    _check_sides("lr_hsi", lr_hsi, _WINDOW)
    _check_sides("fused", fused, _WINDOW)


def _check_msi(
    fused: Tensor, lr_hsi: Tensor, hr_msi: Tensor, srf: Tensor, lr_msi: Tensor | None
) -> Tensor:
    """Check the MSI's side of `d_s` and give its low-resolution image."""
    _check_cube("hr_msi", hr_msi)
    _check_kin("hr_msi", hr_msi, fused)
    if hr_msi.ndim != fused.ndim or hr_msi.shape[-2:] != fused.shape[-2:]:
        raise ValueError(
            f"hr_msi: expected the sides (and the batch) of fused {tuple(fused.shape)}, "
            f"got {tuple(hr_msi.shape)}"
        )
    checks.response("srf", srf, (hr_msi.shape[-3], fused.shape[-3]))
    height, width = lr_hsi.shape[-2:]
    if lr_msi is None:
        if hr_msi.shape[-2] % height or hr_msi.shape[-1] % width:
            raise ValueError(
                f"lr_hsi: expected sides that divide those of hr_msi {tuple(hr_msi.shape)}, "
                f"got {tuple(lr_hsi.shape)}; or give lr_msi"
            )
        return F.adaptive_avg_pool2d(hr_msi, (height, width))
    _check_cube("lr_msi", lr_msi)
    _check_kin("lr_msi", lr_msi, fused)
    if lr_msi.shape != (*hr_msi.shape[:-2], height, width):
        raise ValueError(
            f"lr_msi: expected {(*hr_msi.shape[:-2], height, width)}, got {tuple(lr_msi.shape)}"
        )
    return lr_msi


def _check_cube(name: str, cube: Tensor) -> None:
    if not isinstance(cube, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(cube).__name__}")
    if cube.ndim not in (3, 4) or cube.numel() == 0:
        raise ValueError(
            f"{name}: expected (B, G, H, W) or (G, H, W), none of them 0, got {tuple(cube.shape)}"
        )
    if not cube.is_floating_point():
        raise ValueError(f"{name}: expected floating point in [0, 1], got {cube.dtype}")
    checks.dense(name, cube)


def _check_kin(name: str, cube: Tensor, fused: Tensor) -> None:
    if cube.dtype != fused.dtype or cube.device != fused.device:
        raise ValueError(
            f"{name}: expected the dtype and device of fused, {fused.dtype} on {fused.device}, "
            f"got {cube.dtype} on {cube.device}"
        )


def _check_sides(name: str, cube: Tensor, least: int) -> None:
    if min(cube.shape[-2:]) < least:
        raise ValueError(
            f"{name}: expected at least {least} x {least} pixels for the window of {_WINDOW}, "
            f"got {cube.shape[-2]} x {cube.shape[-1]}"
        )


def _check_exponent(name: str, value: float, least: float) -> None:
    checks.at_least(name, value, least)


def _batched(cube: Tensor) -> Tensor:
    return cube[None] if cube.ndim == 3 else cube


def _result_dtype(cube: Tensor) -> torch.dtype:
    return torch.float64 if cube.dtype == torch.float64 else torch.float32
