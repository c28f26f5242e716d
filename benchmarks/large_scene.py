"""Fuse a synthetic scene from disk to disk, killed on the way or not, and say what it took.

``make large-scene`` makes a pair of zarr stores tile by tile, fuses it, fuses it again killed
twice by SIGKILL and resumed, and compares the bytes; see docs/large-scenes.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastfusion.data import Degradation, apply_srf
from fastfusion.data.formats import zarr_store

ENDMEMBERS = 8


class SyntheticScene:
    """Radiance as a function of place, periodic in ``side``, so that any part can be made alone:
    smooth fields, sharp-edged parcels, and each pixel's own texture and noise."""

    def __init__(self, side: int, bands: int, msi_bands: int, scale: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.side, self.bands, self.scale = side, bands, scale
        position = torch.linspace(0, 1, bands)
        centre, width = torch.rand(2, ENDMEMBERS, 1, generator=generator)
        curves = torch.exp(-(((position - centre) / (0.1 + 0.3 * width)) ** 2))
        self.spectra = 0.05 + 0.5 * curves
        where = (torch.arange(msi_bands) + 0.5)[:, None] / msi_bands
        self.srf = torch.softmax(-0.5 * ((position - where) * msi_bands) ** 2, 1)
        self.degradation = Degradation.gaussian(scale)
        # Whole numbers of waves over the side make the scene go on at its other end.
        self.waves = torch.randint(1, 40, (2, ENDMEMBERS), generator=generator)
        self.phases = 6.28 * torch.rand(ENDMEMBERS, generator=generator)

    def radiance(self, rows: slice, columns: slice) -> Tensor:
        """``(bands, rows, columns)`` of the stretches, which may reach beyond the scene."""
        at = [torch.arange(s.start, s.stop) % self.side for s in (rows, columns)]
        angles = [2 * torch.pi / self.side * place.double() for place in at]
        waves = [
            (count[:, None] * angle).float()
            for count, angle in zip(self.waves, angles, strict=True)
        ]
        fields = torch.sin(waves[0][:, :, None] + waves[1][:, None] + self.phases[:, None, None])
        parcels = (at[0][:, None] // 57 * 31 + at[1] // 43 * 17) % ENDMEMBERS
        amounts = 0.2 + 0.1 * fields
        amounts += 0.5 * (parcels == torch.arange(ENDMEMBERS)[:, None, None])
        texture = (at[0][:, None] * 7919 + at[1] * 104729) % 1009 / 1009
        amounts *= 0.8 + 0.4 * texture
        cube = torch.einsum("eb,ehw->bhw", self.spectra, amounts / amounts.sum(0).amax())
        band = torch.arange(self.bands)[:, None, None]
        noise = (at[0][:, None] * 15485863 + at[1] * 32452843 + band * 49979687) % 2039 / 2039
        return cube + 0.002 * (noise - 0.5)

    def write(self, folder: Path, block: int) -> None:
        """``hsi.zarr`` and ``msi.zarr`` of the scene, a block of so many pixels at a time."""
        low = self.side // self.scale
        shapes = {"hsi": (self.bands, low, low), "msi": (len(self.srf), self.side, self.side)}
        stores = {
            name: zarr_store.create(folder / f"{name}.zarr", shape, 128, None, {})
            for name, shape in shapes.items()
        }
        margin = -(-self.degradation.psf.shape[0] // self.scale) * self.scale
        for row in range(0, self.side, block):
            for column in range(0, self.side, block):
                ends = [min(first + block, self.side) for first in (row, column)]
                wide = [
                    slice(first - margin, end + margin)
                    for first, end in zip((row, column), ends, strict=True)
                ]
                cube = self.radiance(*wide)
                inner = cube[:, margin:-margin, margin:-margin]
                stores["msi"][:, row : ends[0], column : ends[1]] = apply_srf(
                    inner, self.srf
                ).numpy()
                keep = slice(margin // self.scale, -(margin // self.scale))
                coarse = [
                    slice(first // self.scale, end // self.scale)
                    for first, end in zip((row, column), ends, strict=True)
                ]
                low = self.degradation(cube)[:, keep, keep]
                stores["hsi"][:, coarse[0], coarse[1]] = low.numpy()


def fuse(folder: Path, out: str, more: list[str], kill_at: int | None = None) -> dict[str, float]:
    """Run the command; end it by SIGKILL when so many tiles are done. Peak memory and time."""
    command = [sys.executable, "-m", "fastfusion", "fuse", "--hsi", "hsi.zarr", "--msi", "msi.zarr"]
    start = time.monotonic()
    process = subprocess.Popen([*command, "--out", out, "--no-progress", *more], cwd=folder)
    marks, peak = folder / f"{out}.work" / "fuse", 0
    while process.poll() is None:
        time.sleep(0.2)
        peak = max(peak, _peak_memory(process.pid))
        if kill_at is not None and len(list(marks.glob("*.npz"))) >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if kill_at is None and process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": round(time.monotonic() - start, 1), "peak_gib": round(peak / 2**30, 2)}


def _peak_memory(process: int) -> int:
    """The largest resident set so far, in bytes, as Linux tells it; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def digest(store: Path) -> str:
    """Of every file of a store and its name."""
    total = hashlib.sha256()
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(store)).encode() + b"\0")
        with path.open("rb") as file:
            total.update(file.read())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="some 7 bytes a value of room")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--bands", type=int, default=64)
    parser.add_argument("--msi-bands", type=int, default=4)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--kill-at", type=int, nargs="*", default=[8, 20], help="tiles done")
    parser.add_argument("--keep", action="store_true", help="leave the stores")
    asked, more = parser.parse_known_args()
    folder = asked.folder / "large-scene"
    folder.mkdir(parents=True)
    try:
        scene = SyntheticScene(asked.side, asked.bands, asked.msi_bands, asked.scale)
        scene.write(folder, 512)
        shape = f"{asked.side}x{asked.side}x{asked.bands}"
        print(
            json.dumps({"scene": shape, "uninterrupted": fuse(folder, "whole.zarr", more)}),
            flush=True,
        )
        for tiles in asked.kill_at:
            killed = fuse(folder, "resumed.zarr", more, kill_at=tiles)
            print(json.dumps({"killed at": tiles, **killed}), flush=True)
        if asked.kill_at:
            print(json.dumps({"resumed": fuse(folder, "resumed.zarr", more)}), flush=True)
            same = digest(folder / "whole.zarr") == digest(folder / "resumed.zarr")
            print(json.dumps({"same bytes": same}))
            if not same:
                sys.exit(1)
        check(scene, folder)
    finally:
        if not asked.keep:
            shutil.rmtree(folder)


def check(scene: SyntheticScene, folder: Path) -> None:
    """Print the error against the truth, of some rows."""
    from fastfusion.data import open_cube

    fused = open_cube(folder / "whole.zarr").data
    rows = slice(scene.side // 2, scene.side // 2 + 64)
    error = torch.from_numpy(np.asarray(fused[:, rows, :])) - scene.radiance(
        rows, slice(0, scene.side)
    )
    print(json.dumps({"psnr_db": round(-10 * error.square().mean().log10().item(), 2)}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
