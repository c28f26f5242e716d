"""Cases to fuse, how they are scored, and methods side by side."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion import metrics
from fastfusion.data.cube import Cube
from fastfusion.data.estimation import estimate_sensors
from fastfusion.data.scenes import Scene
from fastfusion.data.sensors import Degradation, apply_srf, srf_from_bands
from fastfusion.fusing import fuse

__all__ = [
    "Case",
    "broad_bands",
    "case_of",
    "csv_table",
    "displaced",
    "markdown_table",
    "run",
    "score",
    "with_sensors",
]


# ------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair to fuse, without a batch and in [0, 1], and what is known of it.

    Attributes:
        name: of the scene.
        protocol: where the two images come from, in a line.
        lr_hsi: ``(G, h, w)``.
        hr_msi: ``(g, H, W)``.
        reference: ``(G, H, W)``, where there is one.
        wavelengths: ``(G,)`` in nm, where known.
        srf: ``(g, G)``, where known.
        degradation: the hyperspectral sensor's blur and sampling, where known.
    """

    name: str
    protocol: str
    lr_hsi: Tensor
    hr_msi: Tensor
    reference: Tensor | None = None
    wavelengths: np.ndarray | None = None
    srf: Tensor | None = None
    degradation: Degradation | None = None

    @property
    def scale(self) -> int:
        return self.hr_msi.shape[-1] // self.lr_hsi.shape[-1]


def case_of(
    scene: Scene,
    scale: int | None = None,
    *,
    srf: Tensor | None = None,
    degradation: Degradation | None = None,
    shift: float = 0.0,
    rotation: float = 0.0,
    zoom: float = 1.0,
) -> Case:
    """The pair to fuse that a scene gives.

    A scene with a reference is degraded by Wald's protocol: the hyperspectral image by
    ``degradation``, and the multispectral one, where no real sensor took it, by ``srf``. The
    reference stays in register with the multispectral image. A scene without one is fused as it
    was acquired.

    Args:
        scene: from `fastfusion.data.load_scene`.
        scale: how many times coarser the hyperspectral image becomes; by default the scene's own,
            or 4. Rows and columns of the reference beyond a multiple of it are cut off.
        srf: ``(g, G)``; by default the scene's own, or `broad_bands`.
        degradation: by default `Degradation.gaussian`, that of LSO's authors.
        shift, rotation, zoom: how far the hyperspectral sensor is out of register, in pixels of
            the reference, degrees and times; see `displaced`.

    Raises:
        ValueError: the scene has another scale or is smaller than it; the sensors do not fit.
    """
    if scene.reference is None:
        return _as_acquired(scene, scale, srf, degradation)
    cube = scene.reference
    scale = scale or scene.scale or 4
    if not 2 <= scale <= min(cube.shape[1:]):
        raise ValueError(
            f"scale: expected 2 to {min(cube.shape[1:])} for {scene.name}, got {scale}"
        )
    height, width = (side // scale * scale for side in cube.shape[1:])
    reference = torch.from_numpy(np.ascontiguousarray(cube.data[:, :height, :width], np.float32))
    if degradation is None:
        degradation = Degradation.gaussian(scale)
    lr_hsi = degradation(displaced(reference, shift, rotation, zoom))
    protocol = "Wald"
    if (shift, rotation, zoom) != (0, 0, 1):
        protocol += f", HSI moved {shift:g} pixels, turned {rotation:g} degrees, zoomed {zoom:g}"
    if scene.hr_msi is not None:
        # A real sensor's tabulated response is not what it measured: leave it to be estimated.
        hr_msi = torch.from_numpy(np.array(scene.hr_msi.data[:, :height, :width], np.float32))
        protocol += ", MSI as acquired"
    else:
        if srf is None:
            srf = broad_bands(cube) if scene.srf is None else torch.from_numpy(scene.srf)
        srf = srf.float()
        hr_msi = apply_srf(reference, srf)
    return Case(scene.name, protocol, lr_hsi, hr_msi, reference, cube.wavelengths, srf, degradation)


def _as_acquired(
    scene: Scene, scale: int | None, srf: Tensor | None, degradation: Degradation | None
) -> Case:
    if scene.lr_hsi is None or scene.hr_msi is None:
        raise ValueError(f"{scene.name}: expected a reference, or an HSI and an MSI")
    if scale not in (None, scene.scale):
        raise ValueError(f"scale: {scene.name} was acquired at {scene.scale}, got {scale}")
    if srf is None and scene.srf is not None:
        srf = torch.from_numpy(scene.srf)
    if degradation is None and scene.psf is not None and scene.scale is not None:
        degradation = Degradation.block(scene.scale, torch.from_numpy(scene.psf))
    lr_hsi, hr_msi = (
        torch.from_numpy(np.array(cube.data, np.float32)) for cube in (scene.lr_hsi, scene.hr_msi)
    )
    return Case(
        scene.name,
        "as acquired",
        lr_hsi,
        hr_msi,
        wavelengths=scene.lr_hsi.wavelengths,
        srf=None if srf is None else srf.float(),
        degradation=degradation,
    )


# Centres and full widths at half maximum in nm of Landsat 8's blue, green, red, near-infrared and
# two shortwave-infrared bands (USGS), taken as Gaussians.
_BROAD = ((482, 60), (561, 57), (655, 38), (865, 28), (1609, 85), (2201, 187))


def broad_bands(cube: Cube) -> Tensor:
    """The response of a plain multispectral sensor, ``(g, G)``: Landsat 8's bands as Gaussians.

    Those bands that the cube covers; three bands spread over a cube without wavelengths, or one
    that covers fewer than three of them.

    >>> broad_bands(Cube(np.ones((31, 4, 4)), wavelengths=np.arange(400, 701, 10))).shape
    torch.Size([3, 31])
    """
    if cube.wavelengths is not None:
        axis = cube.wavelengths
        covered = [band for band in _BROAD if axis.min() <= band[0] <= axis.max() - band[1] / 2]
        if len(covered) >= 3:
            centres, widths = np.array(covered, np.float64).T
            return srf_from_bands(centres, widths, axis).float()
    position = (torch.arange(cube.bands) + 0.5) / cube.bands
    centre = torch.tensor([5 / 6, 1 / 2, 1 / 6])[:, None]
    return torch.softmax(-0.5 * ((position - centre) / 0.12) ** 2, dim=1)


def displaced(cube: Tensor, shift: float = 0.0, rotation: float = 0.0, zoom: float = 1.0) -> Tensor:
    """A cube as a sensor out of register sees it; cubic interpolation, mirrored at the edges.

    Args:
        cube: ``(G, H, W)``.
        shift: pixels that the image moves down and to the right, after the other two.
        rotation: degrees that it turns about its centre.
        zoom: times that it grows about its centre.

    >>> cube = torch.rand(2, 8, 8)
    >>> torch.allclose(displaced(cube, shift=1)[:, 1:, 1:], cube[:, :-1, :-1], atol=1e-6)
    True
    """
    if (shift, rotation, zoom) == (0, 0, 1):
        return cube
    height, width = cube.shape[-2:]
    cos = math.cos(math.radians(rotation)) / zoom
    sin = math.sin(math.radians(rotation)) / zoom
    # Where in the image, in pixels from its centre, a pixel of the result comes from ...
    matrix = np.array([[cos, sin], [-sin, cos]])
    offset = -matrix @ np.full(2, shift)
    # ... and the same in the units of affine_grid, where each side is 2 long.
    half = np.array([width, height]) / 2
    theta = np.column_stack([matrix * half / half[:, None], offset / half])
    grid = F.affine_grid(
        torch.from_numpy(theta).to(cube)[None], [1, *cube.shape], align_corners=False
    )
    return F.grid_sample(
        cube[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )[0]


# ------------------------------------------------------------------------------------------------
# Running and scoring
# ------------------------------------------------------------------------------------------------


def run(case: Case, method: str, *, blind: bool = False, **options: Any) -> Tensor:
    """Fuse a case to ``(G, H, W)``.

    Args:
        case: what to fuse.
        method, options: see `fastfusion.fuse`.
        blind: keep from the method what is known of the sensors.
    """
    known: dict[str, Any] = {} if blind else {"srf": case.srf, "psf": case.degradation}
    return fuse(case.lr_hsi, case.hr_msi, method, **known, **options)


def with_sensors(case: Case) -> Case:
    """The same case with estimates of the sensors that are not known, to check a result by."""
    if case.srf is not None and case.degradation is not None:
        return case
    degradation, srf = estimate_sensors(
        case.lr_hsi, case.hr_msi, case.scale, degradation=case.degradation, srf=case.srf
    )
    return dataclasses.replace(case, srf=srf.to(case.lr_hsi), degradation=degradation)


def score(case: Case, fused: Tensor) -> dict[str, float]:
    """The figures of a fused cube, named as in `fastfusion.metrics`, where its conventions are.

    With a reference: ``psnr``, ``sam``, ``ergas``, ``ssim``, ``mrae``. Without one: ``d_lambda``
    and, with the sensors, ``d_s``, ``qnr`` and how far the cube is from explaining the two images,
    ``rmse_lr_hsi`` and ``rmse_hr_msi``. Images smaller than a metric's window lack that metric.
    """
    if case.reference is not None:
        figures = {
            "psnr": metrics.psnr(fused, case.reference),
            "sam": metrics.sam(fused, case.reference),
            "ergas": metrics.ergas(fused, case.reference, ratio=case.scale),
            "mrae": metrics.mrae(fused, case.reference),
        }
        if min(fused.shape[-2:]) >= 6:
            figures["ssim"] = metrics.ssim(fused, case.reference)
    else:
        figures = _without_reference(case, fused)
    return {name: value.item() for name, value in figures.items()}


def _without_reference(case: Case, fused: Tensor) -> dict[str, Tensor]:
    figures = {}
    large_enough = min(case.lr_hsi.shape[-2:]) >= 11
    if large_enough:
        figures["d_lambda"] = metrics.d_lambda(fused, case.lr_hsi)
    if large_enough and case.srf is not None:
        lr_msi = None if case.degradation is None else case.degradation(case.hr_msi)
        figures["d_s"] = metrics.d_s(fused, case.lr_hsi, case.hr_msi, srf=case.srf, lr_msi=lr_msi)
        figures["qnr"] = (1 - figures["d_lambda"]) * (1 - figures["d_s"])
    if case.degradation is not None:
        figures["rmse_lr_hsi"] = _rmse(case.degradation(fused), case.lr_hsi)
    if case.srf is not None:
        figures["rmse_hr_msi"] = _rmse(apply_srf(fused, case.srf), case.hr_msi)
    return figures


def _rmse(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean().sqrt()


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

#: Columns of a Markdown table: key of the row, heading, format.
_COLUMNS = (
    ("scene", "scene", ""),
    ("scale", "scale", ""),
    ("sensors", "sensors", ""),
    ("method", "method", ""),
    ("psnr", "PSNR (dB)", ".2f"),
    ("sam", "SAM (°)", ".2f"),
    ("ergas", "ERGAS", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("d_lambda", "D_λ", ".4f"),
    ("d_s", "D_s", ".4f"),
    ("qnr", "QNR", ".4f"),
    ("seconds", "time (s)", ".2f"),
)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the rows' figures, with the columns that any row has.

    >>> print(markdown_table([{"scene": "demo", "scale": 4, "psnr": 41.234}]))
    | scene | scale | PSNR (dB) |
    |---|---|---|
    | demo | 4 | 41.23 |
    """
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    lines = [[heading for _, heading, _ in columns]]
    lines += [
        [format(row[key], form) if key in row else "" for key, _, form in columns] for row in rows
    ]
    head, *body = ("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that the rows hold, in full precision, as comma-separated values."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, keys, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
