"""Two closed forms in plain NumPy and SciPy: naive, readable, independent of the package.

`regression` is the one of `fastfusion.models.regression`; `recipe` its predecessor with polynomial
features and a single local step, which it must not fall behind.  Both know LSO's degradation only.

``python tests/models/regression_oracle.py FOLDER SRF SCENE ...`` prints PSNRs of CAVE scenes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy import ndimage


def gaussian_kernel(sigma: float, radius: int) -> np.ndarray:
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return line / line.sum()


def blur(cube: np.ndarray, sigma: float) -> np.ndarray:
    line = gaussian_kernel(sigma, int(np.ceil(3 * sigma)))
    return ndimage.correlate1d(
        ndimage.correlate1d(cube, line, axis=-2, mode="wrap"), line, axis=-1, mode="wrap"
    )


def degrade(cube: np.ndarray, scale: int) -> np.ndarray:
    """LSO's degradation: Gaussian of half a low-resolution pixel, circular, from offset 0."""
    return blur(cube, 0.5 * scale)[..., ::scale, ::scale]


def linear(distance: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(distance), 0, None)


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    d = np.abs(distance)
    inner = 1.5 * d**3 - 2.5 * d**2 + 1
    outer = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, inner, np.where(d < 2, outer, 0))


def upsample(cube: np.ndarray, scale: int, kernel=cubic) -> np.ndarray:
    """Interpolate on a torus; low-resolution pixel ``i`` lies at full-resolution ``i*scale``."""

    def matrix(low: int) -> np.ndarray:
        distance = np.arange(low * scale)[:, None] / scale - np.arange(low)
        return sum(kernel(distance + turn * low) for turn in (-1, 0, 1))

    return matrix(cube.shape[-2]) @ cube @ matrix(cube.shape[-1]).T


def project(fused: np.ndarray, msi: np.ndarray, srf: np.ndarray) -> np.ndarray:
    """The least change of every spectrum that gives the MSI."""
    missing = msi - np.tensordot(srf, fused, axes=1)
    return fused + np.tensordot(np.linalg.pinv(srf), missing, axes=1)


def solve_windows(guides, target, sigma, ridge, floor, fine=0.0):
    """Slopes ``(g, G, h, w)`` and offsets ``(G, h, w)`` of ridge regressions around each pixel.

    ``fine`` weighs what pixels differ by from their four neighbours, beside what they differ by
    from the window's mean.
    """

    def detail(cube):
        beside = [np.roll(cube, shift, axis) for axis in (-2, -1) for shift in (-1, 1)]
        return cube - sum(beside) / 4

    mean, target_mean = blur(guides, sigma), blur(target, sigma)
    variance = blur(guides[:, None] * guides, sigma) - mean[:, None] * mean
    covariance = blur(guides[:, None] * target, sigma) - mean[:, None] * target_mean
    edges = detail(guides)
    variance += fine * blur(edges[:, None] * edges, sigma)
    covariance += fine * blur(edges[:, None] * detail(target), sigma)
    slopes = np.empty_like(covariance)
    for row, column in np.ndindex(guides.shape[1:]):
        v = variance[:, :, row, column]
        damped = v + (ridge * np.trace(v) + floor) * np.eye(len(v))
        slopes[:, :, row, column] = np.linalg.solve(damped, covariance[:, :, row, column])
    return slopes, target_mean - (slopes * mean[:, None]).sum(0)


def regression(lr_hsi, msi, srf, *, local=True, ridge=1e-4, iterations=4):
    lr_hsi, msi = lr_hsi.astype(np.float64), msi.astype(np.float64)
    guides, scale = len(msi), msi.shape[1] // lr_hsi.shape[1]
    low_msi = degrade(msi, scale)

    # One map for the whole scene
    design = np.stack([np.ones_like(low_msi[0]), *low_msi]).reshape(guides + 1, -1).T
    weights = np.linalg.lstsq(design, lr_hsi.reshape(len(lr_hsi), -1).T, rcond=None)[0].T
    offset = weights[:, 0, None, None] * np.ones_like(lr_hsi)
    slopes = weights[:, 1:].T[:, :, None, None] * np.ones_like(lr_hsi)
    detail, sharpness = np.zeros_like(msi), np.zeros(len(lr_hsi))

    if local:
        sigma = np.sqrt((guides + 1) / (2 * np.pi))
        floor = 1e-6 * low_msi.reshape(guides, -1).var(1).sum()
        detail = blur(msi, 0.25 * scale) - msi
        low_detail = degrade(detail, scale)

        # One map for each pixel, on what is left
        rest = lr_hsi - (slopes * low_msi[:, None]).sum(0) - offset
        more, shift = solve_windows(low_msi, rest, sigma, ridge, floor)
        slopes, offset = slopes + more, offset + shift

        # How sharp is each band?
        def remainder(target):
            s, o = solve_windows(low_msi, target, 0.75 * sigma, ridge, floor)
            return target - (s * low_msi[:, None]).sum(0) - o

        change = (slopes * low_detail[:, None]).sum(0)
        u = remainder(change)
        r = remainder(lr_hsi - (slopes * low_msi[:, None]).sum(0) - offset)
        uu, ur, rr = (u * u).sum((1, 2)), (u * r).sum((1, 2)), (r * r).sum((1, 2))
        amount = ur / uu
        uncertainty = (rr - amount * ur) / u[0].size / uu
        sharpness = amount * amount**2 / (amount**2 + 16 * uncertainty)

        # Once more, for guides as sharp as the band, and above all for the finest detail
        seen = (slopes * low_msi[:, None]).sum(0) + sharpness[:, None, None] * change + offset
        more, shift = solve_windows(low_msi, lr_hsi - seen, sigma, ridge, floor, fine=10.0)
        slopes, offset = slopes + more, offset + shift

    fused = upsample(offset, scale, linear)
    for guide in range(guides):
        sharp = msi[guide] + sharpness[:, None, None] * detail[guide]
        fused = fused + upsample(slopes[guide], scale, linear) * sharp

    # Back to both sensors
    fused = project(fused, msi, srf)
    for _ in range(iterations):
        fused = fused + upsample(lr_hsi - degrade(fused, scale), scale)
    return project(fused, msi, srf).clip(0, 1)


def recipe(lr_hsi, msi, srf, *, local=True, ridge=1e-3, iterations=2):
    lr_hsi, msi = lr_hsi.astype(np.float64), msi.astype(np.float64)
    guides, scale = len(msi), msi.shape[1] // lr_hsi.shape[1]
    low_msi = degrade(msi, scale)

    def features(m):
        products = [m[i] * m[j] for i in range(guides) for j in range(i, guides)]
        return np.stack([np.ones_like(m[0]), *m, *products, *np.sqrt(m)])

    design = features(low_msi).reshape(-1, low_msi[0].size).T
    weights = np.linalg.lstsq(design, lr_hsi.reshape(len(lr_hsi), -1).T, rcond=None)[0]
    fused = np.tensordot(weights.T, features(msi), axes=1)
    if local:
        rest = lr_hsi - degrade(fused, scale)
        slopes, offset = solve_windows(low_msi, rest, 1.0, ridge, 1e-12)
        fused = fused + upsample(offset, scale)
        for guide in range(guides):
            fused += upsample(slopes[guide], scale) * msi[guide]
    for _ in range(iterations):
        fused = fused + upsample(lr_hsi - degrade(fused, scale), scale)
        fused = project(fused, msi, srf)
    return fused.clip(0, 1)


def psnr(fused: np.ndarray, reference: np.ndarray) -> float:
    """Mean over bands, range 1."""
    return float(-10 * np.log10(((fused - reference) ** 2).mean((1, 2))).mean())


if __name__ == "__main__":
    from PIL import Image
    from scipy.io import loadmat

    folder, response = Path(sys.argv[1]), loadmat(sys.argv[2])["P"]
    for name in sys.argv[3:]:
        files = sorted((folder / f"{name}_ms").glob("*.png"))
        scene = np.stack([np.asarray(Image.open(file)) for file in files]) / 65535
        observed = np.tensordot(response, scene, axes=1)
        for ratio in (4, 8):
            low = degrade(scene, ratio)
            print(
                f"{name} x{ratio}: recipe {psnr(recipe(low, observed, response), scene):.2f} dB, "
                f"ridge 1e-4, 4 rounds "
                f"{psnr(recipe(low, observed, response, ridge=1e-4, iterations=4), scene):.2f} dB, "
                f"regression {psnr(regression(low, observed, response), scene):.2f} dB",
                flush=True,
            )
