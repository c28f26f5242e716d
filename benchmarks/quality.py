"""The tables and pictures of docs/quality.md, from real scenes: ``make quality``.

Each section can be run by itself (``--sections``); its rows then replace those of it that
docs/quality.csv holds, and the page is written anew from all rows.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastfusion import machine
from fastfusion.data import load_scene
from fastfusion.evaluation import (
    Case,
    case_of,
    csv_table,
    markdown_table,
    run,
    run_across_scales,
    score,
)
from fastfusion.figures import fusion_figure, save_figure
from fastfusion.training import RECIPES, Recipe, train

SCENES = [
    ("cave:sponges", 4),
    ("cave:sponges", 8),
    ("cave:stuffed_toys", 4),
    ("cave:stuffed_toys", 8),
    ("jasper_ridge", 4),
    ("paris_eo1", 3),
]
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("bicubic", "bicubic", {}),
    ("regression, global only", "regression", {"local": False}),
    ("regression", "regression", {}),
    ("regression, sensors estimated", "regression", {"blind": True}),
    ("fsrvl", "fsrvl", {}),
]
ABLATIONS: list[tuple[str, dict[str, Any]]] = [
    ("Initial (neither)", {"synchronization": False, "recalibration": False}),
    ("FSRVL-S (no synchronization)", {"synchronization": False}),
    ("FSRVL-R (no recalibration)", {"recalibration": False}),
    ("FSRVL", {}),
]
MISREGISTRATIONS = [
    ("registered", {}),
    ("moved by half a pixel of the MSI", {"shift": 0.5}),
    ("turned by 1 degree", {"rotation": 1.0}),
]
DISPLACED = ["regression", "fsrvl"]
ABLATION_SCENE = ("cave:stuffed_toys", 8)
# Trainings that fit into minutes: small batches, a rate that falls along a cosine as the time runs
# out. CoFusion is narrower and shallower than the paper's.
SHORT: dict[str, Any] = {"batch": 4, "steps": 100, "schedule": "cosine", "clip": 1.0, "ema": 0.99}
LSO_PAPER = dataclasses.replace(RECIPES["lso-cave"], learning_rate=1e-3, **SHORT)
LSO_REGRESSION = dataclasses.replace(RECIPES["lso-cave-regression"], **SHORT)
SMALL = {"width": 32, "depths": (1, 1, 2)}
COFUSION = dataclasses.replace(
    RECIPES["cofusion-cave"], options=SMALL, patch=64, learning_rate=1e-3, **SHORT
)


def without(**parts: str) -> Recipe:
    """The small CoFusion with parts replaced by residual blocks, as in the paper's ablation."""
    return dataclasses.replace(COFUSION, options={**SMALL, **parts})


#: By name: the recipe and its minutes.
TRAININGS: dict[str, tuple[Recipe, float]] = {
    "LSO": (LSO_PAPER, 7),
    "LSO, regression prior": (LSO_REGRESSION, 18),
    "LSO, regression prior, x8": (dataclasses.replace(LSO_REGRESSION, scale=8), 7),
    "LSO, x8": (dataclasses.replace(LSO_PAPER, scale=8), 7),
    "CoFusion, small": (COFUSION, 6),
    "CoFusion, small, regression prior": (
        dataclasses.replace(
            LSO_REGRESSION,
            model="CoFusion",
            options={**SMALL, "prior": "regression"},
        ),
        7,
    ),
    "CoFusion, small, x8": (dataclasses.replace(COFUSION, scale=8), 6),
    "CoFusion, small, without SpaCAM": (without(spatial="residual"), 6),
    "CoFusion, small, without SpeCAM": (without(spectral="residual"), 6),
    "CoFusion, small, without SSCFM": (without(cross="residual"), 6),
}
VALIDATION = ("cave:sponges", "cave:stuffed_toys")
# Of scenes whose terms let pictures of them be passed on: EO-1 and AVIRIS are public, CAVE is not.
PICTURES = {("paris_eo1", 3), ("jasper_ridge", 4)}


def fused_row(
    case: Case, title: str, method: str, options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Fuse a case, and the row that says how good it is and how long it took."""
    start = time.perf_counter()
    fused = run(case, method, **options)
    seconds = time.perf_counter() - start
    row = {"scene": case.name, "scale": case.scale, "method": title, **score(case, fused)}
    return fused, {**row, "seconds": seconds, "protocol": case.protocol}


def scenes(minutes: float, folder: Path) -> Iterator[dict[str, Any]]:
    """Every method on every scene."""
    for name, scale in SCENES:
        case = case_of(load_scene(name), scale)
        for title, method, options in METHODS:
            extra = {"minutes": minutes} if method == "fsrvl" else {}
            fused, row = fused_row(case, title, method, {**options, **extra})
            if title in ("regression", "fsrvl") and (name, scale) in PICTURES:
                figure = fusion_figure(
                    fused,
                    case.lr_hsi,
                    case.hr_msi,
                    reference=case.reference,
                    wavelengths=case.wavelengths,
                    title=f"{case.name} x{case.scale}, {title}",
                )
                picture = f"{case.name}_x{case.scale}_{title}.png".replace(":", "_")
                save_figure(folder / picture, figure)
            yield row


def ablations(minutes: float, folder: Path) -> Iterator[dict[str, Any]]:
    """The four rows of FSRVL's Table 2."""
    case = case_of(load_scene(ABLATION_SCENE[0]), ABLATION_SCENE[1])
    for title, options in ABLATIONS:
        yield fused_row(case, title, "fsrvl", {**options, "minutes": minutes})[1]


def misregistration(minutes: float, folder: Path) -> Iterator[dict[str, Any]]:
    """The HSI's sensor out of register, unknown to the method."""
    scene = load_scene(ABLATION_SCENE[0])
    for title, displacement in MISREGISTRATIONS:
        case = case_of(scene, ABLATION_SCENE[1], **displacement)
        for method in DISPLACED:
            options = {"minutes": minutes} if method == "fsrvl" else {}
            _, row = fused_row(case, f"{method}, {title}", method, {**options, "blind": True})
            yield row


def weights_of(name: str) -> tuple[str, Path]:
    """A network of `TRAININGS`, trained now unless it was before: its title and its file."""
    recipe, minutes = TRAININGS[name]
    folder = Path("out") / "quality" / name.replace(", ", "_").replace(" ", "_")
    train(recipe, folder, minutes=minutes, resume=True)
    return f"{name}, {minutes:g} min", folder / "model.safetensors"


def trained_rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """The networks on the validation scenes, at the scale that they were trained for."""
    for name in names:
        title, weights = weights_of(name)
        recipe = TRAININGS[name][0]
        for scene in VALIDATION:
            case = case_of(load_scene(scene), recipe.scale)
            yield fused_row(case, title, recipe.model.lower(), {"weights": weights})[1]


def trained(minutes: float, folder: Path) -> Iterator[dict[str, Any]]:
    """LSO and CoFusion, from the papers' prior and from the closed form."""
    yield from trained_rows([name for name in TRAININGS if "without" not in name])


def cofusion(minutes: float, folder: Path) -> Iterator[dict[str, Any]]:
    """CoFusion's ablation."""
    yield from trained_rows(["CoFusion, small", *(n for n in TRAININGS if "without" in n)])


def cross_scale(minutes: float, folder: Path) -> Iterator[dict[str, Any]]:
    """Networks trained at x4 on pairs of x4 to x32, by both of LSO's protocols."""
    networks = [weights_of(name) for name in ("LSO", "LSO, regression prior")]
    for scale in (4, 8, 16, 32):
        case = case_of(load_scene(VALIDATION[0]), scale)
        yield fused_row(case, "bicubic", "bicubic", {})[1]
        yield fused_row(case, "regression", "regression", {})[1]
        for title, weights in networks:
            for protocol in ("page", "script"):
                start = time.perf_counter()
                fused, _ = run_across_scales(case, weights, protocol)
                seconds = time.perf_counter() - start
                yield {
                    "scene": case.name,
                    "scale": scale,
                    "method": f"{title}, {protocol}",
                    **score(case, fused),
                    "seconds": seconds,
                    "protocol": case.protocol,
                }


SECTIONS = {
    "scenes": (
        scenes,
        "## Methods on real scenes",
        "The sensors are told to the method unless the row says otherwise; on paris_eo1 the second "
        "sensor is real and its response is estimated. fsrvl is fitted to the pair alone, for "
        "{minutes:g} minutes at most.",
    ),
    "ablations": (
        ablations,
        "## FSRVL without its parts",
        "The paper's Table 2 on {scene}, {minutes:g} minutes at most each.",
    ),
    "misregistration": (
        misregistration,
        "## Sensors out of register",
        "The HSI's sensor is displaced before it samples {scene}; the methods are not told the "
        "sensors. The reference stays in register with the MSI. fsrvl {minutes:g} minutes at most.",
    ),
    "trained": (
        trained,
        "## LSO and CoFusion, trained for minutes",
        "Trained on eight other CAVE scenes for the minutes in each row's name, on the threads "
        "named below, by the recipes of `TRAININGS` in `benchmarks/quality.py`; the papers train "
        "for hours on a GPU, and nothing here speaks for or against their figures. CoFusion has 32 "
        "features and one, one and two blocks. The weights that did best on these two scenes are "
        "kept, as in any training here. The same scenes by `bicubic`, `regression` and "
        "`fsrvl`: first table. "
        "What was tried to beat the closed form: [training.md](training.md).",
    ),
    "cofusion": (
        cofusion,
        "## CoFusion without its parts",
        "The paper's ablation, each module replaced by a residual block, at the budget of each "
        "row's name: far from a finished training, and single runs. The first network is that of "
        "the table above, trained another time: so much differs between two runs of the same.",
    ),
    "cross_scale": (
        cross_scale,
        "## Other scales than trained for",
        "The networks of x4 on pairs of x4 to x32, by both of LSO's protocols: *page* applies the "
        "network at the pair's own scale, *script* resizes the HSI in the Fourier domain to the "
        "network's scale.",
    ),
}


def kept(path: Path, without: list[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run, of the sections that are not run now."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["section"] in without:
                continue
            typed: dict[str, Any] = {}
            for key, value in row.items():
                if value != "":
                    try:
                        typed[key] = float(value)
                    except ValueError:
                        typed[key] = value
            typed["scale"] = int(typed["scale"])
            rows.append(typed)
    return rows


def place(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Put a row where the earlier one of the same case and method is, or at the end."""
    names = ("section", "scene", "scale", "method")
    for index, earlier in enumerate(rows):
        if all(earlier[name] == row[name] for name in names):
            rows[index] = row
            return
    rows.append(row)


def page(rows: list[dict[str, Any]], folder: Path) -> str:
    """The Markdown page."""
    lines = [
        "# Quality on real scenes",
        "",
        "Made by `make quality` (`python -m benchmarks.quality --write docs/quality.md`) from the "
        "scenes in the folder named by `FASTFUSION_DATA`; full precision in "
        "[quality.csv](quality.csv).",
        "",
        "Conventions: values in [0, 1]; PSNR is the mean over bands with range 1; SAM in degrees, "
        "zero spectra left out; ERGAS with the factor 100/scale; SSIM with a Gaussian window of 11 "
        "and sigma 1.5, mean over bands. Wald's protocol with LSO's degradation: Gaussian of sigma "
        "0.5*scale, size 2*ceil(3 sigma)+1, circular, sampled from offset 0. The MSI of the CAVE "
        "scenes is made by the matrix `P` of `nikon_d700_P_N_V2.mat`; that of jasper_ridge by four "
        "flat bands; that of paris_eo1 is the real ALI image. Times are of single runs on a shared "
        "machine, and no benchmark; a fit ends by them: a quieter machine gives fsrvl more steps. "
        "What else was tried: [regression.md](regression.md), [fsrvl.md](fsrvl.md).",
        "",
    ]
    for section, (_, heading, text) in SECTIONS.items():
        mine = [row for row in rows if row["section"] == section]
        if not mine:
            continue
        where = f"{ABLATION_SCENE[0]} x{ABLATION_SCENE[1]}"
        first = mine[0]
        lines += [heading, "", text.format(minutes=first["minutes"], scene=where), ""]
        lines += [markdown_table(mine), ""]
        lines += [
            f"{first['cpu']}, {int(first['threads'])} threads, torch {first['torch']}, kernels for "
            f"{first['capability']}.",
            "",
        ]
        if section == "scenes":
            for picture in sorted(folder.glob("*.png")):
                lines += [f"![{picture.stem}]({folder.name}/{picture.name})", ""]
    return "\n".join(lines)


def main() -> None:
    """Run the sections and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page, docs/quality.md")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=10, help="FSRVL's budget a scene")
    parser.add_argument(
        "--methods",
        nargs="+",
        help="run these rows of scenes and misregistration alone, keep the rest",
    )
    parser.add_argument("--page-only", action="store_true", help="write the page from the CSV")
    options = parser.parse_args()
    source, folder = options.write.with_suffix(".csv"), options.write.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    sections = [] if options.page_only else options.sections
    if options.methods:
        METHODS[:] = [one for one in METHODS if one[0] in options.methods]
        DISPLACED[:] = [method for method in DISPLACED if method in options.methods]
    rows = kept(source, without=[] if options.methods else sections)
    context = {**machine.describe(), "minutes": options.minutes}
    for section in sections:
        for row in SECTIONS[section][0](options.minutes, folder):
            place(rows, {"section": section, **row, **context})
            print(markdown_table([row]).splitlines()[-1], flush=True)
            source.write_text(csv_table(rows))
    options.write.write_text(page(rows, folder))


if __name__ == "__main__":
    main()
