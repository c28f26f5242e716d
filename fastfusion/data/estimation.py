"""Sensors told from a pair: the PSF with its sub-pixel position, and the spectral response."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastfusion.data.sensors import BOUNDARIES, Degradation

__all__ = ["estimate_sensors"]

#: HSI pixels along a side from which the PSF is told; more only take longer.
LARGEST = 160


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
    hsi, msi = lr_hsi.detach().double(), hr_msi.detach().double()
    if degradation is None:
        degradation = _estimate_degradation(hsi, msi, scale)
    if srf is None:
        srf = _estimate_srf(hsi, degradation(msi))
    return degradation, srf


def _estimate_srf(hsi: Tensor, low_msi: Tensor) -> Tensor:
    """Non-negative least squares, one MSI band at a time."""
    from scipy.optimize import nnls

    spectra, target = hsi.flatten(1), low_msi.flatten(1)
    gram = spectra @ spectra.T
    # The bands are nearly dependent: a ridge far below the noise keeps the problem decided.
    gram = gram + 1e-10 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram)).to(gram)
    root = torch.linalg.cholesky(gram)
    right = torch.linalg.solve_triangular(root, spectra @ target.T, upper=False)
    matrix = root.T.cpu().numpy()
    rows = [nnls(matrix, column.cpu().numpy(), maxiter=100 * len(gram))[0] for column in right.T]
    return torch.stack([torch.from_numpy(row) for row in rows]).to(hsi)


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
        # The middle of a large scene tells enough.
        self.scale, crop = scale, [max(0, (n - LARGEST) // 2) for n in hsi.shape[-2:]]
        (top, left), (height, width) = crop, (min(n, LARGEST) for n in hsi.shape[-2:])
        hsi = hsi[:, top : top + height, left : left + width]
        self.msi = msi[
            :, top * scale : (top + height) * scale, left * scale : (left + width) * scale
        ]
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


def _estimate_degradation(hsi: Tensor, msi: Tensor, scale: int) -> Degradation:
    misfit = _Misfit(hsi, msi, scale)
    middle, sigma = (scale - 1) / 2, 0.5 * scale
    steps = [middle + scale * s for s in (-1, -0.5, 0, 0.5, 1)]
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
    at_edge = {
        boundary: _edge_misfit(hsi, best.degradation(scale, boundary)(msi))
        for boundary in BOUNDARIES
    }
    boundary = min(at_edge, key=at_edge.__getitem__)
    if at_edge[boundary] > 0.8 * at_edge["symmetric"]:  # none stands out
        boundary = "symmetric"
    return best.degradation(scale, boundary)


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


def _edge_misfit(hsi: Tensor, low_msi: Tensor) -> float:
    """What the HSI does not explain of the MSI within two pixels of the image's edge."""
    srf = torch.linalg.lstsq(hsi.flatten(1).T, low_msi.flatten(1).T, driver="gelsd").solution.T
    rest = (low_msi - torch.tensordot(srf, hsi, 1)).square().sum(0)
    rest[2:-2, 2:-2] = 0
    return rest.sum().item()
