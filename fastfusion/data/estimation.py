"""Sensors told from a pair: the PSF with its sub-pixel position, and the spectral response."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastfusion.data.sensors import BOUNDARIES, Degradation

__all__ = ["estimate_sensors"]


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
    centre takes up a shift between the sensors.  The boundary is the one that leaves least at the
    edge.  The response then follows by non-negative least squares (FSRVL, equation 15).

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
    rows = [nnls(root.T.cpu().numpy(), column.cpu().numpy())[0] for column in right.T]
    return torch.stack([torch.from_numpy(row) for row in rows]).to(hsi)


class _Psf(NamedTuple):
    """Widths and centre of the first sample, in MSI pixels, along rows and columns."""

    sigma_y: float
    sigma_x: float
    y: float
    x: float

    def degradation(self, scale: int, boundary: str = "replicate") -> Degradation:
        offset = min(max(math.floor(min(self.y, self.x) + 0.5), 0), scale - 1)
        lines = []
        for sigma, centre in ((self.sigma_y, self.y), (self.sigma_x, self.x)):
            away = centre - offset
            radius = math.ceil(3 * sigma + abs(away))
            line = _gaussian(torch.arange(-radius, radius + 1) - away, sigma)
            lines.append(line / line.sum())
        return Degradation(torch.outer(*lines), scale, offset, boundary)


def _gaussian(position: Tensor, sigma: float) -> Tensor:
    return torch.exp(-0.5 * (position.double() / sigma) ** 2)


class _Misfit:
    """How much of the degraded MSI the HSI's bands do not explain, band by band."""

    def __init__(self, hsi: Tensor, msi: Tensor, scale: int) -> None:
        self.msi, self.scale = msi, scale
        # Edge pixels depend on what lies beyond the image; leave them out where enough remain.
        margin = 2 if min(hsi.shape[-2:]) >= 12 else 0
        self.inside = (slice(None), *(slice(margin, n - margin) for n in hsi.shape[-2:]))
        spectra = hsi[self.inside].flatten(1).T
        spectra = torch.cat([torch.ones_like(spectra[:, :1]), spectra - spectra.mean(0)], 1)
        vectors, values, _ = torch.linalg.svd(spectra, full_matrices=False)
        # Eight pixels for every direction, or they would explain anything.
        keep = min(int((values > 1e-6 * values[0]).sum()), max(1, len(spectra) // 8))
        self.basis = vectors[:, :keep]

    def residual(self, low_msi: Tensor) -> tuple[Tensor, Tensor]:
        """Unexplained part ``(pixels, g)`` and the whole, both without their means."""
        whole = low_msi[self.inside].flatten(1).T
        whole = whole - whole.mean(0)
        return whole - self.basis @ (self.basis.T @ whole), whole

    def at(self, psf: _Psf) -> float:
        rest, whole = self.residual(psf.degradation(self.scale)(self.msi))
        return ((rest**2).sum(0) / (whole**2).sum(0).clamp_min(1e-30)).sum().item()


def _estimate_degradation(hsi: Tensor, msi: Tensor, scale: int) -> Degradation:
    misfit = _Misfit(hsi, msi, scale)
    middle, sigma = (scale - 1) / 2, 0.5 * scale
    steps = [middle + scale * s for s in (-1, -0.5, 0, 0.5, 1)]
    best = min((_Psf(sigma, sigma, y, x) for y in steps for x in steps), key=misfit.at)
    best = _gauss_newton(misfit, best)
    at_edge = {
        boundary: _edge_misfit(hsi, best.degradation(scale, boundary)(msi))
        for boundary in BOUNDARIES
    }
    return best.degradation(scale, min(at_edge, key=at_edge.__getitem__))


def _gauss_newton(misfit: _Misfit, psf: _Psf) -> _Psf:
    """Levenberg and Marquardt's descent with numerical derivatives, one for each of 4 numbers."""
    scale = misfit.scale
    step = 0.02 * scale

    def scaled(psf: _Psf) -> Tensor:
        rest, whole = misfit.residual(psf.degradation(scale)(misfit.msi))
        return (rest / whole.norm(dim=0).clamp_min(1e-15)).flatten()

    value, damping = scaled(psf), 1e-3
    for _ in range(20):
        columns = []
        for number in range(4):
            moved = list(psf)
            moved[number] += step
            columns.append((scaled(_Psf(*moved)) - value) / step)
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
            new = scaled(trial)
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
