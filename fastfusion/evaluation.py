"""Cases to fuse, how they are scored, and methods side by side."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfusion import metrics
from fastfusion.data.cube import Cube
from fastfusion.data.estimation import estimate_sensors
from fastfusion.data.scenes import Scene
from fastfusion.data.sensors import Degradation, apply_srf, srf_from_bands
from fastfusion.fusing import fuse
from fastfusion.models.base import FusionModel
from fastfusion.models.regression import RegressionModel
from fastfusion.ops import checks
from fastfusion.ops.operator import backend as backend_for_block

__all__ = [
    "CROSS_SCALE",
    "Case",
    "Cost",
    "averages",
    "broad_bands",
    "case_of",
    "csv_table",
    "displaced",
    "fourier_resized",
    "markdown_table",
    "run",
    "run_across_scales",
    "run_with_cost",
    "score",
    "with_sensors",
]

#: The two ways in which LSO's authors apply a network to pairs of a scale that it was not trained
#: on: what their project page says, and what their released script does.
CROSS_SCALE = {
    "page": "as on LSO's page: the x{trained} network at the pair's own scale",
    "script": "as in LSO's script: the LR-HSI resized in the Fourier domain for the x{trained} "
    "network",
}


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
    checks.of_type("scene", scene, Scene, "a Scene")
    if scale is not None:
        checks.integer("scale", scale, low=-checks.LARGEST)  # its range depends on the scene
    if srf is not None:
        checks.dense("srf", srf, dims=2)
    if degradation is not None:
        checks.of_type("degradation", degradation, Degradation, "a Degradation or None")
    _check_displacement(shift, rotation, zoom)
    if scene.reference is None:
        return _as_acquired(scene, scale, srf, degradation)
    cube = scene.reference
    scale = (scene.scale or 4) if scale is None else scale
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
        checks.response("srf", srf, (len(srf), cube.bands))
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
    checks.of_type("cube", cube, Cube, "a Cube")
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
    checks.dense("cube", cube, dims=3)
    _check_displacement(shift, rotation, zoom)
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


def _check_displacement(shift: float, rotation: float, zoom: float) -> None:
    checks.number("shift", shift)
    checks.number("rotation", rotation)
    checks.positive("zoom", zoom)


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
    checks.of_type("case", case, Case, "a Case")
    checks.flag("blind", blind)
    known: dict[str, Any] = {} if blind else {"srf": case.srf, "psf": case.degradation}
    return fuse(case.lr_hsi, case.hr_msi, method, **known, **options)


def run_across_scales(
    case: Case,
    weights: str | os.PathLike[str],
    protocol: str,
    *,
    blind: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, str]:
    """Fuse a case by a network that was trained for pairs of another scale.

    Args:
        case: what to fuse.
        weights: the network's file, written by its ``save``.
        protocol: ``"page"`` applies the network, none of whose weights depends on the scale, at
            the case's own scale. ``"script"`` leaves the network at its scale ``s`` and resizes
            the hyperspectral image to ``(H/s, W/s)`` in the Fourier domain. See `CROSS_SCALE`. A
            network on the regression's prior gets that of the pair as it is, by both, and its
            result is brought back to that pair, as in `fastfusion.fuse`.
        blind: keep from that prior what is known of the sensors.
        backend: the kernels to run on.

    Returns:
        ``(G, H, W)``, and the protocol in a line.

    Raises:
        ValueError: the protocol is not known; the file or its bands do not fit; the sides of the
            multispectral image are no multiples of the network's scale (``"script"``).
    """
    checks.of_type("case", case, Case, "a Case")
    checks.path("weights", weights)
    checks.choice("protocol", protocol, tuple(CROSS_SCALE))
    model = FusionModel.load(weights)
    trained = model.scale
    low, high = case.lr_hsi[None].float(), case.hr_msi[None].float()
    closed_form, more = None, []
    if getattr(model, "prior", None) == "regression":
        srf, psf = (None, None) if blind else (case.srf, case.degradation)
        closed_form = RegressionModel.fit(low[0], high[0], srf=srf, psf=psf)
        more = [closed_form.apply(low[0], high[0]).clamp_(0, 1)[None]]
    pair = low[0], high[0]
    if protocol == "page":
        model.scale = case.scale
    else:
        if any(side % trained for side in high.shape[-2:]):
            raise ValueError(
                f"{case.name}: a network of scale {trained} needs a multispectral image whose "
                f"sides are multiples of it, got {tuple(high.shape[-2:])}"
            )
        low = fourier_resized(low, [side // trained for side in high.shape[-2:]])
    with torch.no_grad(), _on(backend):
        fused = model(low, high, *more)[0].contiguous()
        if closed_form is not None:
            fused = closed_form.refine(fused, *pair)
    return fused.clamp(0, 1), CROSS_SCALE[protocol].format(trained=trained)


def fourier_resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(..., h, w)`` to ``size`` by cutting or padding its spectrum with zeros.

    The first sample stays where it is, and the image is taken to repeat: `scipy.signal.resample`
    along both axes.

    >>> fourier_resized(torch.ones(2, 4, 6), (8, 3)).shape
    torch.Size([2, 8, 3])
    """
    checks.dense("image", image)
    checks.of_type("size", size, Sequence, "a pair of ints")
    if image.ndim < 2:
        raise ValueError(f"image: expected (..., h, w), got shape {tuple(image.shape)}")
    for dim, length in zip((-2, -1), checks.pair("size", size, low=1), strict=True):
        before = image.shape[dim]
        if length == before:
            continue
        spectrum = torch.fft.rfft(image, dim=dim)
        common = min(before, length)
        kept = spectrum.narrow(dim, 0, common // 2 + 1).clone()
        if common % 2 == 0:  # the highest frequency stands for itself and for its negative
            kept.narrow(dim, common // 2, 1).mul_(2 if length < before else 0.5)
        image = torch.fft.irfft(kept, length, dim=dim) * (length / before)
    return image


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a method took for one case.

    Attributes:
        seconds: of the whole call: loading, fitting and all.
        parameters: trainable numbers of the network that it applied; 0 where it has none.
        gflops: of applying the network once, its prior apart, 2 for a multiply-add, in matrix
            products, convolutions and this library's operators; of a method without a network, of
            all of it. In units of 1e9.
        latency: seconds, the median of three, to do that once more.
    """

    seconds: float
    parameters: int
    gflops: float | None = None
    latency: float | None = None


def run_with_cost(
    fusing: Callable[[], Tensor], *, backend: str = "auto", quick: bool = False
) -> tuple[Tensor, Cost]:
    """Call ``fusing`` and measure what it costs.

    Args:
        fusing: fuses something; the last `FusionModel` that it applies is the network whose cost
            is told.
        backend: the kernels that the network is timed on.
        quick: leave out what needs further runs, ``gflops`` and ``latency``.
    """
    with _networks() as applied:
        start = time.perf_counter()
        fused = fusing()
        seconds = time.perf_counter() - start
    once, parameters = fusing, 0
    if applied:
        network, inputs, named = applied[-1]
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)

        def once() -> Tensor:
            return network(*inputs, **named)

    if quick:
        return fused, Cost(seconds, parameters)
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), _on(backend):
        latency = statistics.median(_seconds(once) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            once()
    return fused, Cost(seconds, parameters, counter.get_total_flops() / 1e9, latency)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextlib.contextmanager
def _networks() -> Iterator[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]:
    """The last model that is applied in the block, and what to."""
    applied: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def remember(module: nn.Module, inputs: tuple[Any, ...], named: dict, output: Any) -> None:
        if isinstance(module, FusionModel):
            applied[:] = [(module, inputs, named)]

    hook = nn.modules.module.register_module_forward_hook(remember, with_kwargs=True)
    try:
        yield applied
    finally:
        hook.remove()


def _on(backend: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if backend == "auto" else backend_for_block(backend)


def with_sensors(case: Case) -> Case:
    """The same case with estimates of the sensors that are not known, to check a result by."""
    if case.srf is not None and case.degradation is not None:
        return case
    degradation, srf = estimate_sensors(
        case.lr_hsi, case.hr_msi, case.scale, degradation=case.degradation, srf=case.srf
    )
    return dataclasses.replace(case, srf=srf.to(case.lr_hsi), degradation=degradation)


def score(case: Case, fused: Tensor, *, both: bool = False) -> dict[str, float]:
    """The figures of a fused cube, named as in `fastfusion.metrics`, where its conventions are.

    With a reference: ``psnr``, ``sam``, ``ergas``, ``ssim``, ``mrae``. Without one, or where
    ``both`` kinds are asked for: ``d_lambda`` and, with the sensors, ``d_s``, ``qnr`` and how far
    the cube is from explaining the two images, ``rmse_lr_hsi`` and ``rmse_hr_msi``. Images smaller
    than a metric's window lack that metric.
    """
    checks.of_type("case", case, Case, "a Case")
    checks.flag("both", both)
    checks.dense("fused", fused, dims=3)
    expected = (len(case.lr_hsi), *case.hr_msi.shape[-2:])
    checks.size("fused", fused, expected, shape="(G, H, W)")
    checks.alike("fused", fused, "hr_msi", case.hr_msi)
    figures: dict[str, Tensor] = {}
    if case.reference is not None:
        figures = {
            "psnr": metrics.psnr(fused, case.reference),
            "sam": metrics.sam(fused, case.reference),
            "ergas": metrics.ergas(fused, case.reference, ratio=case.scale),
            "mrae": metrics.mrae(fused, case.reference),
        }
        if min(fused.shape[-2:]) >= 6:
            figures["ssim"] = metrics.ssim(fused, case.reference)
    if case.reference is None or both:
        figures |= _without_reference(case, fused)
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
    ("parameters", "parameters", ",d"),
    ("gflops", "GFLOP", ",.1f"),
    ("latency", "latency (s)", ".3f"),
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


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each scale, protocol and method: the mean of the figures over the scenes.

    Only of those that more than one scene has, and all of the rows of the scale, so that the means
    compare.

    >>> rows = [{"scene": name, "scale": 4, "method": "m", "psnr": 40.0 + n}
    ...         for n, name in enumerate("ab")]
    >>> averages(rows)
    [{'scene': 'mean of 2', 'scale': 4, 'method': 'm', 'psnr': 40.5}]
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("scale", "cross_scale", "method"))
        groups.setdefault(key, []).append(row)
    means = []
    for members in groups.values():
        scenes = {row["scene"] for row in members}
        every = {row["scene"] for row in rows if row["scale"] == members[0]["scale"]}
        if len(scenes) < 2 or scenes != every:
            continue
        mean: dict[str, Any] = {"scene": f"mean of {len(scenes)}"}
        for name, first in members[0].items():
            values = [row.get(name) for row in members]
            if isinstance(first, float) and all(isinstance(value, float) for value in values):
                mean[name] = statistics.fmean(map(float, values))  # type: ignore[arg-type]
            elif name != "scene" and all(value == first for value in values):
                mean[name] = first
        means.append(mean)
    return means


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that the rows hold, in full precision, as comma-separated values."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, keys, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
