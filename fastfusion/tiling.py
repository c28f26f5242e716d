"""`fuse` for scenes larger than memory: from disk to disk, tile by tile, resumable.

Statistics of the whole scene are gathered in passes of their own before, so that a tile's result is
the whole's: the peak; the sums that sensors and the regression's one map come from; those that tell
how sharp the bands are; CoFusion's maxima. Every tile is read with a margin as wide as what its
pixels depend on.

All state is in files of a work folder beside the output. A task is a function of that folder, the
name of a pass and the number of a tile; it leaves one file behind, which takes its name when it is
complete. So tasks run anywhere the folder is seen, and what has a file need not be done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfusion._optional import need
from fastfusion._version import __version__
from fastfusion.data import estimation
from fastfusion.data.files import check_output, open_cube, write_cube
from fastfusion.data.formats import zarr_store
from fastfusion.data.sensors import BOUNDARIES, Degradation
from fastfusion.data.windows import Stretch, Windows
from fastfusion.fusing import Unavailable, scale_of
from fastfusion.models.cofusion import CoFusion
from fastfusion.models.lso import LSO
from fastfusion.models.regression import RegressionModel
from fastfusion.nn.cofusion import SceneMaxima, SpeCAM
from fastfusion.ops import checks, haar_split2d
from fastfusion.ops.operator import CHOICES
from fastfusion.ops.operator import backend as backend_for_block
from fastfusion.scheduling import Runner, executor

__all__ = ["Report", "Unfinished", "fuse_files"]

#: Values of one tile, bands times pixels, where no side is asked for: 128 MB.
TILE_VALUES = 2**25
#: Memory of the process beside its tiles, in bytes.
BASE_MEMORY = 600 * 2**20
#: Values a little beyond [0, 1] are noise, as in `fastfusion.fuse`.
LEAST, MOST = -0.05, 1.05

_METHODS = ("regression", "bicubic", "lso", "cofusion")
_REGRESSION_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "local": checks.flag,
    "ridge": checks.positive,
    "iterations": functools.partial(checks.integer, low=0),
    "window_sigma": lambda name, value: value is None or checks.positive(name, value),
}


class Unfinished(RuntimeError):
    """The work stopped on the way; the message says why, and how to go on."""


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


def fuse_files(
    hsi: str | os.PathLike[str],
    msi: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "regression",
    *,
    srf: Tensor | None = None,
    psf: Degradation | None = None,
    peak: float | None = None,
    tile: int | None = None,
    margin: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    memory: float = 4.0,
    backend: str = "auto",
    device: str = "cpu",
    progress: bool = False,
    **options: Any,
) -> Report:
    """Fuse two files into a third, none of which has to fit in memory.

    The result is `fastfusion.fuse`'s within rounding. While it works, its state is in the folder
    ``OUT.work``; the same call goes on there after a crash, and gives the same bytes. ``out`` is
    there when all is done.

    Args:
        hsi, msi: zarr, GeoTIFF, ENVI or .npy; ``FILE:NAME`` is one of several arrays.
        out: .zarr, .tif or .tiff.
        method: ``"regression"``, ``"bicubic"``, ``"lso"`` or ``"cofusion"``.
        srf, psf: as in `fastfusion.fuse`; estimated where None.
        peak: what becomes 1; by default 1 for values up to 1, else 1.25 times the largest value.
        tile: MSI pixels along a tile's side, brought to a multiple of what the method needs; by
            default so many that a tile's result takes 128 MB.
        margin: MSI pixels around a tile for a network; by default all that its pixels depend on.
            A narrower one costs less and leaves seams; see docs/large-scenes.md.
        weights: of ``"lso"`` and ``"cofusion"``.
        scheduler: address of a dask scheduler; by default threads of this process.
        workers: how many threads; by default those of torch, as far as ``memory`` allows.
        memory: in GiB, what the threads are chosen by.
        backend, device, progress: as in `fastfusion.fuse`.
        options: of the regression: ``local``, ``ridge``, ``iterations``, ``window_sigma``.

    Raises:
        TypeError, ValueError, OSError: bad input; nothing is left.
        Unavailable: the method, scheduler or device cannot be had.
        Unfinished: it stopped on the way (full disk, dead workers, Ctrl-C).
        ImportError: a library of the extra ``large`` is missing.
    """
    for name, value in (("hsi", hsi), ("msi", msi), ("out", out)):
        checks.path(name, value)
    _check_arguments(method, options, weights, tile, margin, workers, memory)
    if scheduler is not None:
        checks.of_type("scheduler", scheduler, str, "a scheduler's address or None")
    checks.choice("backend", backend, CHOICES)
    checks.placed(device, None)
    checks.flag("progress", progress)
    out = Path(out)
    if out.suffix.lower() not in (".zarr", ".tif", ".tiff"):
        raise ValueError(f"{out}: tiles go to .zarr or .tif")
    check_output(out)
    plan = _plan(hsi, msi, out, method, options, srf, psf, peak, tile, margin, weights)
    plan |= {"backend": backend, "device": str(device)}
    per_tile = _tile_bytes(plan)
    threads = torch.get_num_threads()
    if workers is None:
        room = memory * 2**30 - BASE_MEMORY
        workers = max(1, min(threads, int(room // per_tile)))
    work = Path(os.path.realpath(f"{os.fspath(out).rstrip('/')}.work"))
    with _work_folder(work, plan), contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(executor(scheduler, workers))
            report = _Passes(work, plan, run, progress).run(out)
            shutil.rmtree(work)
            return report
        except KeyboardInterrupt as error:
            raise Unfinished(f"interrupted; {_go_on(work)}") from error
        except OSError as error:
            message = error.strerror or str(error)
            if error.errno == errno.ENOSPC:
                message += "; free some space"
            raise Unfinished(f"{message}; {_go_on(work)}") from error
        except (ValueError, TypeError, Unavailable, ImportError):
            if not any((work / "fuse").glob("*.npz")):
                _remove(work)  # it holds nothing worth going on with
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unfinished(f"{reason}; {_go_on(work)}") from error
        finally:
            torch.set_num_threads(threads)
            _job.cache_clear()


def _remove(work: Path) -> None:
    """The folder, even while a worker that was told to stop still writes its last tile there."""
    gone = work.with_name(f"{work.name}.removed")
    if gone.exists():  # a run was killed while it removed this
        shutil.rmtree(gone)
    work.rename(gone)
    shutil.rmtree(gone)


def _go_on(work: Path) -> str:
    return f"what is done stays in {work}: run the same again to go on"


# ------------------------------------------------------------------------------------------------
# The plan: all that the result's bytes depend on
# ------------------------------------------------------------------------------------------------


def _check_arguments(
    method: str,
    options: Mapping[str, Any],
    weights: Any,
    tile: int | None,
    margin: int | None,
    workers: int | None,
    memory: float,
) -> None:
    checks.of_type("method", method, str, "a method's name")
    if method == "fsrvl":
        raise Unavailable(
            "fsrvl does not go in tiles: its filters act on the spectrum of the whole image; take "
            "method regression, or crop the scene"
        )
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    if method in ("lso", "cofusion") and weights is None:
        raise Unavailable(
            f"method {method!r} needs trained weights in tiles: name a file as weights= (train it "
            "on a part of the scene)"
        )
    if method in ("regression", "bicubic") and weights is not None:
        raise ValueError(f"weights: {method} has none")
    unknown = options.keys() - (_REGRESSION_CHECKS.keys() if method == "regression" else set())
    if unknown:
        raise TypeError(f"{method} in tiles has no option {', '.join(sorted(unknown))}")
    for name, value, least in (("tile", tile, 1), ("margin", margin, 0), ("workers", workers, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    checks.positive("memory", memory)
    if weights is not None:
        checks.path("weights", weights)
    for name, check in _REGRESSION_CHECKS.items():
        if name in options:
            check(name, options[name])
    if margin is not None and method in ("regression", "bicubic"):
        raise ValueError(f"margin: is for networks; that of {method} is what its pixels depend on")


def _plan(
    hsi: str | os.PathLike[str],
    msi: str | os.PathLike[str],
    out: Path,
    method: str,
    options: Mapping[str, Any],
    srf: Tensor | None,
    psf: Degradation | None,
    peak: float | None,
    tile: int | None,
    margin: int | None,
    weights: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    low, high = source_of(hsi), source_of(msi)
    scale = scale_of(low.shape, high.shape)
    if srf is not None:
        checks.response("srf", srf, (high.shape[0], low.shape[0]))
    if psf is not None:
        checks.of_type("psf", psf, Degradation, "a Degradation or None")
    if psf is not None and psf.scale != scale:
        raise ValueError(f"psf: expected a degradation by {scale}, got one by {psf.scale}")
    if peak is not None:
        checks.positive("peak", peak)
    network = None if weights is None else _network(method, weights, low, high, scale)
    reach, unit = support(network)
    unit = math.lcm(unit, scale)
    margin = -(-(reach if margin is None else margin) // unit) * unit
    if tile is None:
        values = TILE_VALUES if network is None else TILE_VALUES // 4
        tile = math.isqrt(values // low.shape[0])
        if math.lcm(unit, 64) <= tile:
            unit = math.lcm(unit, 64)  # whole chunks of a pleasant size
    side = max(1, round(tile / unit)) * unit
    chunk = max(n for n in range(1, min(side, zarr_store.CHUNK_SIDE) + 1) if side % n == 0)
    return {
        "hsi": _input(low),
        "msi": _input(high),
        "weights": None if weights is None else _stamp(Path(weights)),
        "out": out.name,
        "shape": [low.shape[0], *high.shape[1:]],
        "msi_bands": high.shape[0],
        "scale": scale,
        "method": method,
        "options": dict(options),
        "srf": None if srf is None else srf.double().tolist(),
        "psf": None if psf is None else _psf_to_json(psf),
        "peak": peak,
        "tile": side,
        "margin": margin,
        "chunk": chunk if chunk >= 16 else side,
        "versions": [__version__, str(torch.__version__), np.__version__],
    }


def source_of(name: str | os.PathLike[str]) -> Windows:
    """The cube in ``FILE`` or ``FILE:VARIABLE``, left on the disk; errors as in `open_cube`."""
    path, variable = os.fspath(name), None
    if not Path(path).exists() and ":" in path:
        path, _, variable = path.rpartition(":")
    return Windows(os.path.realpath(path), variable)


def _input(image: Windows) -> dict[str, Any]:
    opened = {"path": str(image.path), "variable": image.variable}
    return {"open": opened, "stamp": _stamp(image.path)}


def _stamp(path: Path) -> list[Any]:
    """What changes when a file does: its place, size and time."""
    inner = path / "zarr.json" if (path / "zarr.json").exists() else path
    state = inner.stat()
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns]


def _psf_to_json(psf: Degradation) -> dict[str, Any]:
    return {
        "psf": psf.psf.double().tolist(),
        "scale": psf.scale,
        "offset": psf.offset,
        "boundary": psf.boundary,
    }


def _psf_from_json(psf: Mapping[str, Any]) -> Degradation:
    return Degradation(**{**psf, "psf": torch.tensor(psf["psf"], dtype=torch.float64)})


def _network(
    method: str, weights: str | os.PathLike[str], low: Windows, high: Windows, scale: int
) -> LSO | CoFusion:
    """The network in a file, checked to fit the pair."""
    network = _load_network(method, weights)
    expected = (low.shape[0], high.shape[0], scale)
    if (network.hsi_bands, network.msi_bands, network.scale) != expected:
        raise ValueError(
            f"{weights}: expected a network for {expected[0]} and {expected[1]} bands and scale "
            f"{scale}, got one for {network.hsi_bands}, {network.msi_bands} and {network.scale}"
        )
    return network


def _load_network(
    method: str, weights: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> LSO | CoFusion:
    if method == "lso":
        return LSO.load(weights, device=device)
    return CoFusion.load(weights, device=device)


def support(network: nn.Module | None) -> tuple[int, int]:
    """How many pixels around one the correction of a network depends on, and of what number of
    pixels tiles have to begin at a multiple (its levels, patches and Haar blocks)."""
    if isinstance(network, LSO):
        patch = 4 * network.patch_size
        guide = 2 + 2 * network.guide_blocks
        encoders, decoders = 2 + 2 * 2 + 2 * 4, (4 + 2 * 2) + (2 + 2)
        return guide + encoders + patch - 1 + decoders + 1, patch
    if isinstance(network, CoFusion):
        reach = 0
        strides = (1, 2, 4)
        down = [1]
        for depth, stride in zip(network.depths[1:], strides[1:], strict=True):
            down.append(down[-1] + (1 + 2 * depth) * stride)
        up = down[-1:]
        for depth, stride in zip(network.depths[-2::-1], strides[-2::-1], strict=True):
            up.insert(0, up[0] + 2 * stride + (1 + 2 * depth) * stride)
        spatial = {"spacam": 5, "residual": 2}[network.spatial]
        spectral = {"specam": 3, "residual": 2}[network.spectral]
        for level in (2, 1, 0):
            stride, depth = strides[level], network.depths[level]
            branches = [
                down[level] + stride * spatial * (depth if network.spatial == "spacam" else 1),
                up[level] + stride * spectral * (depth if network.spectral == "specam" else 1),
            ]
            own = max(branches) + 3 * stride
            reach = max(own, reach + 2 * stride + stride)  # doubled, then a 3x3 convolution
        return reach + 1, 8
    return 0, 1


def _tile_bytes(plan: Mapping[str, Any]) -> int:
    """About what a tile takes while it is worked on."""
    bands, scale = plan["shape"][0], plan["scale"]
    side = plan["tile"] + 2 * plan["margin"]
    fused = 4 * bands * (side + 2 * 36 * scale) ** 2
    if plan["method"] in ("regression", "bicubic"):
        return 3 * fused
    channels = {"lso": 900, "cofusion": 1600}[plan["method"]]
    return 3 * fused + 4 * channels * side**2


# ------------------------------------------------------------------------------------------------
# The work folder
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(work: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Make the folder, or go on in it if it is of the same plan; nobody else works there."""
    text = json.dumps(plan, indent=1, sort_keys=True)
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{work}: another run is at work there; wait for it") from error
        file = work / "plan.json"
        if file.exists():
            earlier = json.loads(file.read_text())
            now = json.loads(text)
            changed = sorted(key for key in now if earlier.get(key) != now[key])
            if changed:
                raise ValueError(
                    f"{work} holds unfinished work that differs in {', '.join(changed)}: repeat "
                    "that call to go on, remove the folder to begin anew, or name another output"
                )
        else:
            _write_atomically(file, text.encode())
        yield


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save(path: Path, **values: Any) -> None:
    data = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in values.items()}
    np.savez(data, **arrays)
    _write_atomically(path, data.getvalue())


def _load(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


# ------------------------------------------------------------------------------------------------
# A scene's tiles and passes, as a task sees them
# ------------------------------------------------------------------------------------------------


def run_task(work: str, plan: str, stage: str, index: int) -> None:
    """Do one tile of one pass, and leave its file. ``plan`` is the digest of the plan."""
    torch.set_num_threads(1)  # as many tasks run as there are threads; and sums stay in one order
    job = _job(work, plan, stage, threading.get_ident())
    name = job.plan["backend"]
    backend = contextlib.nullcontext() if name == "auto" else backend_for_block(name)
    with torch.no_grad(), backend:
        results = job.passes[stage.rstrip("0123456789")](*job.tile(index))
    _save(Path(work, stage, f"{index:06}.npz"), **results)


@functools.lru_cache(maxsize=64)
def _job(work: str, plan: str, stage: str, thread: int) -> _Job:
    """One for each thread: a network's hooks hold what tile it works on."""
    return _Job(Path(work))


class _Job:
    """The two images, what earlier passes found, and what each pass does with a tile."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.plan = plan = json.loads((work / "plan.json").read_text())
        self.scale, self.device = plan["scale"], torch.device(plan["device"])
        self.scanned = _found(work / "scan.npz")
        peak = self.scanned["peak"].item() if self.scanned else 1.0
        self.hsi = Windows(**plan["hsi"]["open"], peak=peak)
        self.msi = Windows(**plan["msi"]["open"], peak=peak)
        self.peak = peak
        _, self.rows, self.columns = self.hsi.shape
        self.side = plan["tile"] // self.scale  # from here on, in HSI pixels
        self.margin = plan["margin"] // self.scale
        self.passes: dict[str, Callable[[Stretch, Stretch], dict[str, Any]]] = {
            "scan": self.scan,
            "moments": self.moments,
            "sharpness": self.sharpness,
            "maxima": self.maxima,
            "fuse": self.fuse,
        }

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.side), -(-self.columns // self.side)

    def tile(self, index: int) -> tuple[Stretch, Stretch]:
        """The tile's rows and columns of the HSI."""
        row, column = (self.side * at for at in divmod(index, self.grid[1]))
        return (
            Stretch.of(row, min(row + self.side, self.rows)),
            Stretch.of(column, min(column + self.side, self.columns)),
        )

    def _grown(
        self, rows: Stretch, columns: Stretch, margin: int, boundary: str = "replicate"
    ) -> tuple[Stretch, Stretch]:
        circular = boundary == "circular"
        return (
            rows.grown(margin, self.rows, circular=circular),
            columns.grown(margin, self.columns, circular=circular),
        )

    def _pair(self, rows: Stretch, columns: Stretch) -> tuple[Tensor, Tensor]:
        fine = rows.times(self.scale), columns.times(self.scale)
        return self.hsi.read(rows, columns).to(self.device), self.msi.read(*fine).to(self.device)

    # -- statistics ----------------------------------------------------------------------------

    def scan(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """Values are finite; the least and the largest."""
        limits = {}
        for name, image, factor in (("hsi", self.hsi, 1), ("msi", self.msi, self.scale)):
            values = image.read(rows.times(factor), columns.times(factor))
            bad = ~values.isfinite()
            if bad.any():
                band, row, column = (bad.nonzero()[0]).tolist()
                raise ValueError(
                    f"{image.path} holds NaN or infinite values, as in band {band}, row "
                    f"{row + factor * rows.first}, column {column + factor * columns.first} "
                    "(counted from 0); fill them in or cut them out first"
                )
            limits[name] = [values.min().item(), values.max().item()]
        return limits

    def moments(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """`pair_moments` of the tile and of its pixels near the scene's edge, by boundary."""
        candidates = self.candidates
        margin = _reach(next(iter(candidates.values())))
        inside = all(
            stretch.first >= margin and stretch.end + margin <= size
            for stretch, size in ((rows, self.rows), (columns, self.columns))
        )
        edge = estimation.edge_mask(self.rows, self.columns)
        edge = edge[rows.first : rows.end, columns.first : columns.end].to(self.device)
        sums, at_edge = [], []
        for boundary, degradation in candidates.items():
            grown = self._grown(rows, columns, margin, boundary)
            hsi, msi = self._pair(*grown)
            inner = (slice(None), *(stretch.inner for stretch in grown))
            hsi, low_msi = hsi[inner], degradation(msi.double())[inner]
            sums.append(estimation.pair_moments(hsi, low_msi))
            at_edge.append(estimation.pair_moments(hsi[:, edge], low_msi[:, edge]))
            if inside:  # no boundary is met
                break
        return {"whole": torch.stack(sums).cpu(), "edge": torch.stack(at_edge).cpu()}

    @functools.cached_property
    def candidates(self) -> dict[str, Degradation]:
        """The PSF that is given or was found, with the boundaries that may be."""
        if self.plan["psf"] is not None:
            given = _psf_from_json(self.plan["psf"])
            return {given.boundary: given}
        psf = _load(self.work / "psf.npz")
        return {
            boundary: Degradation(psf["psf"], self.scale, int(psf["offset"]), boundary)
            for boundary in BOUNDARIES
        }

    def sharpness(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        model = self.model
        grown = self._grown(rows, columns, model.maps_halo, model.degradation.boundary)
        inner = grown[0].inner, grown[1].inner
        return {"sums": model.sharpness_moments(*self._pair(*grown), inner).cpu()}

    @functools.cached_property
    def model(self) -> RegressionModel:
        """The regression's, as far as the passes before have found it."""
        found = _load(self.work / "sensors.npz")
        degradation = self.candidates[list(BOUNDARIES)[int(found["boundary"])]]
        model = RegressionModel.from_moments(
            found["moments"].to(self.device),
            degradation,
            found["srf"].to(self.device),
            **self.plan["options"],
        )
        sums = _found(self.work / "sharpness.npz")
        return model.with_sharpness(sums["sums"].to(self.device)) if sums else model

    # -- the result ----------------------------------------------------------------------------

    @functools.cached_property
    def network(self) -> LSO | CoFusion | None:
        if self.plan["weights"] is None:
            return None
        return _load_network(self.plan["method"], self.plan["weights"][0], self.device)

    @property
    def prior_kind(self) -> str:
        return self.plan["method"] if self.network is None else self.network.prior

    def prior(self, rows: Stretch, columns: Stretch) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, G, h, w)``, ``(B, g, H, W)`` and ``(B, G, H, W)`` of a part of the scene."""
        if self.prior_kind == "regression":
            boundary, halo = self.model.degradation.boundary, self.model.halo
        else:
            boundary, halo = "replicate", 3  # of cubic interpolation
        grown = self._grown(rows, columns, halo, boundary)
        low, high = self._pair(*grown)
        if self.prior_kind == "regression":
            prior = self.model.apply(low, high)
            if self.plan["method"] != "regression":
                prior = prior.clamp_(0, 1)
        else:
            prior = F.interpolate(low[None], high.shape[-2:], mode="bicubic")[0]
        inner = tuple(stretch.inner for stretch in grown)
        fine = tuple(stretch.times(self.scale).inner for stretch in grown)
        high, prior = (image[:, fine[0], fine[1]][None] for image in (high, prior))
        return low[:, inner[0], inner[1]][None], high, prior

    def fuse(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """Compute and write one tile."""
        if self.network is None:
            fused = self.prior(rows, columns)[2][0]
        elif self.prior_kind == "regression":
            fused = self._refined(rows, columns)
        else:
            fused = self._networked(rows, columns)
        fused = fused.clamp(0, 1)
        if self.peak != 1:
            fused = fused * self.peak
        place = [stretch.times(self.scale) for stretch in (rows, columns)]
        zarr = need("zarr", extra="large", purpose="writing zarr stores")
        array = zarr.open_array(self.work / "result.zarr", mode="r+")
        array[:, place[0].first : place[0].end, place[1].first : place[1].end] = fused.cpu().numpy()
        return {}

    def _networked(self, rows: Stretch, columns: Stretch) -> Tensor:
        """What the network makes of one stretch of the scene: ``(G, H, W)``."""
        assert self.network is not None
        wide = self._grown(rows, columns, self.margin)
        low, high, prior = self.prior(*(Stretch.of(s.first, s.end) for s in wide))
        with self._told(*wide):
            fused = self.network(low, high, prior)[0]
        fine = [stretch.times(self.scale).inner for stretch in wide]
        return fused[:, fine[0], fine[1]]

    def _refined(self, rows: Stretch, columns: Stretch) -> Tensor:
        """The same, brought back to what both sensors saw; beyond the edge of a scene that repeats
        is what the network makes of its other end."""
        model = self.model
        step = self.network_step
        grown = self._grown(rows, columns, model.refine_halo, model.degradation.boundary)
        lines = []
        for r in grown[0].pieces:
            parts = []
            for c in grown[1].pieces:
                # The network's patches begin where those of the whole scene do.
                begin = [first // step * step for first in (r[0], c[0])]
                part = self._networked(Stretch.of(begin[0], r[1]), Stretch.of(begin[1], c[1]))
                skip = [
                    (first - at) * self.scale for first, at in zip((r[0], c[0]), begin, strict=True)
                ]
                parts.append(part[:, skip[0] :, skip[1] :])
            lines.append(torch.cat(parts, dim=2))
        fused = torch.cat(lines, dim=1).contiguous()
        fused = model.refine(fused, *self._pair(*grown))
        fine = [stretch.times(self.scale).inner for stretch in grown]
        return fused[:, fine[0], fine[1]]

    @property
    def network_step(self) -> int:
        """HSI pixels of which a network's tiles have to begin at a multiple."""
        return math.lcm(support(self.network)[1], self.scale) // self.scale

    @contextlib.contextmanager
    def _told(self, rows: Stretch, columns: Stretch) -> Iterator[None]:
        """The network knows of the scene what it cannot see in a tile."""
        assert self.network is not None
        with contextlib.ExitStack() as stack:
            if isinstance(self.network, LSO):
                grid = self._coordinates(rows, columns)
                hook = self.network.coordinates.register_forward_hook(
                    lambda module, inputs, output: grid.to(output.dtype)
                )
                stack.callback(hook.remove)
            for name, module in self.network.named_modules():
                if isinstance(module, SceneMaxima) and name in self.known:
                    maximum = self.known[name].to(self.device)
                    hook = module.register_forward_hook(
                        lambda module, inputs, output, maximum=maximum: maximum
                    )
                    stack.callback(hook.remove)
            yield

    def _coordinates(self, rows: Stretch, columns: Stretch) -> Tensor:
        """Those of the whole scene, padded to multiples of 4 as the network does."""
        lines = []
        for stretch, size in ((rows, self.rows), (columns, self.columns)):
            total = -(-size * self.scale // 4) * 4
            first = stretch.first * self.scale
            count = -(-stretch.length * self.scale // 4) * 4
            at = torch.arange(first, first + count, dtype=torch.float32, device=self.device)
            lines.append(at / (total - 1))
        shape = len(lines[0]), len(lines[1])
        return torch.stack([lines[0][:, None].expand(shape), lines[1].expand(shape)])[None]

    # -- CoFusion's maxima ---------------------------------------------------------------------

    @functools.cached_property
    def known(self) -> dict[str, Tensor]:
        """The maxima that passes before have found, by the names of their modules."""
        known: dict[str, Tensor] = {}
        for path in sorted(self.work.glob("maxima*.npz")):
            known |= _load(path)
        return known

    def maxima(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """Over the tile, those maxima whose inputs depend on none that is not known yet."""
        network = self.network
        assert isinstance(network, CoFusion)
        wide = self._grown(rows, columns, self.margin)
        _, high, prior = self.prior(*(Stretch.of(s.first, s.end) for s in wide))
        images = network.seen(prior, high)
        found: dict[str, Tensor] = {}

        def record(name: str, level: int, *images: Tensor) -> None:
            keys = []
            for stretch, size in zip(wide, (self.rows, self.columns), strict=True):
                inner, stride = stretch.times(self.scale).inner, 2**level
                last = stretch.end == size and inner.stop == stretch.length * self.scale
                keys.append(slice(inner.start // stride, None if last else inner.stop // stride))
            maxima = [x[:, :, keys[0], keys[1]].amax((2, 3)) for x in images]
            found[name] = torch.cat(maxima, dim=1).cpu()

        with self._told(*wide):
            local, proxies = network.generator(torch.cat(images, dim=1))
            for level, scale in enumerate(cast(Any, network.scales)):
                name, x = f"scales.{level}", proxies[level]
                chained = network.spectral == "specam"
                blocks: Any = scale.spectral if chained else [scale.spectral]
                for number, block in enumerate(blocks):
                    place = f"{name}.spectral.{number}"
                    if isinstance(block, SpeCAM) and f"{place}.maxima" not in self.known:
                        low, high_part = haar_split2d(x)
                        record(f"{place}.maxima", level, block.low(low), block.high(high_part))
                        break
                    x = block(x)
                else:
                    if scale.cross is not None and f"{name}.cross.maxima.0" not in self.known:
                        record(f"{name}.cross.maxima.0", level, scale.spatial(local[level]))
                        record(f"{name}.cross.maxima.1", level, x)
        return found


def _found(path: Path) -> dict[str, Tensor] | None:
    return _load(path) if path.exists() else None


def _reach(degradation: Degradation) -> int:
    """How many HSI pixels around one its PSF sees."""
    away = max(map(abs, degradation.centre))
    return math.ceil((max(degradation.psf.shape) + away) / degradation.scale) + 1


# ------------------------------------------------------------------------------------------------
# The passes, one after the other
# ------------------------------------------------------------------------------------------------


class _Passes:
    """Runs what is missing of each pass, puts the tiles' statistics together, ends the result."""

    def __init__(self, work: Path, plan: dict[str, Any], run: Runner, progress: bool) -> None:
        self.work, self.plan, self.runner, self.progress = work, plan, run, progress
        self.digest = hashlib.sha256((work / "plan.json").read_bytes()).hexdigest()
        self.job = _Job(work)
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
            peak=_Job(self.work).peak,
            tile=self.plan["tile"],
            margin=self._margin(),
            tiles=self.count,
            found=self.found,
            seconds=self.seconds,
        )

    def _margin(self) -> int:
        job = _Job(self.work)
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
        return (_load(path) for path in paths)

    def _statistics(self) -> None:
        plan, work = self.plan, self.work
        if not (work / "scan.npz").exists():
            self._scan(self._tiles("scan", "values"))
        job = _Job(work)
        if job.prior_kind == "regression":
            if plan["psf"] is None and not (work / "psf.npz").exists():
                psf = _middle_psf(job)
                _save(work / "psf.npz", psf=psf.psf, offset=psf.offset)
            if not (work / "sensors.npz").exists():
                self._sensors(self._tiles("moments", "sensors"))
            if plan["options"].get("local", True) and not (work / "sharpness.npz").exists():
                sums = sum(tile["sums"] for tile in self._tiles("sharpness", "sharpness"))
                _save(work / "sharpness.npz", sums=sums)
        if isinstance(job.network, CoFusion):
            for number in range(_rounds(job.network)):
                path = work / f"maxima{number:02}.npz"
                if path.exists():
                    continue
                maxima: dict[str, Tensor] = {}
                for tile in self._tiles(path.stem, f"maxima {number + 1}"):
                    for name, value in tile.items():
                        maxima[name] = torch.maximum(maxima.get(name, value), value)
                _save(path, **maxima)

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
        _save(self.work / "scan.npz", peak=float(peak))

    def _sensors(self, tiles: Iterator[dict[str, Tensor]]) -> None:
        job, bands = _Job(self.work), self.plan["msi_bands"]
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
        _save(self.work / "sensors.npz", moments=moments, srf=srf, boundary=boundary)

    def _create(self) -> None:
        """The empty store that tiles are written to; what a killed run left half written goes."""
        store = self.work / "result.zarr"
        if (store / "zarr.json").exists():
            for left in store.rglob("*.partial"):
                left.unlink()
            return
        shutil.rmtree(store, ignore_errors=True)
        job = _Job(self.work)
        metadata: dict[str, Any] = {
            key: job.msi.metadata[key] for key in ("crs", "transform") if key in job.msi.metadata
        }
        zarr_store.create(
            store, tuple(self.plan["shape"]), self.plan["chunk"], job.hsi.wavelengths, metadata
        )

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


def _middle_psf(job: _Job) -> Degradation:
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
