"""The passes, one after the other, and what their tiles' statistics amount to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfusion._optional import need
from fastfusion.data import estimation
from fastfusion.data.files import open_cube, write_cube
from fastfusion.data.formats import zarr_store
from fastfusion.data.sensors import BOUNDARIES, Degradation
from fastfusion.data.windows import Stretch
from fastfusion.models.cofusion import CoFusion
from fastfusion.scheduling import Runner
from fastfusion.tiling.folder import load, save
from fastfusion.tiling.job import Job, run_task

#: Values a little beyond [0, 1] are noise, as in `fastfusion.fuse`.
LEAST, MOST = -0.05, 1.05


@dataclasses.dataclass(frozen=True)
class Report:
    """What `fuse_files` did.

    Attributes:
        out: the cube's file.
        shape: ``(G, H, W)``.
        scale: how many times finer the MSI is.
        peak: what values were divided by.
        tile: side of a tile in MSI pixels.
        margin: MSI pixels around a tile that were read with it.
        tiles: how many there are.
        found: how many were there already from an earlier run.
        seconds: of each pass, by its name.
    """

    out: str
    shape: tuple[int, int, int]
    scale: int
    peak: float
    tile: int
    margin: int
    tiles: int
    found: int
    seconds: dict[str, float]


class Passes:
    """Runs what is missing of each pass, puts the tiles' statistics together, ends the result."""

    def __init__(self, work: Path, plan: dict[str, Any], run: Runner, progress: bool) -> None:
        self.work, self.plan, self.runner, self.progress = work, plan, run, progress
        self.digest = hashlib.sha256((work / "plan.json").read_bytes()).hexdigest()
        self.job = Job(work)
        self.count = math.prod(self.job.grid)
        self.seconds: dict[str, float] = {}
        self.found = 0

    def run(self, out: Path) -> Report:
        if self._done("fuse") == self.count and not (self.work / "result.zarr").exists():
            pass  # it was put in its place, and the end came before the folder was removed
        else:
            self._statistics()
            self._create()
            self.found = self._done("fuse")
            self._tiles("fuse", "fuse")
            start = time.monotonic()
            self._finish(out)
            self.seconds["finish"] = round(time.monotonic() - start, 3)
        return Report(
            out=os.fspath(out),
            shape=tuple(self.plan["shape"]),
            scale=self.plan["scale"],
            peak=Job(self.work).peak,
            tile=self.plan["tile"],
            margin=self._margin(),
            tiles=self.count,
            found=self.found,
            seconds=self.seconds,
        )

    def _margin(self) -> int:
        job = Job(self.work)
        prior = job.model.halo if job.prior_kind == "regression" else 3
        if job.prior_kind == "regression" and job.network is not None:
            prior += job.model.refine_halo
        return self.plan["margin"] + prior * self.plan["scale"]

    def _done(self, stage: str) -> int:
        return sum(1 for _ in (self.work / stage).glob("*.npz"))

    def _tiles(self, stage: str, title: str) -> Iterator[dict[str, Tensor]]:
        """Do what is missing of a pass; then what its tiles left, always in the same order."""
        folder = self.work / stage
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{index:06}.npz" for index in range(self.count)]
        tasks = [
            (str(self.work), self.digest, stage, index)
            for index, path in enumerate(paths)
            if not path.exists()
        ]
        start = time.monotonic()
        with _bar(self.progress, title, self.count, self.count - len(tasks)) as advance:
            self.runner(run_task, tasks, advance)
        self.seconds[stage] = round(time.monotonic() - start, 3)
        return (load(path) for path in paths)

    def _statistics(self) -> None:
        plan, work = self.plan, self.work
        if not (work / "scan.npz").exists():
            self._scan(self._tiles("scan", "values"))
        job = Job(work)
        if job.prior_kind == "regression":
            if plan["psf"] is None and not (work / "psf.npz").exists():
                psf = _middle_psf(job)
                save(work / "psf.npz", psf=psf.psf, offset=psf.offset)
            if not (work / "sensors.npz").exists():
                self._sensors(self._tiles("moments", "sensors"))
            if plan["options"].get("local", True) and not (work / "sharpness.npz").exists():
                sums = sum(tile["sums"] for tile in self._tiles("sharpness", "sharpness"))
                save(work / "sharpness.npz", sums=sums)
        if isinstance(job.network, CoFusion):
            for number in range(_rounds(job.network)):
                path = work / f"maxima{number:02}.npz"
                if path.exists():
                    continue
                maxima: dict[str, Tensor] = {}
                for tile in self._tiles(path.stem, f"maxima {number + 1}"):
                    for name, value in tile.items():
                        maxima[name] = torch.maximum(maxima.get(name, value), value)
                save(path, **maxima)

    def _scan(self, tiles: Iterator[dict[str, Tensor]]) -> None:
        limits = [torch.stack([tile["hsi"], tile["msi"]]) for tile in tiles]
        least = min(tile[:, 0].min().item() for tile in limits)
        largest = max(tile[:, 1].max().item() for tile in limits)
        peak = self.plan["peak"]
        if peak is None:
            # A detail may be brighter than any of the mixed pixels that it was seen in.
            peak = 1.0 if largest <= 1 else 1.25 * largest
        if least / peak < LEAST or largest / peak > MOST:
            raise ValueError(
                f"expected values in [0, 1] after division by the peak {peak:g}, "
                f"got {least / peak:g} to {largest / peak:g}"
            )
        save(self.work / "scan.npz", peak=float(peak))

    def _sensors(self, tiles: Iterator[dict[str, Tensor]]) -> None:
        job, bands = Job(self.work), self.plan["msi_bands"]
        names = list(job.candidates)
        size = 1 + bands + self.plan["shape"][0]
        whole, edge = torch.zeros(2, len(names), size, size, dtype=torch.float64)
        for tile in tiles:
            whole += tile["whole"]  # one for all, or one for each boundary
            edge += tile["edge"]
        best = names[0]
        if len(names) > 1:
            misfits = {
                name: estimation.edge_misfit(whole[at], edge[at], bands)
                for at, name in enumerate(names)
            }
            best = estimation.likeliest_boundary(misfits)
        moments = whole[names.index(best)]
        given = self.plan["srf"]
        srf = (
            estimation.srf_from_moments(moments, bands)
            if given is None
            else torch.tensor(given, dtype=torch.float64)
        )
        boundary = list(BOUNDARIES).index(best)
        save(self.work / "sensors.npz", moments=moments, srf=srf, boundary=boundary)

    def _create(self) -> None:
        """The store that tiles are written to; what a killed run left half written goes.

        Its description is made anew each time: one that was damaged since would go on unnoticed.
        """
        store, fresh = self.work / "result.zarr", self.work / "fresh.zarr"
        shutil.rmtree(fresh, ignore_errors=True)
        job = Job(self.work)
        metadata: dict[str, Any] = {
            key: job.msi.metadata[key] for key in ("crs", "transform") if key in job.msi.metadata
        }
        zarr_store.create(
            fresh, tuple(self.plan["shape"]), self.plan["chunk"], job.hsi.wavelengths, metadata
        )
        if store.exists():
            for left in store.rglob("*.partial"):
                left.unlink()
            (fresh / "zarr.json").replace(store / "zarr.json")
            shutil.rmtree(fresh)
        else:
            # Tiles that are marked as done were in a store that is gone.
            shutil.rmtree(self.work / "fuse", ignore_errors=True)
            fresh.rename(store)

    def _finish(self, out: Path) -> None:
        """The store takes the output's name, or is copied to another format."""
        store = self.work / "result.zarr"
        if out.suffix.lower() != ".zarr":
            write_cube(out, open_cube(store))
            return
        target = Path(os.path.realpath(out))
        if target.exists():  # an earlier output, as was checked before
            target.rename(self.work / "earlier")
        store.rename(target)


def _middle_psf(job: Job) -> Degradation:
    """The PSF by the scene's middle, as `estimate_sensors` takes it."""
    rows, columns = (Stretch.of(s.start, s.stop) for s in estimation.middle(job.rows, job.columns))
    hsi, msi = job._pair(rows, columns)
    found = estimation.candidate_degradations(hsi.double(), msi.double(), job.scale)
    return next(iter(found.values()))


def _rounds(network: CoFusion) -> int:
    """Passes until all maxima are known: each block's depend on those of the block before."""
    chains = network.depths if network.spectral == "specam" else (0,)
    return max(chains) + (network.cross == "sscfm")


@contextlib.contextmanager
def _bar(shown: bool, title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    tqdm = need("tqdm", extra="io", purpose="a progress bar")
    with tqdm.tqdm(total=total, initial=done, desc=title, unit="tile") as bar:
        yield lambda: bar.update() and None
