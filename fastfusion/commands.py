"""What the commands of `fastfusion.cli` do with their parsed arguments."""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import dataclasses
import io
import json
import math
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfusion import environment
from fastfusion._optional import need
from fastfusion._version import __version__
from fastfusion.data.atomic import atomic_path, check_place
from fastfusion.data.cube import Cube
from fastfusion.data.files import read_cube, write_cube
from fastfusion.data.scenes import load_scene
from fastfusion.data.sensors import Degradation, read_srf
from fastfusion.evaluation import (
    Case,
    averages,
    case_of,
    csv_table,
    markdown_table,
    run,
    run_across_scales,
    run_with_cost,
    score,
    with_sensors,
)
from fastfusion.figures import (
    comparison_figure,
    fusion_figure,
    save_figure,
    scale_figure,
    scenes_at_all_scales,
)
from fastfusion.fusing import METHODS, check_pair, scale_of
from fastfusion.metrics import CONVENTIONS
from fastfusion.models.base import FusionModel
from fastfusion.tiling import fuse_files, source_of

__all__ = ["bench", "evaluate", "fuse", "info", "train"]


# ------------------------------------------------------------------------------------------------
# fuse
# ------------------------------------------------------------------------------------------------


def fuse(asked: argparse.Namespace) -> None:
    """Fuse two files or a scene; write the cube, its figures and a picture."""
    _check_usage(asked)
    options = _fusing_options(asked)
    if _in_tiles(asked):
        _fuse_in_tiles(asked, options)
        return
    clock = _Clock()
    cubes: dict[str, Cube] = {}
    if asked.scene is not None:
        case, peak = _case_from_scene(asked, asked.scene, asked.scale)
    else:
        case, cubes, peak = _case_from_files(asked)
    clock.lap("read")
    # Places for the outputs are taken before the work, so that a wrong name costs no time. They
    # get their names when all is written, or vanish.
    with contextlib.ExitStack() as places:
        paths = [places.enter_context(atomic_path(path)) for path in _beside(asked)]
        fused = run(
            case,
            asked.method,
            blind=asked.blind,
            backend=asked.backend,
            device=asked.device,
            progress=asked.progress,
            **options,
        )
        clock.lap("fuse")
        seen = case if case.reference is not None else with_sensors(case)
        figures = score(seen, fused)
        clock.lap("score")
        summary = _summary(case, asked.method, figures, clock.seconds["fuse"])
        if len(paths) == 2:
            save_figure(paths[1], _figure(seen, fused, summary))
            clock.lap("draw")
        if paths:
            write_cube(asked.out, _in_input_units(fused, peak, case, cubes))
            clock.lap("write")
            record = _record(asked, case, cubes, peak, figures, clock.seconds)
            text = json.dumps(_without_nan(record), indent=2, allow_nan=False, ensure_ascii=False)
            paths[0].write_text(text + "\n", encoding="utf-8")
    print(summary)
    if asked.out is None:
        print("nothing was written: --out OUT keeps the cube, its figures and a picture")
    else:
        print("wrote", ", ".join(map(str, [asked.out, *_beside(asked)])))


def _check_usage(asked: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    if asked.scene is not None:
        for name in ("hsi", "msi", "reference", "peak", "bands_axis"):
            if getattr(asked, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --scene")
    elif asked.hsi is None or asked.msi is None:
        raise ValueError("expected --hsi FILE and --msi FILE, or --scene NAME")
    elif asked.out is None:
        raise ValueError("expected --out OUT, the file for the fused cube")
    elif asked.blind:
        raise ValueError("--blind is for --scene; leave out --srf and --psf instead")
    if asked.out is not None:
        _check_not_an_input(asked)
        _check_format(asked.out)
        if not asked.no_figure:
            need("matplotlib", extra="plot", purpose="drawing the picture (or give --no-figure)")
    if asked.scene is not None or asked.reference is not None:
        need("torchmetrics", extra="io", purpose="scoring")


def _check_not_an_input(asked: argparse.Namespace) -> None:
    inputs = (asked.hsi, asked.msi, asked.reference, asked.scene, asked.srf, asked.psf)
    present = [Path(name) for name in inputs if name is not None and Path(name).exists()]
    for output in (Path(asked.out), *_beside(asked)):
        if output.exists() and any(output.samefile(path) for path in present):
            raise ValueError(f"--out {asked.out}: {output} is an input; name another")


def _check_format(out: str) -> None:
    """Raise now what would stop the cube from being written after the work: try it on one pixel."""
    with tempfile.TemporaryDirectory() as room:
        try:
            write_cube(Path(room, Path(out).name), Cube(np.zeros((1, 1, 1), np.float32)))
        except ValueError as error:
            raise ValueError(str(error).replace(f"{room}/", "")) from error


#: Bytes of a result from which a .zarr or .tif is made in tiles without being asked to.
_LARGE = 2**30
_FOR_TILES = ("tile", "margin", "workers", "memory", "scheduler")


def _in_tiles(asked: argparse.Namespace) -> bool:
    """Whether to go from disk to disk: on request, or where the result is large."""
    wanted = [name for name in _FOR_TILES if getattr(asked, name) is not None]
    if wanted:
        for name in ("scene", "reference", "bands_axis"):
            if getattr(asked, name) is not None:
                raise ValueError(f"--{wanted[0]} does not go with --{name.replace('_', '-')}")
        return True
    if asked.scene or asked.reference or Path(asked.out).suffix not in (".zarr", ".tif", ".tiff"):
        return False
    try:
        low, high = (source_of(name) for name in (asked.hsi, asked.msi))
    except (ValueError, OSError):
        return False  # of a format that is read as a whole; what is wrong is told there
    return 4 * low.shape[0] * high.shape[1] * high.shape[2] > _LARGE


def _fuse_in_tiles(asked: argparse.Namespace, options: dict[str, Any]) -> None:
    """Fuse two files into a third, tile by tile; write the cube and how it was made."""
    hsi, msi = source_of(asked.hsi), source_of(asked.msi)
    scale = scale_of(hsi.shape, msi.shape)
    if asked.scale not in (None, scale):
        raise ValueError(f"--scale {asked.scale}: the MSI is {scale} times finer than the HSI")
    srf = read_srf(asked.srf, hsi.wavelengths).float() if asked.srf else None
    psf = _degradation(asked.psf, scale)
    record_path = Path(asked.out.rstrip("/") + ".json")
    check_place(record_path)
    report = fuse_files(
        asked.hsi,
        asked.msi,
        asked.out,
        asked.method,
        srf=srf,
        psf=psf,
        peak=asked.peak,
        tile=asked.tile,
        margin=asked.margin,
        workers=asked.workers,
        memory=4.0 if asked.memory is None else asked.memory,
        scheduler=asked.scheduler,
        backend=asked.backend,
        device=asked.device or "cpu",
        progress=asked.progress,
        **options,
    )
    record = {
        "fastfusion": __version__,
        "method": asked.method,
        "options": options,
        "inputs": {"hsi": asked.hsi, "msi": asked.msi},
        "sensors": {
            "srf": "estimated" if srf is None else "given",
            "psf": "estimated" if psf is None else "given",
        },
        **vars(report),
        "outputs": [asked.out, str(record_path)],
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "environment": _environment(asked),
    }
    text = json.dumps(_without_nan(record), indent=2, allow_nan=False, ensure_ascii=False)
    _write_text(record_path, text + "\n")
    seconds = sum(report.seconds.values())
    found = f", {report.found} of them found" if report.found else ""
    print(
        f"{Path(asked.hsi).stem} x{report.scale} by {asked.method}: "
        f"{report.tiles} tiles of {report.tile} pixels{found}, {seconds:.2f} s"
    )
    print(f"wrote {asked.out}, {record_path}")


def _beside(asked: argparse.Namespace) -> list[Path]:
    """The figures and the picture that go beside the cube."""
    if asked.out is None:
        return []
    endings = (".json",) if asked.no_figure else (".json", ".png")
    return [Path(asked.out.rstrip("/") + ending) for ending in endings]


def _in_input_units(fused: Tensor, peak: float, case: Case, cubes: Mapping[str, Cube]) -> Cube:
    """The cube to write: times the peak, and placed on the ground where the MSI is."""
    msi = cubes["msi"].metadata if cubes else {}
    metadata: dict[str, Any] = {key: msi[key] for key in ("crs", "transform") if key in msi}
    header = msi.get("envi", {})
    place = ("map info", "coordinate system string", "projection info")
    if any(key in header for key in place):
        metadata["envi"] = {key: header[key] for key in place if key in header}
    return Cube(fused.numpy() * np.float32(peak), case.wavelengths, metadata)


def _record(
    asked: argparse.Namespace,
    case: Case,
    cubes: Mapping[str, Cube],
    peak: float,
    figures: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What was done with what, how well and how fast."""
    inputs: dict[str, Any] = {"scene": case.name, "protocol": case.protocol}
    for kind, cube in cubes.items():
        inputs[kind] = {key: cube.metadata.get(key) for key in ("source", "format", "stored_dtype")}
    return {
        "fastfusion": __version__,
        "method": asked.method,
        "options": _fusing_options(asked),
        "inputs": inputs,
        "lr_hsi": case.lr_hsi.shape,
        "hr_msi": case.hr_msi.shape,
        "scale": case.scale,
        "peak": peak,
        "sensors": _sensors(case, asked.blind),
        "outputs": [asked.out, *map(str, _beside(asked))],
        "metrics": figures,
        "conventions": {
            "values": "metrics are of values divided by the peak; null: undefined or infinite",
            **{name: text for name, text in CONVENTIONS.items() if name in figures},
        },
        "seconds": seconds,
        "environment": _environment(asked),
    }


def _environment(asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": asked.device or "cpu",
        "backend": asked.backend,
    }


def _without_nan(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------
# evaluate
# ------------------------------------------------------------------------------------------------


def evaluate(asked: argparse.Namespace) -> None:
    """Score each method on each scene; write tables and pictures."""
    need("torchmetrics", extra="io", purpose="scoring")
    if not asked.no_figures:
        need("matplotlib", extra="plot", purpose="drawing the pictures (or give --no-figures)")
    methods = _methods(asked.methods, asked.weights)
    scenes = [pair for text in asked.scenes for pair in _scene_and_scales(text)]
    _check_scales(methods, scenes, asked.cross_scale)
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    displacement = {"shift": asked.shift, "rotation": asked.rotate, "zoom": asked.zoom}
    rows: list[dict[str, Any]] = []
    run(case_of(load_scene("demo"), 8), "regression")  # what is loaded late is not timed
    for name, scale in scenes:
        case, _ = _case_from_scene(asked, name, scale, **displacement)
        seen = case if case.reference is not None and asked.quick else with_sensors(case)
        results: dict[str, Tensor] = {}
        for label, method, options in methods:
            fused, row = _evaluated(asked, case, seen, method, options)
            results[label] = fused
            rows.append({"scene": case.name, "scale": case.scale, "method": label, **row})
            summary = _summary(case, label, row, row["seconds"])
            print(f"[{len(rows)}/{len(scenes) * len(methods)}] {summary}", file=sys.stderr)
            if not asked.no_figures:
                picture = _file_name(case.name, f"x{case.scale}", label)
                save_figure(folder / picture, _figure(seen, fused, summary))
            table = "\n\n".join(markdown_table(part) for part in (rows, averages(rows)) if part)
            _write_text(folder / "table.csv", csv_table(rows))
            _write_text(folder / "table.md", "\n".join([table, "", *_notes(rows)]) + "\n")
        if not asked.no_figures:
            title = f"{case.name} x{case.scale}"
            picture = _file_name(case.name, f"x{case.scale}")
            save_figure(folder / picture, _comparison(seen, results, title))
    if not asked.no_figures and scenes_at_all_scales(rows):
        save_figure(folder / "psnr_against_scale.png", scale_figure(rows))
    print(table)


def _evaluated(
    asked: argparse.Namespace, case: Case, seen: Case, method: str, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What a method makes of a case, and its figures, costs and conditions."""
    protocol = None
    backend = options.get("backend", "auto")

    def fusing() -> Tensor:
        nonlocal protocol
        if asked.cross_scale and "weights" in options:
            fused, protocol = run_across_scales(
                case, protocol=asked.cross_scale, blind=asked.blind, **options
            )
            return fused
        return run(case, method, blind=asked.blind, progress=asked.progress, **options)

    fused, cost = run_with_cost(fusing, backend=backend, quick=asked.quick)
    figures = score(seen, fused, both=not asked.quick)
    costs = {key: value for key, value in vars(cost).items() if value is not None}
    row = {**figures, **costs, "protocol": case.protocol}
    if protocol:
        row["cross_scale"] = protocol
    row |= {
        **_sensors(case, asked.blind),
        "threads": torch.get_num_threads(),
        "fastfusion": __version__,
    }
    return fused, row


def _methods(texts: Sequence[str], weights: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Label, name and options of each method, with the weights that are given for it."""
    files = {}
    for text in weights:
        name, equals, path = text.partition("=")
        if not (equals and path and name in METHODS):
            raise ValueError(f"--weights {text}: expected METHOD=FILE, such as lso=x4.safetensors")
        files[name] = path
    methods = []
    for text in texts:
        name, options = _method_and_options(text)
        if name not in METHODS:
            raise ValueError(f"--methods {text}: expected one of {', '.join(METHODS)}")
        if name in files:
            options.setdefault("weights", files[name])
        shown = [f"{key}={value}" for key, value in options.items() if key != "weights"]
        if "weights" in options:
            shown.insert(0, Path(options["weights"]).stem)
        methods.append((" ".join([name, *shown]), name, options))
    unused = files.keys() - {name for _, name, _ in methods}
    if unused:
        raise ValueError(f"--weights {min(unused)}=...: --methods does not name {min(unused)}")
    labels = [label for label, _, _ in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"--methods: {label} is there twice")
    return methods


def _check_scales(
    methods: Sequence[tuple[str, str, dict[str, Any]]],
    scenes: Sequence[tuple[str, int | None]],
    cross_scale: str | None,
) -> None:
    """Before any work: the files of weights are whole, and of the scales that are asked for."""
    for _, name, options in methods:
        if "weights" not in options:
            continue
        model = FusionModel.load(options["weights"])
        if type(model).__name__.lower() != name:
            raise ValueError(
                f"--weights {name}={options['weights']}: it holds a {type(model).__name__}"
            )
        others = sorted({scale for _, scale in scenes if scale not in (None, model.scale)})
        if others and not cross_scale:
            raise ValueError(
                f"--weights {name}={options['weights']}: it was trained at x{model.scale}, and "
                f"x{others[0]} is asked for; --cross-scale page or script says how to apply it"
            )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the columns of a table mean, and where its images come from."""
    notes = [f"- {name}: {text}" for name, text in CONVENTIONS.items() if name in rows[0]]
    protocols = sorted({row["protocol"] for row in rows})
    across = sorted({row["cross_scale"] for row in rows if "cross_scale" in row})
    return [
        *notes,
        "- parameters, GFLOP (2 for a multiply-add), latency: of the network that was applied, its "
        "prior apart; of the whole method where there is no network. time: of the whole call",
        f"- images: {'; '.join(protocols)}",
        *([f"- cross-scale: {'; '.join(across)}"] if across else []),
    ]


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", "_".join(parts)) + ".png"


def _method_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """``"fsrvl:minutes=5,ablation=initial"`` in parts."""
    name, _, options = text.partition(":")
    return name, _options(options.split(",") if options else [])


def _scene_and_scales(text: str) -> list[tuple[str, int | None]]:
    """``"cave:sponges@4,8"``: the scene at scales 4 and 8; without scales, at its own."""
    name, at, scales = text.rpartition("@")
    if not at:
        return [(text, None)]
    if not re.fullmatch(r"\d+(,\d+)*", scales):
        raise ValueError(f"--scenes {text}: expected NAME@N or NAME@N,N")
    return [(name, int(scale)) for scale in scales.split(",")]


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# train
# ------------------------------------------------------------------------------------------------


def train(asked: argparse.Namespace) -> None:
    """Train a model by a recipe."""
    from fastfusion.training import read_recipe
    from fastfusion.training import train as run_training

    changes = _options(asked.set)
    for name in ("scenes", "validation"):
        if getattr(asked, name) is not None:
            changes[name] = getattr(asked, name)
    recipe = read_recipe(asked.config, **changes)
    if asked.option:
        recipe = dataclasses.replace(recipe, options={**recipe.options, **_options(asked.option)})
    best = run_training(
        recipe,
        asked.out,
        minutes=asked.minutes,
        resume=asked.resume,
        device=asked.device,
        tensorboard=asked.tensorboard,
        progress=asked.progress,
    )
    figures = [form.format(best[name]) for name, form in _FORMS.items() if name in best]
    print(", ".join([f"best of {recipe.model} after {best['epoch']} epochs", *figures]))
    print(f"wrote {Path(asked.out) / 'model.safetensors'}")


# ------------------------------------------------------------------------------------------------
# bench
# ------------------------------------------------------------------------------------------------


def bench(asked: argparse.Namespace) -> None:
    """Time the operators; a table, and with a folder JSON, CSV and an HTML page."""
    from fastfusion import benchmarking, machine, reports

    machine.keep_freed_memory()  # else large rows time the system's fresh pages
    before = None if asked.compare is None else _earlier_run(Path(asked.compare))
    if asked.out is not None:
        need("matplotlib", extra="plot", purpose="drawing the page")
    shapes = [_shape(text) for text in asked.shape] if asked.shape else benchmarking.SHAPES
    if not asked.seconds > 0:
        raise ValueError(f"--seconds: expected more than 0, got {asked.seconds}")
    run = benchmarking.measure(
        asked.op or list(benchmarking.OPERATIONS),
        shapes,
        dtype=getattr(torch, asked.dtype),
        device=asked.device,
        contestants=asked.backend,
        compiled=asked.compiled,
        backward=asked.backward,
        seconds=asked.seconds,
        progress=lambda work: print(f"timing {work} ...", file=sys.stderr),
    )
    print(reports.terminal_table(run))
    changes = [] if before is None else benchmarking.compare(before, run)
    for change in changes:
        print(f"{change.name}: {change}")
    if before is not None and not changes:
        print(f"{asked.compare}: no row in common with this run")
    if asked.out is None:
        return
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "bench.json", json.dumps(run, indent=1))
    rows = reports.csv_rows(run)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    _write_text(folder / "bench.csv", table.getvalue())
    _write_text(folder / "bench.html", reports.page(run, changes))
    print(f"{folder / 'bench.html'}")


def _shape(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"\d+(x\d+){3}", text) is None:
        raise ValueError(f"--shape: expected BxCxHxW such as 1x64x256x256, got {text!r}")
    return tuple(int(side) for side in text.split("x"))


def _earlier_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
        for row in run["benchmarks"]:
            if not {"median", "q1", "q3"} <= row["stats"].keys() or "name" not in row:
                raise KeyError("stats")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--compare: {path} is no bench.json of `fastfusion bench`") from error
    return dict(run)


# ------------------------------------------------------------------------------------------------
# info
# ------------------------------------------------------------------------------------------------


def info(asked: argparse.Namespace) -> None:
    """Print what is installed, compiled and loadable."""
    facts = environment.info()
    if asked.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if not isinstance(value, Mapping):
            print(f"{name}: {value}")
            continue
        print(f"{name}:")
        width = max(map(len, value), default=0)
        for key, item in value.items():
            print(f"  {key:{width}}  {', '.join(item) if isinstance(item, list) else item}")


# ------------------------------------------------------------------------------------------------
# What they share: arguments to cases, options and sensors; figures to lines
# ------------------------------------------------------------------------------------------------


def _case_from_files(asked: argparse.Namespace) -> tuple[Case, dict[str, Cube], float]:
    """The pair in the files in [0, 1], the cubes as read, and what they were divided by."""
    names = {"hsi": asked.hsi, "msi": asked.msi, "reference": asked.reference}
    cubes = {
        kind: _read(name, asked.bands_axis) for kind, name in names.items() if name is not None
    }
    hsi, msi = cubes["hsi"], cubes["msi"]
    peak = asked.peak
    if peak is None:
        peak = _default_peak(cubes)
    elif not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"--peak: expected a positive number, got {peak}")
    images = {kind: torch.from_numpy(cube.normalized(peak).data) for kind, cube in cubes.items()}
    scale = check_pair(images["hsi"], images["msi"])
    if asked.scale not in (None, scale):
        raise ValueError(f"--scale {asked.scale}: the MSI is {scale} times finer than the HSI")
    shape = (hsi.bands, *msi.shape[1:])
    if "reference" in cubes and cubes["reference"].shape != shape:
        raise ValueError(
            f"{asked.reference}: expected the shape of the result, {shape}, "
            f"got {cubes['reference'].shape}"
        )
    case = Case(
        Path(asked.hsi).stem,
        "as given",
        images["hsi"],
        images["msi"],
        images.get("reference"),
        hsi.wavelengths,
        _read_srf(asked.srf, hsi, msi) if asked.srf else None,
        _degradation(asked.psf, scale),
    )
    return case, cubes, peak


def _default_peak(cubes: Mapping[str, Cube]) -> float:
    """1 for images in [0, 1]; else the largest value, with room above where there is no truth: a
    detail may be brighter than any of the mixed pixels that it was seen in."""
    largest = max(float(cube.data.max()) for cube in cubes.values())
    if largest <= 1:
        return 1.0
    return largest if "reference" in cubes else 1.25 * largest


def _case_from_scene(
    asked: argparse.Namespace, name: str, scale: int | None, **displacement: float
) -> tuple[Case, float]:
    """The pair that a scene gives, and what its values were divided by to be in [0, 1]."""
    scene = load_scene(name)
    cube = scene.reference or scene.lr_hsi
    assert cube is not None
    srf = _read_srf(asked.srf, cube, scene.hr_msi) if asked.srf else None
    degradation = _degradation(asked.psf, scale or scene.scale or 4)
    case = case_of(scene, scale, srf=srf, degradation=degradation, **displacement)
    return case, cube.metadata.get("peak", 1.0)


def _read(name: str, bands_axis: int | None) -> Cube:
    """The cube in ``FILE`` or ``FILE:VARIABLE``; all its values are finite."""
    path, variable = name, None
    if not Path(name).exists() and ":" in name:
        path, _, variable = name.rpartition(":")
    try:
        cube = read_cube(path, variable=variable, bands_axis=bands_axis)
    except ValueError as error:
        ways = {"variable=": "say which as FILE:NAME", "bands_axis=": "say it by --bands-axis"}
        way = next((way for word, way in ways.items() if word in str(error)), None)
        raise ValueError(f"{error} ({way})" if way else str(error)) from error
    cube.check_finite(name)
    return cube


def _read_srf(path: str, hsi: Cube, msi: Cube | None) -> Tensor:
    """The response ``(g, G)`` of the MSI's bands in those of the HSI."""
    try:
        srf = read_srf(path, hsi.wavelengths)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if srf.shape[1] != hsi.bands:
        unknown = "" if hsi.wavelengths is not None else ", whose wavelengths are not known"
        raise ValueError(
            f"{path}: expected responses in the {hsi.bands} bands of the HSI{unknown}, "
            f"got {srf.shape[1]}"
        )
    if msi is not None and srf.shape[0] != msi.bands:
        raise ValueError(
            f"{path}: expected the responses of the MSI's {msi.bands} bands, got {srf.shape[0]}"
        )
    return srf.float()


def _degradation(kind: str | None, scale: int) -> Degradation | None:
    """The blur and sampling that ``--psf`` names."""
    if kind is None:
        return None
    name, _, sigma = kind.partition(":")
    if name == "gaussian":
        try:
            return Degradation.gaussian(scale, float(sigma) if sigma else None)
        except ValueError as error:
            raise ValueError(f"--psf {kind}: expected gaussian:SIGMA, SIGMA above 0") from error
    if name == "block":
        return Degradation.block(scale)
    psf = torch.from_numpy(_read_matrix(kind))
    total = psf.sum().item()
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"--psf {kind}: expected finite weights with a positive sum")
    return Degradation(psf / total, scale)


def _read_matrix(path: str) -> np.ndarray:
    if path.endswith(".npy"):
        arrays = [np.load(path, allow_pickle=False)]
    elif path.endswith(".mat"):
        from scipy.io import loadmat

        arrays = [value for name, value in loadmat(path).items() if not name.startswith("__")]
    else:
        raise ValueError(f"--psf {path}: expected gaussian, gaussian:SIGMA, block, .npy or .mat")
    matrices = [array for array in arrays if array.ndim == 2 and array.dtype.kind in "uif"]
    if len(matrices) != 1:
        raise ValueError(f"--psf {path}: expected one matrix of numbers, got {len(matrices)}")
    return matrices[0].astype(np.float64)


def _fusing_options(asked: argparse.Namespace) -> dict[str, Any]:
    limit = {} if asked.minutes is None else {"minutes": asked.minutes}
    return {**_options(asked.option), **limit}


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """``["local=False", "minutes=5"]`` as keyword arguments."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"option {text!r}: expected NAME=VALUE, such as local=False")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word
    return options


def _sensors(case: Case, blind: bool) -> dict[str, str]:
    """Whether the method was told the sensors."""
    known = {"srf": case.srf, "psf": case.degradation}
    return {
        name: "estimated" if blind or value is None else "given" for name, value in known.items()
    }


def _figure(case: Case, fused: Tensor, title: str) -> Any:
    return fusion_figure(
        fused,
        case.lr_hsi,
        case.hr_msi,
        reference=case.reference,
        wavelengths=case.wavelengths,
        srf=case.srf,
        degradation=case.degradation,
        title=title,
    )


def _comparison(case: Case, results: Mapping[str, Tensor], title: str) -> Any:
    return comparison_figure(
        results,
        case.lr_hsi,
        case.hr_msi,
        reference=case.reference,
        wavelengths=case.wavelengths,
        title=title,
    )


_FORMS = {
    "psnr": "PSNR {:.2f} dB",
    "sam": "SAM {:.2f}°",
    "ergas": "ERGAS {:.2f}",
    "ssim": "SSIM {:.4f}",
    "d_lambda": "D_lambda {:.4f}",
    "d_s": "D_s {:.4f}",
    "qnr": "QNR {:.4f}",
}


def _summary(case: Case, method: str, figures: Mapping[str, float], seconds: float) -> str:
    said = [form.format(figures[name]) for name, form in _FORMS.items() if name in figures]
    return ", ".join([f"{case.name} x{case.scale} by {method}", *said, f"{seconds:.2f} s"])


class _Clock:
    """Seconds from lap to lap, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now
