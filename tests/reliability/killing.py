"""Kill long work at random moments until it is done: ``python -m tests.reliability.killing``.

``KILLS SEED FOLDER`` runs a training, and then a fusion in tiles, once undisturbed, and then in
children that get SIGKILL after a random time, each going on where the last one was, until one comes
to the end: its result must be, bit by bit, the undisturbed one. That again in a new folder, until
there were so many kills of each. The children are forked from one process that has the libraries
already, with one thread, so that a kill costs no start of Python. Prints what it did as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.reliability.effort import effort

TINY = {"width": 8, "heads": 2, "tokens": 2, "basis": 3, "guide_width": 8, "guide_blocks": 1}


def make_inputs(folder: Path) -> None:
    """A smooth scene of 6 bands, and the pair that two sensors make of it."""
    from fastfusion.data import Cube, Degradation, wald, write_cube

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 6, 12, 12, generator=generator)
    scene = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1)[0]
    np.save(folder / "cube.npy", scene[:, :24, :32].numpy())
    srf = torch.eye(6)[::2] / 1.0
    lr_hsi, hr_msi = wald(scene, Degradation.gaussian(4), srf)
    write_cube(folder / "hsi.npy", Cube(lr_hsi.numpy()))
    write_cube(folder / "msi.npy", Cube(hr_msi.numpy()))


def recipe(folder: Path, epochs: int | None = None):
    """A training that takes a second or two, or less in the short profile."""
    from fastfusion.training import Recipe

    epochs = effort(6, 20) if epochs is None else epochs

    return Recipe(
        options=TINY,
        scenes=(str(folder / "cube.npy"),),
        validation=(f"{folder / 'cube.npy'}@0:16,8:24",),
        epochs=epochs,
        steps=2,
        patch=8,
        batch=2,
        learning_rate=1e-3,
        flips=True,
    )


def train(folder: Path, out: Path) -> None:
    """Go on with the training, or start it."""
    from fastfusion.training import train as run

    run(recipe(folder), out, resume=True)


def tiles(folder: Path, out: Path) -> None:
    """Go on with the tiles, or start them."""
    from fastfusion.tiling import fuse_files

    out.mkdir(exist_ok=True)
    fuse_files(folder / "hsi.npy", folder / "msi.npy", out / "fused.zarr", tile=16, workers=1)


def content(out: Path) -> dict[str, str]:
    """What the result is: weights and state, or every file of the store."""
    from fastfusion.models.base import read_checkpoint

    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".safetensors":
            for name, value in read_checkpoint(path)[1].items():
                data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[f"{path.name}/{name}"] = hashlib.sha256(data).hexdigest()
        elif "fused.zarr" in path.parts and path.is_file():
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def finished(out: Path) -> int:
    """How much of the work is kept: epochs, or tiles."""
    from fastfusion.models.base import read_checkpoint

    state = out / "last.safetensors"
    if state.exists():
        return json.loads(read_checkpoint(state)[0]["progress"])["epoch"]
    return len(list(out.glob("fused.zarr.work/fuse/*.npz")))


def in_child(work: Callable[[], None], seconds: float | None = None) -> int | None:
    """Run in a fork; None when it was killed after so many seconds, else its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        assert end is not None
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGKILL else code
        time.sleep(0.002)


def campaign(kind: str, kills: int, order: random.Random, folder: Path) -> dict[str, int]:
    """Kill one kind of work so many times, as the head of this module says."""
    work = {"train": train, "tiles": tiles}[kind]
    whole = folder / f"{kind}-whole"
    start = time.monotonic()
    assert in_child(lambda: work(folder, whole)) == 0, "the undisturbed run failed"
    length = time.monotonic() - start
    expected = content(whole)
    assert expected
    done = {"kills": 0, "runs": 0, "resumed": 0}
    while done["kills"] < kills:
        out = folder / f"{kind}-{done['runs']}"
        kept = 0
        while True:
            # Each goes a good part of the way, so that kills fall everywhere and runs come to ends.
            limit = order.uniform(0, 0.7 * length) if done["kills"] < kills else None
            status = in_child(lambda out=out: work(folder, out), limit)
            if status == 0:
                break
            assert status is None, f"failed on the way, after {done['kills']} kills"
            done["kills"] += 1
            now = finished(out) if out.exists() else 0
            assert now >= kept or (out / "fused.zarr").exists(), f"{kept} were kept, now {now}"
            done["resumed"] += now > 0
            kept = now
        assert content(out) == expected, f"another result after {done['kills']} kills"
        done["runs"] += 1
        shutil.rmtree(out)
    return done


def main() -> int:
    """See the head of this module."""
    kills, seed, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    make_inputs(folder)
    for library in ("safetensors.torch", "torchmetrics.functional.image", "zarr", "scipy.optimize"):
        __import__(library)
    import fastfusion.tiling
    import fastfusion.training  # noqa: F401

    order = random.Random(seed)
    print(json.dumps({kind: campaign(kind, kills, order, folder) for kind in ("train", "tiles")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
