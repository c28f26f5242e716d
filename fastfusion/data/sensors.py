"""What two sensors do to one scene: blur and sampling, spectral response, Wald's protocol.

A low-resolution hyperspectral pixel is a weighted mean of high-resolution pixels (`Degradation`);
a multispectral band is a weighted mean of hyperspectral bands (an ``srf`` matrix).  Cubes are
tensors with the bands first and any leading dimensions.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion.data.cube import real_numbers
from fastfusion.data.formats.matlab import load_first
from fastfusion.data.formats.numpy_files import load_array
from fastfusion.data.formats.stored import reading
from fastfusion.ops import checks

__all__ = [
    "BOUNDARIES",
    "Degradation",
    "SpectralResponse",
    "apply_srf",
    "gaussian_psf",
    "read_response",
    "read_srf",
    "srf_from_bands",
    "srf_from_response",
    "wald",
]

#: What lies beyond the image's edge, and the name SciPy, MATLAB or PyTorch gives to it.
BOUNDARIES = {
    "circular": "the image repeats (scipy 'wrap', MATLAB 'circular')",
    "reflect": "mirrored about the centre of the edge pixel (scipy 'mirror', torch 'reflect')",
    "symmetric": "mirrored about the edge, which is repeated (scipy 'reflect', MATLAB 'symmetric')",
    "replicate": "the edge pixel goes on (scipy 'nearest', MATLAB and torch 'replicate')",
    "zeros": "nothing (scipy 'constant', torch 'zeros')",
}


# ------------------------------------------------------------------------------------------------
# Space: point spread function and sampling
# ------------------------------------------------------------------------------------------------


def gaussian_psf(size: int, sigma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A sampled Gaussian of ``size`` x ``size`` that sums to 1 (MATLAB's ``fspecial``).

    >>> gaussian_psf(5, 1.0).shape
    torch.Size([5, 5])
    """
    checks.integer("size", size, low=1)
    checks.positive("sigma", sigma)
    checks.placed(None, dtype)
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(position**2) / (2 * sigma**2))
    line = line / line.sum()
    return torch.outer(line, line).to(dtype)


@dataclass(frozen=True, eq=False)
class Degradation:
    """Blur by a point spread function, then every ``scale``-th pixel.

    ``out[i, j] = sum over (p, q) of psf[p, q] * cube[offset + i*scale + p - kh//2,
    offset + j*scale + q - kw//2]``: a correlation, anchored like `scipy.ndimage.correlate`.

    Attributes:
        psf: ``(kh, kw)``, sums to 1, of any size, odd or even.
        scale: how many high-resolution pixels a low-resolution one is wide and high.
        offset: high-resolution row and column that the first sample is taken at, ``0 .. scale-1``.
        boundary: what lies beyond the edge, one of `BOUNDARIES`.

    Raises:
        TypeError, ValueError: where an attribute is not as said above.

    >>> Degradation.gaussian(4)(torch.ones(31, 16, 24)).shape
    torch.Size([31, 4, 6])
    """

    psf: Tensor
    scale: int
    offset: int = 0
    boundary: str = "circular"

    def __post_init__(self) -> None:
        if not isinstance(self.psf, Tensor):
            raise TypeError(f"psf: expected a 2-D tensor, got {type(self.psf).__name__}")
        if self.psf.ndim != 2 or self.psf.numel() == 0 or not self.psf.is_floating_point():
            raise ValueError(
                f"psf: expected a 2-D floating-point tensor, "
                f"got {self.psf.dtype} of shape {tuple(self.psf.shape)}"
            )
        checks.dense("psf", self.psf)
        if self.psf.device.type != "meta" and not self.psf.detach().isfinite().all():
            raise ValueError("psf: expected finite weights, got NaN or infinite ones")
        checks.integer("scale", self.scale, low=1)
        checks.integer("offset", self.offset, low=0, high=self.scale - 1)
        checks.choice("boundary", self.boundary, tuple(BOUNDARIES))

    @classmethod
    def gaussian(
        cls,
        scale: int,
        sigma: float | None = None,
        size: int | None = None,
        boundary: str = "circular",
        offset: int = 0,
    ) -> Degradation:
        """A Gaussian; by default that of LSO's authors: sigma ``scale/2``, size
        ``2*ceil(3*sigma) + 1``, circular, sampled from offset 0."""
        checks.integer("scale", scale, low=1)
        sigma = checks.positive("sigma", 0.5 * scale if sigma is None else sigma)
        size = 2 * math.ceil(3 * sigma) + 1 if size is None else size
        return cls(gaussian_psf(size, sigma), scale, offset, boundary)

    @classmethod
    def block(cls, scale: int, psf: Tensor | None = None) -> Degradation:
        """Weighted means of blocks of ``scale`` x ``scale`` pixels that do not overlap.

        ``psf (scale, scale)`` holds the weights, by default all equal.  No boundary is reached.
        """
        checks.integer("scale", scale, low=1)
        if psf is not None:
            checks.dense("psf", psf)
        if psf is None:
            psf = torch.full((scale, scale), 1 / scale**2, dtype=torch.float64)
        elif tuple(psf.shape) != (scale, scale):
            raise ValueError(
                f"psf: expected the shape of one block, ({scale}, {scale}), got {tuple(psf.shape)}"
            )
        return cls(psf, scale, scale // 2)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The column and the row whose outer product the psf is, or None if it has rank 2 or more
        (or is being learnt, when its factors would not carry a gradient to it)."""
        if self.psf.requires_grad:
            return None
        u, s, vh = torch.linalg.svd(self.psf.double())
        if len(s) > 1 and s[1] > 8 * torch.finfo(self.psf.dtype).eps * s[0]:
            return None
        sign = torch.sign(u[:, 0].sum())
        return sign * s[0].sqrt() * u[:, 0], sign * s[0].sqrt() * vh[0]

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Where on the high-resolution grid the first low-resolution pixel has its centre of mass.

        A block of 4 pixels 0, 1, 2, 3 gives 1.5; a symmetric odd psf gives ``offset``.
        """
        psf = self.psf.detach().double()
        total = psf.sum()
        rows = torch.arange(psf.shape[0], dtype=torch.float64, device=psf.device)
        columns = torch.arange(psf.shape[1], dtype=torch.float64, device=psf.device)
        row = (psf.sum(1) @ rows / total).item() - psf.shape[0] // 2
        column = (psf.sum(0) @ columns / total).item() - psf.shape[1] // 2
        return self.offset + row, self.offset + column

    def __call__(self, cube: Tensor) -> Tensor:
        """Degrade ``cube (..., H, W)`` to ``(..., H/scale, W/scale)``; differentiable.

        Raises:
            ValueError: where the sides are no multiples of ``scale``.
        """
        checks.dense("cube", cube)
        if cube.ndim < 2:
            raise ValueError(f"cube: expected (..., H, W), got shape {tuple(cube.shape)}")
        height, width = cube.shape[-2:]
        if height % self.scale or width % self.scale:
            raise ValueError(
                f"cube: expected a height and width that are multiples of the scale {self.scale}, "
                f"got {height} x {width}"
            )
        if self.factors is None:
            padded = self._stretch(self._stretch(cube, -2, 0, height), -1, 0, width)
            planes = padded.reshape(-1, 1, *padded.shape[-2:])
            low = F.conv2d(planes, self.psf.to(cube)[None, None], stride=self.scale)
            return low.reshape(*cube.shape[:-2], *low.shape[-2:])
        column, row = self.factors
        return self._pass(self._pass(cube, -2, column.to(cube)), -1, row.to(cube))

    def _pass(self, cube: Tensor, dim: int, kernel: Tensor) -> Tensor:
        """One separable pass, as products with a few rows of its banded matrix at a time: that
        runs at the speed of BLAS, ten times that of a strided convolution of one channel."""
        taps, scale, size = len(kernel), self.scale, cube.shape[dim]
        count = 16 if scale > 1 else 64  # samples a product: wider blocks multiply more zeros
        step = count * scale
        band = kernel.new_zeros(count, (count - 1) * scale + taps)
        for sample in range(count):
            band[sample, sample * scale : sample * scale + taps] = kernel
        blocks = []
        for start in range(0, size, step):
            stop = min(start + step, size)
            matrix = band[: (stop - start) // scale, : stop - start - scale + taps]
            stretch = self._stretch(cube, dim, start, stop)
            blocks.append(matrix @ stretch if dim == -2 else stretch @ matrix.T)
        return torch.cat(blocks, dim) if blocks else cube.narrow(dim, 0, 0)

    def _stretch(self, cube: Tensor, dim: int, start: int, stop: int) -> Tensor:
        """What the samples of ``start .. stop-1`` along ``dim`` see, continued beyond the edges."""
        taps, size = self.psf.shape[dim], cube.shape[dim]
        first = start + self.offset - taps // 2
        length = stop - start - self.scale + taps
        if first >= 0 and first + length <= size:
            return cube.narrow(dim, first, length)
        index = torch.arange(first, first + length, device=cube.device)
        stretch = cube.index_select(dim, fold(index, size, self.boundary))
        if self.boundary == "zeros":
            outside = (index < 0) | (index >= size)
            stretch = stretch.masked_fill(outside if dim == -1 else outside[:, None], 0)
        return stretch


def fold(index: Tensor, size: int, boundary: str) -> Tensor:
    """Bring positions beyond ``0 .. size-1`` back inside, however far out they are."""
    if boundary == "circular":
        return index % size
    if boundary == "symmetric":
        index = index % (2 * size)
        return torch.minimum(index, 2 * size - 1 - index)
    if boundary == "reflect":
        index = index % max(2 * size - 2, 1)
        return torch.minimum(index, 2 * size - 2 - index)
    return index.clamp(0, size - 1)


# ------------------------------------------------------------------------------------------------
# Spectrum: spectral response functions
# ------------------------------------------------------------------------------------------------


class SpectralResponse(NamedTuple):
    """Tabulated responses of a multispectral sensor's bands."""

    wavelengths: np.ndarray  #: ``(n,)`` in nanometres, rising
    responses: np.ndarray  #: ``(bands, n)``, in any unit
    names: list[str]


def apply_srf(cube: Tensor, srf: Tensor) -> Tensor:
    """``msi = srf @ hsi`` at every pixel: ``cube (..., G, H, W)`` to ``(..., g, H, W)``.

    >>> apply_srf(torch.ones(2, 31, 8, 8), torch.full((3, 31), 1 / 31)).shape
    torch.Size([2, 3, 8, 8])
    """
    checks.dense("cube", cube)
    checks.dense("srf", srf)
    if srf.ndim != 2 or cube.ndim < 3 or srf.shape[1] != cube.shape[-3]:
        raise ValueError(
            f"srf: expected (msi bands, hsi bands) for a cube (..., hsi bands, H, W), "
            f"got {tuple(srf.shape)} and a cube {tuple(cube.shape)}"
        )
    return torch.matmul(srf.to(cube), cube.flatten(-2)).unflatten(-1, cube.shape[-2:])


def read_response(path: str | Path) -> SpectralResponse:
    """Read a CSV whose first column is ``wavelength_nm`` and whose others are bands."""
    path = checks.path("path", path)
    return reading(path, lambda: _read_response(path))


def _read_response(path: Path) -> SpectralResponse:
    with open(path, newline="") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[""]]
    if header[0].strip().lower() != "wavelength_nm":
        raise ValueError(f"expected a CSV whose first column is wavelength_nm, got {header[:1]}")
    try:
        table = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"expected a table of numbers: {error}") from error
    if table.ndim != 2 or table.shape[1] < 2 or not np.isfinite(table).all():
        raise ValueError("expected at least one band of finite responses")
    if len(header) != table.shape[1]:
        raise ValueError(f"expected a name for each of its {table.shape[1]} columns")
    table = table[np.argsort(table[:, 0], kind="stable")]
    return SpectralResponse(table[:, 0], table[:, 1:].T.copy(), [n.strip() for n in header[1:]])


def read_srf(
    path: str | Path,
    hsi_wavelengths: np.ndarray | None = None,
    hsi_widths: np.ndarray | None = None,
) -> Tensor:
    """Read an SRF matrix ``(msi bands, hsi bands)``, float64, rows summing to 1.

    A CSV (see `read_response`) is resampled onto ``hsi_wavelengths`` (nm); without them its rows
    are taken to be the HSI's bands.  A ``.npy`` or ``.mat`` file (its variable ``P``, ``R``,
    ``srf`` or ``srf_gt``) holds the matrix itself, either way round.
    """
    path = checks.path("path", path)
    if path.suffix.lower() not in (".csv", ".npy", ".mat"):
        raise ValueError(f"{path}: expected an SRF as .csv, .mat or .npy")
    return reading(path, lambda: _read_srf(path, hsi_wavelengths, hsi_widths))


def _read_srf(
    path: Path, hsi_wavelengths: np.ndarray | None, hsi_widths: np.ndarray | None
) -> Tensor:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        response = _read_response(path)
        if hsi_wavelengths is not None:
            return srf_from_response(response, hsi_wavelengths, hsi_widths)
        matrix = response.responses
    elif suffix == ".npy":
        matrix = load_array(path)
    else:
        matrix = load_first(path, ("P", "R", "srf", "SRF", "srf_gt"))
    if matrix.ndim != 2 or matrix.dtype.kind not in "uif":
        raise ValueError(f"expected a matrix, got {matrix.dtype} of shape {matrix.shape}")
    if matrix.shape[0] > matrix.shape[1]:  # a multispectral sensor has the fewer bands
        matrix = matrix.T
    return torch.from_numpy(_normalised(matrix.astype(np.float64), "the response"))


def srf_from_response(
    response: SpectralResponse,
    hsi_wavelengths: np.ndarray,
    hsi_widths: np.ndarray | None = None,
    *,
    tolerance: float = 0.1,
) -> Tensor:
    """Resample tabulated responses onto the bands of an HSI.

    A multispectral band sees the integral of its response times the spectrum; the spectrum is
    taken to run straight from band centre to band centre of the HSI, which makes that integral
    a weighted sum of HSI bands.  (A table given at the band centres themselves is thus kept.)

    Args:
        response: the multispectral bands.
        hsi_wavelengths: ``(G,)`` band centres in nm, rising.
        hsi_widths: ``(G,)`` full widths at half maximum in nm, or None for the bands' spacing.
            They tell a gap (removed water bands), which is not bridged, from mere sparseness.
        tolerance: largest share of a band's response that the HSI may miss.

    Returns:
        float64 ``(g, G)``, rows summing to 1.

    Raises:
        ValueError: where more than ``tolerance`` of an MSI band lies outside the HSI's bands.
    """
    checks.of_type("response", response, SpectralResponse, "a SpectralResponse")
    checks.at_least("tolerance", tolerance, 0)
    centres = real_numbers("hsi_wavelengths", hsi_wavelengths)
    if centres.ndim != 1 or len(centres) < 2 or not (np.diff(centres) > 0).all():
        raise ValueError("hsi_wavelengths: expected at least 2 band centres in rising order")
    spacing = np.diff(centres)
    nearest = np.minimum(np.r_[np.inf, spacing], np.r_[spacing, np.inf])
    widths = nearest if hsi_widths is None else real_numbers("hsi_widths", hsi_widths)
    if widths.shape != centres.shape or not ((widths > 0) & (widths < np.inf)).all():
        raise ValueError(f"hsi_widths: expected {len(centres)} positive widths in nm")

    grid = np.union1d(response.wavelengths, centres)
    density = np.stack(
        [np.interp(grid, response.wavelengths, r, left=0, right=0) for r in response.responses]
    )
    energy = np.clip(density, 0, None) * np.gradient(grid)
    total = energy.sum(1)
    if not (total > 0).all():
        raise ValueError(f"response: band {response.names[int(np.argmin(total))]} is zero")

    # share[k, i]: how much of the spectrum at grid[k] is band i.  Across a gap wider than the
    # reach of both its shores, and beyond the ends, a band stands only for its own width.
    reach = np.maximum(widths, nearest)
    below = np.clip(np.searchsorted(centres, grid, side="right") - 1, 0, len(centres) - 2)
    between = (grid - centres[below]) / spacing[below]
    bridged = (between >= 0) & (between <= 1) & (spacing <= reach[:-1] + reach[1:])[below]
    closest = below + (between > 0.5)
    near = ~bridged & (np.abs(grid - centres[closest]) <= reach[closest] / 2)
    share = np.zeros((len(grid), len(centres)))
    share[bridged, below[bridged]] = 1 - between[bridged]
    share[bridged, below[bridged] + 1] = between[bridged]
    share[near, closest[near]] = 1

    srf = energy @ share
    missed = 1 - srf.sum(1) / total
    if missed.max() > tolerance:
        worst = int(missed.argmax())
        raise ValueError(
            f"response: {missed[worst]:.0%} of band {response.names[worst]} lies outside the "
            f"HSI's bands ({centres[0]:.0f} to {centres[-1]:.0f} nm, gaps apart); "
            f"leave that band out or give the srf"
        )
    return torch.from_numpy(_normalised(srf, "response"))


def srf_from_bands(
    centres: np.ndarray,
    widths: np.ndarray,
    hsi_wavelengths: np.ndarray,
    hsi_widths: np.ndarray | None = None,
    *,
    tolerance: float = 0.1,
) -> Tensor:
    """Gaussian responses from band centres and full widths at half maximum, all in nm.

    Returns and raises as `srf_from_response`.

    >>> srf = srf_from_bands([460, 550, 640], [70, 90, 80], range(400, 701, 10))
    >>> srf.shape, srf.argmax(1).tolist()
    (torch.Size([3, 31]), [6, 15, 24])
    """
    centres, widths = real_numbers("centres", centres), real_numbers("widths", widths)
    if centres.ndim != 1 or centres.shape != widths.shape or not (widths > 0).all():
        raise ValueError("centres, widths: expected as many positive widths as centres, in nm")
    # The grid below is as long as the band of the largest width has steps of the smallest.
    if not len(centres) or not (np.abs([*centres, *widths]) < 1e6).all():
        raise ValueError("centres, widths: expected at least one band, of less than 1e6 nm")
    sigma = widths / math.sqrt(8 * math.log(2))
    grid = np.arange(
        (centres - 4 * sigma).min(), (centres + 4 * sigma).max(), max(widths.min() / 64, 1e-3)
    )
    responses = np.exp(-0.5 * ((grid - centres[:, None]) / sigma[:, None]) ** 2)
    response = SpectralResponse(grid, responses, [f"at {c:g} nm" for c in centres])
    return srf_from_response(response, hsi_wavelengths, hsi_widths, tolerance=tolerance)


def _normalised(matrix: np.ndarray, name: str) -> np.ndarray:
    total = matrix.sum(1, keepdims=True)
    if not np.isfinite(matrix).all() or not (total > 0).all():
        raise ValueError(f"{name}: expected finite responses, no band of which sums to 0")
    return matrix / total


# ------------------------------------------------------------------------------------------------
# Both
# ------------------------------------------------------------------------------------------------


def wald(reference: Tensor, degradation: Degradation, srf: Tensor) -> tuple[Tensor, Tensor]:
    """Wald's protocol: the pair that two sensors would have taken of a known scene.

    Args:
        reference: ``(..., G, H, W)``.
        degradation: the hyperspectral sensor's blur and sampling.
        srf: ``(g, G)``, the multispectral sensor's response.

    Returns:
        ``lr_hsi (..., G, H/scale, W/scale)`` and ``hr_msi (..., g, H, W)``.

    >>> lr_hsi, hr_msi = wald(torch.rand(31, 32, 32), Degradation.gaussian(4), torch.rand(3, 31))
    >>> lr_hsi.shape, hr_msi.shape
    (torch.Size([31, 8, 8]), torch.Size([3, 32, 32]))
    """
    checks.dense("reference", reference)
    checks.of_type("degradation", degradation, Degradation, "a Degradation")
    checks.dense("srf", srf)
    if reference.ndim < 3 or srf.ndim != 2 or srf.shape[1] != reference.shape[-3]:
        raise ValueError(
            f"srf: expected (msi bands, hsi bands) for a reference (..., hsi bands, H, W), "
            f"got {tuple(srf.shape)} and {tuple(reference.shape)}"
        )
    return degradation(reference), apply_srf(reference, srf)
