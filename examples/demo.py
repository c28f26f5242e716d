"""Fuse the built-in scene with every method and time the fast layers: ``make demo``.

Prints how good each method is and how long it took, how much faster the layers run than their
definitions in plain PyTorch and by how much the results differ, and writes a picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastfusion
from fastfusion import nn
from fastfusion.data import load_scene
from fastfusion.evaluation import case_of, run, score
from fastfusion.figures import fusion_figure, save_figure

METHODS = {
    "bicubic (no fusion)": ("bicubic", {}),
    "regression, global only": ("regression", {"local": False}),
    "regression": ("regression", {}),
    "fsrvl, fitted for half a minute": ("fsrvl", {"minutes": 0.5}),
}
LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LatentOperator2d (LSO)": lambda: nn.LatentOperator2d(64),
    "FrequencyFilter2d (FSRVL)": lambda: nn.FrequencyFilter2d(64).eval(),
    "HaarSplit2d (CoFusion)": nn.HaarSplit2d,
    "MultiscaleAttention (CoFusion)": lambda: nn.MultiscaleAttention(64),
    "LargeKernelAttention (VAN)": lambda: nn.LargeKernelAttention(64),
    "DepthwiseConv2d 7x7, dilation 3": lambda: nn.DepthwiseConv2d(64, 64, 7, dilation=3),
}


def methods() -> tuple[list[list[str]], dict[str, Tensor]]:
    """Quality and time of each method on the built-in scene, 4 times coarser."""
    case = case_of(load_scene("demo"), scale=4)
    rows, images = [], {}
    for title, (method, options) in METHODS.items():
        start = time.perf_counter()
        images[title] = run(case, method, **options)
        seconds = time.perf_counter() - start
        found = score(case, images[title])
        figures = [f"{found[name]:.2f}" for name in ("psnr", "sam", "ergas")]
        rows.append([title, *figures, f"{found['ssim']:.4f}", f"{seconds:.1f}"])
    return rows, images


def outputs(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What a layer gives, as one tensor."""
    y = layer(x)
    return torch.cat(y) if isinstance(y, tuple) else y


@torch.inference_mode()
def layers() -> list[list[str]]:
    """Time of each layer on the backend of choice and on the reference, taking turns."""
    rows = []
    x = torch.randn(1, 64, 256, 256)
    for title, make in LAYERS.items():
        layer = make()
        times: dict[str, list[float]] = {"auto": [], "reference": []}
        results = {}
        for turn in range(4):
            for name, taken in times.items():
                with fastfusion.backend(name):
                    start = time.perf_counter()
                    results[name] = outputs(layer, x)
                    if turn:  # the first one warms up
                        taken.append(time.perf_counter() - start)
        fast, slow = (statistics.median(times[name]) for name in ("auto", "reference"))
        difference = (results["auto"] - results["reference"]).abs().max().item()
        size = results["reference"].abs().max().item()
        rows.append(
            [
                title,
                f"{1e3 * fast:.1f}",
                f"{1e3 * slow:.1f}",
                f"{slow / fast:.1f}",
                f"{difference:.1e} of {size:.1e}",
            ]
        )
    return rows


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}\n")
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *rest]))


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the picture")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    print(f"fastfusion {fastfusion.__version__}, torch {torch.__version__}")
    for name, state in fastfusion.backends().items():
        print(f"  {name:10s} {state}")

    rows, images = methods()
    show(
        "The built-in scene: 31 bands, fused from 64x64 and an RGB image of 256x256",
        ["method", "PSNR dB", "SAM deg", "ERGAS", "SSIM", "s"],
        rows,
    )
    show(
        f"Layers on 1x64x256x256, float32, {torch.get_num_threads()} threads",
        ["layer", "ms", "reference ms", "faster", "largest difference"],
        layers(),
    )
    case = case_of(load_scene("demo"), scale=4)
    figure = fusion_figure(
        images["regression"],
        case.lr_hsi,
        case.hr_msi,
        reference=case.reference,
        wavelengths=case.wavelengths,
        title="fastfusion: the built-in scene, fused by regression",
    )
    save_figure(options.out, figure)
    print(f"\nThe picture: {options.out}")


if __name__ == "__main__":
    main()
