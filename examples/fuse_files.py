"""Fuse two files from Python: read, fuse, write, and look at what came out.

Without files of your own it makes a pair first, a coarse .mat and a fine .npy of the built-in
scene, and since the truth is known there, it tells how near the result came.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import fastfusion
from fastfusion import data, metrics
from fastfusion.evaluation import case_of


def made_pair(folder: Path) -> tuple[Path, Path, torch.Tensor]:
    """Two files of the built-in scene, 4 times coarser and in 3 broad bands, and the truth."""
    case = case_of(data.load_scene("demo"), scale=4)
    assert case.reference is not None
    coarse, fine = folder / "coarse.mat", folder / "fine.npy"
    data.write_cube(coarse, data.Cube(case.lr_hsi.numpy(), wavelengths=case.wavelengths))
    data.write_cube(fine, data.Cube(case.hr_msi.numpy()))
    return coarse, fine, case.reference


def main() -> None:
    """Fuse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hsi", type=Path, help="many bands, coarse")
    parser.add_argument("--msi", type=Path, help="few bands, fine")
    parser.add_argument("--out", type=Path, default=Path("out/fused.npy"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    truth = None
    if options.hsi is None or options.msi is None:
        options.hsi, options.msi, truth = made_pair(options.out.parent)

    coarse, fine = data.read_cube(options.hsi), data.read_cube(options.msi)
    # Both images must be in one unit; counts would be divided by one peak: coarse.normalized(peak=)
    fused = fastfusion.fuse(coarse.data, fine.data)  # NumPy in, NumPy out, bands first
    data.write_cube(options.out, data.Cube(fused, wavelengths=coarse.wavelengths))

    print(f"{options.hsi}: {coarse.shape}, {options.msi}: {fine.shape}")
    print(f"{options.out}: {fused.shape}, {fused.min():.3f} to {fused.max():.3f}")
    if truth is not None:
        found, wanted = torch.from_numpy(np.asarray(fused))[None], truth[None]
        print(
            f"PSNR {metrics.psnr(found, wanted):.2f} dB, SAM {metrics.sam(found, wanted):.2f} deg"
        )


if __name__ == "__main__":
    main()
