"""Pictures of fusions: what went in, what came out, where it errs, some spectra; of one fusion, of
several methods side by side, of one method at several scales."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion._optional import need
from fastfusion.data.atomic import atomic_path
from fastfusion.data.cube import real_numbers
from fastfusion.data.sensors import Degradation, apply_srf
from fastfusion.metrics import psnr, sam
from fastfusion.ops import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "comparison_figure",
    "fusion_figure",
    "save_figure",
    "scale_figure",
    "scenes_at_all_scales",
]

# Okabe and Ito's colours and a perceptual map: readable with colour-deficient eyes, and in grey.
_TRUTH, _FUSED, _COARSE, _MARK = "#8C8C8C", "#0072B2", "#D55E00", "#F0E442"
_ERRORS = "magma"
# What is left of Okabe and Ito's, then line styles: no two of 15 methods look alike.
_METHODS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_STYLES = ("-", "--", ":")

_MATERIALS = 3  # spectra shown, beside that of the pixel which fusion changed most
_DETAIL = 0.25  # side of the enlarged window, as a share of the image's shorter side
_LARGEST = 1024  # pixels shown along a side; a larger image is thinned out
_RED_GREEN_BLUE = (640.0, 550.0, 460.0)  # nm


def fusion_figure(
    fused: Tensor,
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    reference: Tensor | None = None,
    wavelengths: Sequence[float] | np.ndarray | None = None,
    srf: Tensor | None = None,
    degradation: Degradation | None = None,
    title: str = "",
) -> Figure:
    """Draw a fusion: the images with an enlarged window, maps of its errors, and some spectra.

    With a reference the errors are the spectral angle, the root mean square error over bands, and
    each band's PSNR. Without one they are what can be checked: the fused cube degraded again
    against ``lr_hsi`` (where ``degradation`` is given) and its projection by the spectral response
    against ``hr_msi`` (where ``srf`` is given).

    Args:
        fused: ``(G, H, W)`` in [0, 1].
        lr_hsi: ``(G, h, w)``.
        hr_msi: ``(g, H, W)``.
        reference: ``(G, H, W)``, if there is one.
        wavelengths: ``(G,)`` band centres in nm; they choose the colours and name the axes.
        srf: ``(g, G)``, the multispectral sensor's response.
        degradation: the hyperspectral sensor's blur and sampling.
        title: a line on top.

    Returns:
        A ``matplotlib.figure.Figure``, which `save_figure` writes.

    Raises:
        TypeError, ValueError: the cubes are no tensors or do not fit together.
        ImportError: matplotlib is not installed.

    >>> cube = torch.rand(4, 32, 32)
    >>> figure = fusion_figure(cube, cube[:, ::4, ::4], cube[:2], reference=cube, title="demo")
    >>> figure.get_suptitle()
    'demo'
    """
    library = need("matplotlib.figure", extra="plot", purpose="drawing a figure")
    scene = _Scene.of(fused, lr_hsi, hr_msi, reference, wavelengths)
    images = scene.composites()
    if scene.reference is None:
        maps = _consistency_maps(scene, srf, degradation)
    else:
        maps = _error_maps(scene, scene.reference)

    rows = 3 if scene.reference is None else 4
    figure = library.Figure(figsize=(13, 3.2 * rows), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=15)
    grid = figure.add_gridspec(rows, 4)
    for column, (name, image) in enumerate(images.items()):
        _draw_image(figure.add_subplot(grid[0, column]), scene, name, image)
        _draw_detail(figure.add_subplot(grid[1, column]), scene, image)
    if scene.reference is None:
        places = [grid[0, 3], grid[1, 3]]
    else:
        places = [grid[2, 0], grid[2, 1]]
        _draw_psnr(figure.add_subplot(grid[2, 2:]), scene, scene.reference)
    for place, error_map in zip(places, maps, strict=False):
        _draw_map(figure.add_subplot(place), error_map)
    for number in range(len(scene.points)):
        _draw_spectra(figure.add_subplot(grid[-1, number]), scene, number)
    return figure


def comparison_figure(
    results: Mapping[str, Tensor],
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    reference: Tensor | None = None,
    wavelengths: Sequence[float] | np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """Draw what several methods made of one pair: a row of each, then their curves together.

    A row holds the composite in the reference's colours and the maps of its root mean square error
    over bands and of its spectral angle, in scales that all rows share; below are the PSNR of each
    band and the spectra of some pixels. Without a reference the map is the change to the bicubic
    image.

    Args:
        results: the fused cubes ``(G, H, W)`` by their methods' names.
        lr_hsi, hr_msi, reference, wavelengths, title: as in `fusion_figure`.

    Raises:
        TypeError, ValueError: the cubes are no tensors or do not fit together; there are none.
        ImportError: matplotlib is not installed.

    >>> cube = torch.rand(4, 32, 32)
    >>> figure = comparison_figure({"a": cube, "b": cube}, cube[:, ::4, ::4], cube[:2])
    >>> len(figure.axes) > 4
    True
    """
    library = need("matplotlib.figure", extra="plot", purpose="drawing a figure")
    if not results:
        raise ValueError("results: expected at least one fused cube, got none")
    scenes = {
        name: _Scene.of(fused, lr_hsi, hr_msi, reference, wavelengths)
        for name, fused in results.items()
    }
    maps = {
        name: _consistency_maps(scene, None, None)
        if scene.reference is None
        else _error_maps(scene, scene.reference)[::-1]
        for name, scene in scenes.items()
    }
    columns = 1 + max(map(len, maps.values()))
    largest = [
        max(_bright(maps[name][column].values) for name in scenes) for column in range(columns - 1)
    ]
    first = next(iter(scenes.values()))
    rows = len(scenes) + 1 + (first.reference is not None)
    figure = library.Figure(figsize=(13, 3.4 * rows), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=15)
    grid = figure.add_gridspec(rows, 12)
    width = 12 // columns
    for row, (name, scene) in enumerate(scenes.items()):
        image = scene.composites()["Fused"]
        axes = figure.add_subplot(grid[row, :width])
        axes.imshow(image, interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
        for column, error_map in enumerate(maps[name]):
            place = grid[row, (column + 1) * width : (column + 2) * width]
            _draw_map(figure.add_subplot(place), error_map, largest[column])
    if first.reference is not None:
        axes = figure.add_subplot(grid[len(scenes), :])
        for line, (name, scene) in zip(_lines(), scenes.items(), strict=False):
            _draw_band_psnr(axes, scene, first.reference, name, **line)
        _tidy(axes)
    step = 12 // len(first.points)
    for number in range(len(first.points)):
        axes = figure.add_subplot(grid[-1, number * step : (number + 1) * step])
        _draw_spectra(axes, first, number, {name: scene.fused for name, scene in scenes.items()})
    return figure


def scale_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw PSNR against the scale: a line a method, the mean over the scenes that all scales have.

    Args:
        rows: with ``scene``, ``scale``, ``method`` and ``psnr``, as `fastfusion.evaluation` makes
            them; rows without a ``psnr`` are left out.

    Raises:
        ValueError: no scene is there at all of several scales.
        ImportError: matplotlib is not installed.

    >>> rows = [{"scene": "a", "scale": s, "method": "m", "psnr": 50 - s} for s in (4, 8)]
    >>> scale_figure(rows).axes[0].get_xlabel()
    'scale'
    """
    library = need("matplotlib.figure", extra="plot", purpose="drawing a figure")
    rows = [row for row in rows if "psnr" in row]
    scales = sorted({row["scale"] for row in rows})
    scenes = scenes_at_all_scales(rows)
    if not scenes:
        raise ValueError("rows: expected a scene that is there at all of several scales")
    figure = library.Figure(figsize=(7, 4.5), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    for line, method in zip(_lines(), dict.fromkeys(row["method"] for row in rows), strict=False):
        own = [row for row in rows if row["method"] == method and row["scene"] in scenes]
        means = [np.mean([row["psnr"] for row in own if row["scale"] == s]) for s in scales]
        axes.plot(scales, means, marker="o", linewidth=2, label=method, **line)
    axes.set_xscale("log", base=2)
    axes.set_xticks(scales, [f"x{scale}" for scale in scales])
    axes.minorticks_off()
    names = ", ".join(sorted(scenes)) if len(scenes) <= 3 else f"mean of {len(scenes)} scenes"
    protocols = sorted({row["cross_scale"] for row in rows if "cross_scale" in row})
    axes.set_title("\n".join([f"PSNR against the scale: {names}", *protocols]), fontsize=10)
    axes.set(xlabel="scale", ylabel="dB")
    _tidy(axes)
    return figure


def scenes_at_all_scales(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The scenes that `scale_figure` can show: scored at every scale that any is, if several."""
    at: dict[int, set[str]] = {}
    for row in rows:
        if "psnr" in row:
            at.setdefault(row["scale"], set()).add(row["scene"])
    return set.intersection(*at.values()) if len(at) > 1 else set()


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure, complete or not at all; the suffix names the format.

    Raises:
        ValueError: matplotlib does not know the format.
        OSError: the file cannot be written.
    """
    checks.path("path", path)
    if not callable(getattr(figure, "savefig", None)):
        raise TypeError(f"figure must be a matplotlib Figure, got {type(figure).__name__}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


# ------------------------------------------------------------------------------------------------
# What to show
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """The images of one fusion, and where to look in them."""

    fused: Tensor
    lr_hsi: Tensor
    hr_msi: Tensor
    reference: Tensor | None
    wavelengths: np.ndarray | None
    upsampled: Tensor  #: lr_hsi, bicubic: what any fusion has to surpass
    points: list[tuple[int, int]]  #: rows and columns of the fused image, for the spectra
    detail: tuple[slice, slice]  #: the window to enlarge

    @classmethod
    def of(
        cls,
        fused: Tensor,
        lr_hsi: Tensor,
        hr_msi: Tensor,
        reference: Tensor | None,
        wavelengths: Sequence[float] | np.ndarray | None,
    ) -> _Scene:
        _check(fused, lr_hsi, hr_msi, reference)
        fused, lr_hsi, hr_msi = (c.detach().float().cpu() for c in (fused, lr_hsi, hr_msi))
        if reference is not None:
            reference = reference.detach().float().cpu()
        if wavelengths is not None:
            wavelengths = real_numbers("wavelengths", wavelengths)
            if wavelengths.shape != (len(fused),):
                raise ValueError(
                    f"wavelengths: expected one a band, ({len(fused)},), got {wavelengths.shape}"
                )
        upsampled = F.interpolate(lr_hsi[None], fused.shape[-2:], mode="bicubic")[0]
        gain = (fused - upsampled).nan_to_num().square().mean(0)
        detail = _best_window(gain)
        points = [*_different_spectra(lr_hsi, fused.shape[-2:]), _best_pixel(gain, detail)]
        return cls(fused, lr_hsi, hr_msi, reference, wavelengths, upsampled, points, detail)

    def composites(self) -> dict[str, np.ndarray]:
        """Colours ``(rows, columns, 3)``; the hyperspectral images share one stretch."""
        bands = _colour_bands(len(self.fused), self.wavelengths)
        truth = self.fused if self.reference is None else self.reference
        low, high = _stretch(truth[bands])
        images = {"LR-HSI": _colours(self.lr_hsi[bands], low, high)}
        msi = self.hr_msi[_alike_bands(self.lr_hsi[bands], self.hr_msi)]
        images["HR-MSI"] = _colours(msi, *_stretch(msi))
        images["Fused"] = _colours(self.fused[bands], low, high)
        if self.reference is not None:
            images["Reference"] = _colours(self.reference[bands], low, high)
        return images

    def coarse(self, point: tuple[int, int]) -> tuple[int, int]:
        """The low-resolution pixel that a fused pixel lies in."""
        sides = zip(point, self.lr_hsi.shape[-2:], self.fused.shape[-2:], strict=True)
        row, column = (at * low // high for at, low, high in sides)
        return row, column


class _Map(NamedTuple):
    name: str
    values: Tensor


def _error_maps(scene: _Scene, reference: Tensor) -> list[_Map]:
    angles = sam(scene.fused, reference, per_pixel=True)
    error = (scene.fused - reference).square().mean(0).sqrt()
    return [
        _Map(f"Spectral angle, mean {angles.nanmean():.2f}°", angles),
        _Map(f"RMSE over bands, mean {error.mean():.4f}", error),
    ]


def _consistency_maps(
    scene: _Scene, srf: Tensor | None, degradation: Degradation | None
) -> list[_Map]:
    """How well the fused cube explains the two images, or else what it adds to the first."""
    maps = []
    if degradation is not None:
        error = (degradation(scene.fused) - scene.lr_hsi).square().mean(0).sqrt()
        maps.append(_Map(f"Error to LR-HSI, RMSE {_rms(error):.2g}", error))
    if srf is not None:
        projected = apply_srf(scene.fused, srf.detach().cpu())
        error = (projected - scene.hr_msi).square().mean(0).sqrt()
        maps.append(_Map(f"Error to HR-MSI, RMSE {_rms(error):.2g}", error))
    if not maps:
        added = (scene.fused - scene.upsampled).square().mean(0).sqrt()
        maps.append(_Map(f"Change to bicubic, RMSE {_rms(added):.2g}", added))
    return maps


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _colour_bands(bands: int, wavelengths: np.ndarray | None) -> list[int]:
    """The bands shown as red, green and blue; without visible ones, three spread out."""
    if wavelengths is not None:
        nearest = [int(np.abs(wavelengths - wanted).argmin()) for wanted in _RED_GREEN_BLUE]
        if all(abs(wavelengths[b] - w) < 40 for b, w in zip(nearest, _RED_GREEN_BLUE, strict=True)):
            return nearest
    return [round(share * (bands - 1)) for share in (0.8, 0.5, 0.2)]


def _alike_bands(colours: Tensor, hr_msi: Tensor) -> list[int]:
    """The multispectral band that varies most like each of three hyperspectral ones."""
    low_msi = F.interpolate(hr_msi[None], colours.shape[-2:], mode="area")[0]
    one, other = (
        F.normalize(planes.flatten(1) - planes.mean((1, 2))[:, None], dim=1)
        for planes in (colours, low_msi)
    )
    return (one @ other.T).nan_to_num(-1).argmax(1).tolist()


def _stretch(planes: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes black and what white, for each of ``planes (3, H, W)``."""
    values = planes.flatten(1)[:, :: max(1, planes[0].numel() // 2**18)].nan_to_num()
    low, high = values.quantile(0.005, dim=1), values.quantile(0.995, dim=1)
    return low.view(3, 1, 1), high.view(3, 1, 1)


def _colours(planes: Tensor, low: Tensor, high: Tensor) -> np.ndarray:
    step = -(-max(planes.shape[-2:]) // _LARGEST)
    shown = (planes[:, ::step, ::step] - low) / (high - low).clamp(min=1e-6)
    return shown.clamp(0, 1).pow(1 / 1.6).permute(1, 2, 0).numpy()  # radiance is linear


def _different_spectra(lr_hsi: Tensor, size: Sequence[int]) -> list[tuple[int, int]]:
    """Pixels of an image of ``size`` whose spectra differ most in shape: materials, more or less.

    The first is the brightest; each next one is the farthest from those before, in the sine of the
    angle times the root of the brightness, so that noise in the dark is not taken for a material.
    """
    height, width = lr_hsi.shape[-2:]
    smooth = F.avg_pool2d(lr_hsi.nan_to_num()[None], 3, 1, 1, count_include_pad=False)[0]
    spectra = smooth.flatten(1).T
    brightness = spectra.norm(dim=1)
    shapes = F.normalize(spectra, dim=1)
    chosen = [int(brightness.argmax())]
    for _ in range(min(_MATERIALS, height * width) - 1):
        likeness = (shapes @ shapes[chosen].T).amax(1)
        score = brightness.sqrt() * (1 - likeness.square()).clamp(min=0).sqrt()
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    pixels = sorted(divmod(pixel, width) for pixel in chosen)
    # the middle of the low-resolution pixel
    return [
        ((2 * row + 1) * size[0] // (2 * height), (2 * column + 1) * size[1] // (2 * width))
        for row, column in pixels
    ]


def _best_window(gain: Tensor) -> tuple[slice, slice]:
    """The square window with the largest sum of ``gain (H, W)``."""
    side = max(1, round(_DETAIL * min(gain.shape)))
    step = max(1, side // 8)
    sums = F.avg_pool2d(gain[None, None], side, step)[0, 0]
    row, column = (step * at for at in divmod(int(sums.argmax()), sums.shape[1]))
    return slice(row, row + side), slice(column, column + side)


def _best_pixel(gain: Tensor, window: tuple[slice, slice]) -> tuple[int, int]:
    inside = gain[window]
    row, column = divmod(int(inside.argmax()), inside.shape[1])
    return window[0].start + row, window[1].start + column


def _check(fused: Tensor, lr_hsi: Tensor, hr_msi: Tensor, reference: Tensor | None) -> None:
    cubes = {"fused": fused, "lr_hsi": lr_hsi, "hr_msi": hr_msi}
    if reference is not None:
        cubes["reference"] = reference
    for name, cube in cubes.items():
        if not isinstance(cube, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(cube).__name__}")
        checks.dense(name, cube)
        if cube.ndim != 3 or cube.numel() == 0 or cube.device.type == "meta":
            raise ValueError(
                f"{name}: expected (bands, H, W), none of them 0, got {tuple(cube.shape)}"
            )
    if lr_hsi.shape[0] != fused.shape[0]:
        raise ValueError(f"lr_hsi: expected {fused.shape[0]} bands, got {lr_hsi.shape[0]}")
    if hr_msi.shape[1:] != fused.shape[1:]:
        raise ValueError(
            f"hr_msi: expected the size of fused, {tuple(fused.shape[1:])}, "
            f"got {tuple(hr_msi.shape[1:])}"
        )
    if reference is not None and reference.shape != fused.shape:
        raise ValueError(
            f"reference: expected the shape of fused, {tuple(fused.shape)}, "
            f"got {tuple(reference.shape)}"
        )


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


def _draw_image(axes: Axes, scene: _Scene, name: str, image: np.ndarray) -> None:
    height, width = scene.fused.shape[-2:]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    rows, columns = scene.detail
    corner, side = (columns.start, rows.start), rows.stop - rows.start
    patches = need("matplotlib.patches", extra="plot", purpose="drawing a figure")
    axes.add_patch(patches.Rectangle(corner, side, side, fill=False, color=_MARK, linewidth=1.5))
    if name == "Fused":
        for number, (row, column) in enumerate(scene.points, start=1):
            inwards = (7 if column < width / 2 else -13, -13 if row < height / 2 else 7)
            for colour, weight in (("black", 3.0), (_MARK, 1.5)):
                axes.plot(column + 0.5, row + 0.5, "o", mfc="none", mec=colour, ms=8, mew=weight)
            axes.annotate(
                str(number),
                (column, row),
                inwards,
                textcoords="offset points",
                color=_MARK,
                weight="bold",
                bbox={"facecolor": "black", "edgecolor": "none", "pad": 1.5},
            )
    bands, rows_shown, columns_shown = {"LR-HSI": scene.lr_hsi, "HR-MSI": scene.hr_msi}.get(
        name, scene.fused
    ).shape
    axes.set_title(f"{name}  {rows_shown} x {columns_shown} x {bands}")
    axes.set_axis_off()


def _draw_detail(axes: Axes, scene: _Scene, image: np.ndarray) -> None:
    height, width = scene.fused.shape[-2:]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    rows, columns = scene.detail
    axes.set(xlim=(columns.start, columns.stop), ylim=(rows.stop, rows.start))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_MARK, linewidth=2)


def _thinned(values: Tensor) -> np.ndarray:
    step = -(-max(values.shape) // _LARGEST)
    return values[::step, ::step].numpy()


def _bright(values: Tensor) -> float:
    """What a map shows as its brightest: a few outliers may lie above."""
    shown = _thinned(values)
    finite = shown[np.isfinite(shown)]
    return float(np.quantile(finite, 0.98)) if finite.size else 1.0


def _draw_map(axes: Axes, error_map: _Map, largest: float | None = None) -> None:
    name, values = error_map
    shown = _thinned(values)
    largest = _bright(values) if largest is None else largest
    colormaps = need("matplotlib", extra="plot", purpose="drawing a figure").colormaps
    colours = colormaps[_ERRORS].with_extremes(bad="#404040")
    picture = axes.imshow(shown, cmap=colours, vmin=0, vmax=largest or 1e-6, interpolation="none")
    bar = axes.inset_axes((0.1, -0.09, 0.8, 0.035))  # keeps the map as large as the images
    picture.axes.figure.colorbar(picture, cax=bar, orientation="horizontal", extend="max")
    axes.set_title(name)
    axes.set_axis_off()


def _draw_psnr(axes: Axes, scene: _Scene, reference: Tensor) -> None:
    bicubic = replace(scene, fused=scene.upsampled.clamp(0, 1))
    _draw_band_psnr(axes, scene, reference, "fused", color=_FUSED)
    _draw_band_psnr(axes, bicubic, reference, "LR-HSI, bicubic", color=_COARSE)
    _tidy(axes)


def _draw_band_psnr(axes: Axes, scene: _Scene, reference: Tensor, name: str, **style: Any) -> None:
    position, unit = _spectral_axis(scene)
    bands = psnr(scene.fused, reference, per_band=True)
    bands = bands.masked_fill(~bands.isfinite(), torch.nan)
    label = f"{name}, mean {bands.nanmean():.2f} dB"
    axes.plot(position, _broken(bands, position), linewidth=2, label=label, **style)
    axes.set(title="PSNR of each band", xlabel=unit, ylabel="dB")


def _lines() -> Iterator[dict[str, Any]]:
    """A look for each of several methods."""
    for style in _STYLES:
        for colour in _METHODS:
            yield {"color": colour, "linestyle": style}


def _draw_spectra(
    axes: Axes, scene: _Scene, number: int, results: Mapping[str, Tensor] | None = None
) -> None:
    """The spectra at one of the scene's points, of its fused cube or of several."""
    position, label = _spectral_axis(scene)
    row, column = scene.points[number]
    low_row, low_column = scene.coarse((row, column))
    many = results is not None
    results = {"fused": scene.fused} if results is None else results
    coarse = "black" if many else _COARSE
    lines = [("LR-HSI", scene.lr_hsi[:, low_row, low_column], coarse, 2.0, ":")]
    if scene.reference is not None:
        lines.append(("reference", scene.reference[:, row, column], _TRUTH, 4.0, "-"))
    for line, (name, cube) in zip(_lines(), results.items(), strict=False):
        spectrum = cube.detach().float().cpu()[:, row, column]
        lines.append((name, spectrum, line["color"], 1.5, line["linestyle"]))
    for name, spectrum, colour, width, style in lines:
        axes.plot(
            position, _broken(spectrum, position), style, color=colour, linewidth=width, label=name
        )
    axes.set(title=f"Point {number + 1}: row {row}, column {column}", xlabel=label)
    axes.set_ylim(bottom=0)
    _tidy(axes, legend=number == 0)


def _broken(spectrum: Tensor, position: np.ndarray) -> np.ndarray:
    """The spectrum with NaN before a gap in the wavelengths, so that no line bridges it."""
    values = spectrum.numpy().copy()
    spacing = np.diff(position)
    if spacing.size:
        values[1:][spacing > 3 * np.median(spacing)] = np.nan
    return values


def _spectral_axis(scene: _Scene) -> tuple[np.ndarray, str]:
    if scene.wavelengths is None:
        return np.arange(1, len(scene.fused) + 1), "band"
    return scene.wavelengths, "wavelength in nm"


def _tidy(axes: Axes, legend: bool = True) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)
