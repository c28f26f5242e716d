"""Sensors told from a pair: the PSF with its sub-pixel position, and the spectral response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastfusion.data.sensors import BOUNDARIES, Degradation
from fastfusion.ops import checks

__all__ = ["estimate_sensors"]

#: HSI pixels along a side from which the PSF is told; more only take longer.
LARGEST = 160
#: HSI pixels from the edge of the scene that the boundary is told by.
EDGE = 2


def estimate_sensors(
    lr_hsi: Tensor,
    hr_msi: Tensor,
    scale: int,
    *,
    degradation: Degradation | None = None,
    srf: Tensor | None = None,
) -> tuple[Degradation, Tensor]:
    """Estimate how two sensors saw one scene from what they saw.

    The MSI brought to the HSI's grid must be a mixture of the HSI's bands.  The PSF, a Gaussian
    with its own width and centre along each axis, is the one for which least is left of the MSI
    once the HSI's bands have explained what they can (Gauss-Newton after a coarse search); its
    centre takes up a shift between the sensors.  Where a free non-negative profile along each axis
    leaves far less than a Gaussian, it is taken instead.  The boundary is the one that leaves
    least at the edge.  The response then follows by non-negative least squares (FSRVL, eq. 15).

    Args:
        lr_hsi: ``(G, h, w)``.
        hr_msi: ``(g, scale*h, scale*w)``.
        scale: how many MSI pixels an HSI pixel is wide.
        degradation, srf: what is known already.

    Returns:
        the `Degradation` and the srf ``(g, G)``, float64.

    >>> from fastfusion.data import wald
    >>> scene = torch.rand(6, 24, 24).cumsum(2).cumsum(1)
    >>> pair = wald(scene / scene.max(), Degradation.gaussian(4), torch.rand(2, 6))
    >>> degradation, srf = estimate_sensors(*pair, 4)
    >>> srf.shape
    torch.Size([2, 6])
    """
    _check(lr_hsi, hr_msi, scale, degradation, srf)
    hsi, msi = lr_hsi.detach().double(), hr_msi.detach().double()
    if degradation is None:
        rows, columns = middle(*hsi.shape[-2:])
        hsi_middle = hsi[:, rows, columns]
        msi_middle = msi[:, times(rows, scale), times(columns, scale)]
        candidates = candidate_degradations(hsi_middle, msi_middle, scale)
        edge = edge_mask(*hsi.shape[-2:]).to(hsi.device)
        misfits = {}
        for boundary, candidate in candidates.items():
            low_msi = candidate(msi)
            whole = pair_moments(hsi, low_msi)
            at_edge = pair_moments(hsi[:, edge], low_msi[:, edge])
            misfits[boundary] = edge_misfit(whole, at_edge, len(msi))
        degradation = candidates[likeliest_boundary(misfits)]
    if srf is None:
        srf = srf_from_moments(pair_moments(hsi, degradation(msi)), len(msi))
    return degradation, srf


def _check(
    lr_hsi: Tensor, hr_msi: Tensor, scale: int, degradation: Degradation | None, srf: Tensor | None
) -> None:
    for name, image in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        checks.dense(name, image, dims=3)
        if not image.numel():
            raise ValueError(f"{name}: expected at least one pixel, got {tuple(image.shape)}")
    checks.alike("hr_msi", hr_msi, "lr_hsi", lr_hsi)
    checks.integer("scale", scale, low=1)
    size = tuple(scale * side for side in lr_hsi.shape[-2:])
    if tuple(hr_msi.shape[-2:]) != size:
        raise ValueError(
            f"hr_msi: expected {scale} times the rows and columns of lr_hsi, {size}, "
            f"got {tuple(hr_msi.shape)}"
        )
    for name, image in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        if image.device.type == "meta" or not image.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN, infinite ones or none")
    if degradation is not None:
        checks.of_type("degradation", degradation, Degradation, "a Degradation or None")
    if srf is not None:
        checks.response("srf", srf, (len(hr_msi), len(lr_hsi)))


# ------------------------------------------------------------------------------------------------
# Statistics of the whole scene: sums, which add up over tiles
# ------------------------------------------------------------------------------------------------


def pair_moments(hsi: Tensor, low_msi: Tensor) -> Tensor:
    """Sums over pixels of ``[1, m, y] (outer) [1, m, y]``: ``(1+g+G, 1+g+G)``, float64.

    ``hsi (G, ...)`` and ``low_msi (g, ...)`` have their pixels in the same order.
    """
    msi = low_msi.flatten(1).double()
    values = torch.cat([torch.ones_like(msi[:1]), msi, hsi.flatten(1).double()])
    return values @ values.T


def srf_from_moments(moments: Tensor, msi_bands: int) -> Tensor:
    """The response ``(g, G)`` by non-negative least squares, one MSI band at a time."""
    from scipy.optimize import nnls

    first = 1 + msi_bands
    gram = moments[first:, first:]
    # The bands are nearly dependent: a ridge far below the noise keeps the problem decided.
    gram = gram + 1e-10 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram)).to(gram)
    root = torch.linalg.cholesky(gram)
    right = torch.linalg.solve_triangular(root, moments[first:, 1:first], upper=False)
    matrix = root.T.cpu().numpy()
    rows = [nnls(matrix, column.cpu().numpy(), maxiter=100 * len(gram))[0] for column in right.T]
    return torch.stack([torch.from_numpy(row) for row in rows]).to(moments)


def edge_mask(rows: int, columns: int) -> Tensor:
    """``(rows, columns)``: True within `EDGE` pixels of the edge."""
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[EDGE:-EDGE, EDGE:-EDGE] = False
    return mask


def edge_misfit(whole: Tensor, at_edge: Tensor, msi_bands: int) -> float:
    """What the HSI, which explains the MSI of the whole scene as far as it can, leaves of it near
    the edge: from the `pair_moments` of the whole and of the pixels of `edge_mask`."""
    first = 1 + msi_bands
    gram, mixed = whole[first:, first:], whole[first:, 1:first]
    ridge = 1e-13 * gram.diagonal().mean().clamp_min(1e-12)
    srf = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), mixed).T
    rest = torch.cat([torch.eye(msi_bands).to(srf), -srf], 1)
    return ((rest @ at_edge[1:, 1:]) * rest).sum().clamp_min(0).item()


def likeliest_boundary(misfits: Mapping[str, float]) -> str:
    """The boundary that leaves least at the edge; mirrored where none stands out."""
    best = min(misfits, key=misfits.__getitem__)
    return "symmetric" if misfits[best] > 0.8 * misfits["symmetric"] else best


def middle(rows: int, columns: int) -> tuple[slice, slice]:
    """The part of an HSI that tells the PSF: all of it, or the middle of a large one."""
    first = [max(0, (length - LARGEST) // 2) for length in (rows, columns)]
    return (
        slice(first[0], first[0] + min(rows, LARGEST)),
        slice(first[1], first[1] + min(columns, LARGEST)),
    )


def times(pixels: slice, scale: int) -> slice:
    """The same pixels on a grid that is ``scale`` times finer."""
    return slice(pixels.start * scale, pixels.stop * scale)


# ------------------------------------------------------------------------------------------------
# The PSF
# ------------------------------------------------------------------------------------------------


class _Psf(NamedTuple):
    """Widths and centre of the first sample, in MSI pixels, along rows and columns."""

    sigma_y: float
    sigma_x: float
    y: float
    x: float

    def profiles(self, scale: int) -> _Profiles:
        offset = min(max(math.floor(min(self.y, self.x) + 0.5), 0), scale - 1)
        lines = []
        for sigma, centre in ((self.sigma_y, self.y), (self.sigma_x, self.x)):
            away = centre - offset
            radius = math.ceil(3 * sigma + abs(away))
            line = _gaussian(torch.arange(-radius, radius + 1) - away, sigma)
            lines.append(line / line.sum())
        return _Profiles(lines[0], lines[1], offset)


class _Profiles(NamedTuple):
    """A separable PSF: its profile along each axis, and where the first sample is taken."""

    column: Tensor
    row: Tensor
    offset: int

    def with_line(self, column: bool, line: Tensor) -> _Profiles:
        return self._replace(column=line) if column else self._replace(row=line)

    def degradation(self, scale: int, boundary: str = "replicate") -> Degradation:
        return Degradation(torch.outer(self.column, self.row), scale, self.offset, boundary)


def _gaussian(position: Tensor, sigma: float) -> Tensor:
    return torch.exp(-0.5 * (position.double() / sigma) ** 2)


class _Misfit:
    """How much of the degraded MSI the HSI's bands do not explain, band by band."""

    def __init__(self, hsi: Tensor, msi: Tensor, scale: int) -> None:
        self.scale, self.msi = scale, msi
        height, width = hsi.shape[-2:]
        # Edge pixels depend on what lies beyond the image; leave them out where enough remain.
        margin = min(3, min(height, width) // 6)
        self.inside = (
            ...,
            slice(margin, height - margin),
            slice(margin, width - margin),
        )
        spectra = hsi[self.inside].flatten(1).T
        spectra = torch.cat([torch.ones_like(spectra[:, :1]), spectra - spectra.mean(0)], 1)
        vectors, values, _ = torch.linalg.svd(spectra, full_matrices=False)
        # Four pixels for every direction, or they would explain anything.
        keep = min(int((values > 1e-6 * values[0]).sum()), max(1, len(spectra) // 4))
        self.basis = vectors[:, :keep]

    def residual(self, low_msi: Tensor) -> Tensor:
        """Unexplained share ``(g, pixels)`` of a degraded MSI without its mean; the squares of a
        band's row sum to 1 where nothing is explained."""
        whole = low_msi[self.inside].flatten(1)
        whole = whole - whole.mean(1, keepdim=True)
        rest = whole - (whole @ self.basis) @ self.basis.T
        return rest / whole.norm(dim=1, keepdim=True).clamp_min(1e-15)

    def of(self, profiles: _Profiles) -> Tensor:
        return self.residual(profiles.degradation(self.scale)(self.msi))

    def at(self, psf: _Psf) -> Tensor:
        return self.of(psf.profiles(self.scale))


def candidate_degradations(hsi: Tensor, msi: Tensor, scale: int) -> dict[str, Degradation]:
    """The PSF of a pair, cut to its `middle`, with each of the boundaries; float64 in and out."""
    misfit = _Misfit(hsi, msi, scale)
    centre, sigma = (scale - 1) / 2, 0.5 * scale
    steps = [centre + scale * s for s in (-1, -0.5, 0, 0.5, 1)]
    start = min(
        (_Psf(sigma, sigma, y, x) for y in steps for x in steps),
        key=lambda psf: misfit.at(psf).square().sum().item(),
    )
    best = _gauss_newton(misfit, start).profiles(scale)
    unexplained = misfit.of(best).square().sum().item()
    # Below, it is a Gaussian; and a few pixels cannot tell a profile tap by tap.
    if unexplained > 1e-6 and misfit.basis.shape[0] >= 16 * len(best.column):
        free = _free_profiles(misfit, best)
        if misfit.of(free).square().sum().item() < 0.5 * unexplained:
            best = free
    return {boundary: best.degradation(scale, boundary) for boundary in BOUNDARIES}


def _free_profiles(misfit: _Misfit, profiles: _Profiles) -> _Profiles:
    """Non-negative profiles that sum to 1, by least squares along one axis after the other.

    They are drawn to the Gaussian's in as far as the data, by what they leave unexplained, are
    noisy: a Gaussian prior of a tenth of the peak.
    """
    prior = profiles
    for turn in range(12):
        along_columns = turn % 2 == 0
        line, start = (p.column if along_columns else p.row for p in (profiles, prior))
        # The degraded MSI is linear in one profile: what each of its taps alone gives.
        taps = []
        for tap in torch.eye(len(line), dtype=line.dtype):
            one = profiles.with_line(along_columns, tap)
            taps.append(one.degradation(misfit.scale)(misfit.msi)[misfit.inside].flatten(1))
        columns = torch.stack(taps, 1)  # (g, taps, pixels)
        columns = columns - columns.mean(2, keepdim=True)
        whole = torch.einsum("gtp,t->gp", columns, line).norm(dim=1).clamp_min(1e-15)
        columns = columns / whole[:, None, None]
        columns = columns - (columns @ misfit.basis) @ misfit.basis.T

        noise = torch.einsum("gtp,t->gp", columns, line).square().mean()
        pull = noise / (0.1 * start.max()) ** 2
        # Least squares with the taps' sum for a constraint (its multiplier is the last unknown).
        gram = torch.einsum("gtp,gup->tu", columns, columns)
        size, ones = len(line), torch.ones_like(line)[:, None]
        gram = gram + (pull + 1e-12 * gram.diagonal().mean()) * torch.eye(size, dtype=line.dtype)
        system = torch.cat([torch.cat([gram, ones], 1), torch.cat([ones, ones[:1] * 0]).T])
        right = torch.cat([pull * start, ones[0]])
        line = torch.linalg.solve(system, right)[:size].clamp_min(0)
        line = line / line.sum().clamp_min(1e-15)
        profiles = profiles.with_line(along_columns, line)
    return profiles


def _gauss_newton(misfit: _Misfit, psf: _Psf) -> _Psf:
    """Levenberg and Marquardt's descent with numerical derivatives, one for each of 4 numbers."""
    scale = misfit.scale
    step = 0.02 * scale

    value, damping = misfit.at(psf).flatten(), 1e-3
    for _ in range(20):
        columns = []
        for number in range(4):
            moved = list(psf)
            moved[number] += step
            columns.append((misfit.at(_Psf(*moved)).flatten() - value) / step)
        jacobian = torch.stack(columns, 1)
        gram, gradient = jacobian.T @ jacobian, jacobian.T @ value
        while damping < 1e6:
            change = torch.linalg.solve(
                gram + damping * torch.diag(gram.diagonal() + 1e-30), gradient
            )
            change = change.clamp(-0.5 * scale, 0.5 * scale)
            trial = _Psf(*(now - c for now, c in zip(psf, change.tolist(), strict=True)))
            trial = trial._replace(
                sigma_y=min(max(trial.sigma_y, 0.15), 2.0 * scale),
                sigma_x=min(max(trial.sigma_x, 0.15), 2.0 * scale),
                y=min(max(trial.y, -1.5 * scale), 2.5 * scale),
                x=min(max(trial.x, -1.5 * scale), 2.5 * scale),
            )
            new = misfit.at(trial).flatten()
            if new.square().sum() < value.square().sum():
                break
            damping *= 10
        else:
            return psf
        moved_by = max(abs(a - b) for a, b in zip(trial, psf, strict=True))
        psf, value, damping = trial, new, damping / 10
        if moved_by < 1e-4 * scale:
            return psf
        step = min(step, max(1e-3 * scale, moved_by))
    return psf
