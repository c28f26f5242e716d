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
import errno
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfusion.data.files import check_output
from fastfusion.data.sensors import Degradation
from fastfusion.fusing import Unavailable
from fastfusion.ops import checks
from fastfusion.ops.operator import CHOICES
from fastfusion.scheduling import executor
from fastfusion.tiling.folder import remove, removed, work_folder
from fastfusion.tiling.job import job_of
from fastfusion.tiling.passes import Passes, Report
from fastfusion.tiling.plan import BASE_MEMORY, check_arguments, make_plan, source_of, tile_bytes

__all__ = ["Report", "Unfinished", "fuse_files", "source_of"]


class Unfinished(RuntimeError):
    """The work stopped on the way; the message says why, and how to go on."""


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
    check_arguments(method, options, weights, tile, margin, workers, memory)
    if scheduler is not None:
        checks.of_type("scheduler", scheduler, str, "a scheduler's address or None")
    checks.choice("backend", backend, CHOICES)
    checks.placed(device, None)
    checks.flag("progress", progress)
    out = Path(out)
    if out.suffix.lower() not in (".zarr", ".tif", ".tiff"):
        raise ValueError(f"{out}: tiles go to .zarr or .tif")
    check_output(out)
    plan = make_plan(hsi, msi, out, method, options, srf, psf, peak, tile, margin, weights)
    plan |= {"backend": backend, "device": str(device)}
    per_tile = tile_bytes(plan)
    threads = torch.get_num_threads()
    if workers is None:
        room = memory * 2**30 - BASE_MEMORY
        workers = max(1, min(threads, int(room // per_tile)))
    work = Path(os.path.realpath(f"{os.fspath(out).rstrip('/')}.work"))
    with work_folder(work, plan), contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(executor(scheduler, workers))
            report = Passes(work, plan, run, progress).run(out)
            remove(work)
            return report
        except KeyboardInterrupt as error:
            raise Unfinished(f"interrupted; {_go_on(work, out)}") from error
        except OSError as error:
            message = error.strerror or str(error)
            if error.errno == errno.ENOSPC:
                message += "; free some space"
            raise Unfinished(f"{message}; {_go_on(work, out)}") from error
        except (ValueError, TypeError, Unavailable, ImportError):
            if not any((work / "fuse").glob("*.npz")):
                remove(work)  # it holds nothing worth going on with
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unfinished(f"{reason}; {_go_on(work, out)}") from error
        finally:
            torch.set_num_threads(threads)
            job_of.cache_clear()


def _go_on(work: Path, out: Path) -> str:
    if not work.exists():  # it was being removed
        return f"{out} is done, and {removed(work)} is left to remove"
    return f"what is done stays in {work}: run the same again to go on"
