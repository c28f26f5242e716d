"""Faults in long work: nothing that was finished is lost, and resuming gives the same result.

tests/test_training.py and tests/test_tiling.py hold kills at chosen moments, two runs at once and a
worker of a cluster that dies; here the moments are random, and disks, clocks and files fail.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastfusion.tiling import Unfinished, fuse_files
from fastfusion.training import train
from tests.reliability import killing
from tests.reliability.effort import TORTURE, counted, effort

pytest.importorskip("safetensors")
pytest.importorskip("torchmetrics")
pytest.importorskip("zarr")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(3600)
def test_random_kills(tmp_path: Path) -> None:
    kills = effort(2, 100)
    command = [sys.executable, "-m", "tests.reliability.killing", str(kills), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, report in json.loads(done.stdout).items():
        assert report["kills"] >= kills
        counted("faults", f"random kills in {kind}", report["kills"])
        counted("faults", f"runs of {kind} that came to the same end", report["runs"])


DIES = """
import json, os, signal, sys
from pathlib import Path
from fastfusion import cli, training
victim, out = int(sys.argv[1]), Path(sys.argv[sys.argv.index("--out") + 1])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    # torchrun ends the others when it sees that one is gone: they are to say first what they saw.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    step = training.Training._step
    def dying(self, number):
        if self.rank == victim and number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)
    training.Training._step = dying
else:
    from tests.reliability.killing import finished
    sys.stderr.write(f"KEPT {finished(out)}\\n")  # in one piece: both write at once
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(not TORTURE, reason="ten processes, a minute: in make torture")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_of_torchrun_that_dies(tmp_path: Path, victim: int) -> None:
    """The other says so, what was done is kept, and started again they come to the same end."""
    killing.make_inputs(tmp_path)
    recipe = dataclasses.asdict(killing.recipe(tmp_path, epochs=4))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "dies.py").write_text(DIES)

    def run(victim: int, out: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command += ["--max-restarts", "1", str(tmp_path / "dies.py"), str(victim)]
        command += ["train", "--resume", "--config", "recipe.json", "--out", out]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            # Else torch's processes look for one another where those before them were.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    said = run(victim, "out")
    assert "fastfusion train: another process of this training ended" in said
    assert said.count("KEPT 2") == 2
    run(-1, "whole")
    assert killing.content(tmp_path / "out") == killing.content(tmp_path / "whole")
    counted("faults", "processes of torchrun that died")


# ------------------------------------------------------------------------------------------------
# In this process, one thread, so that results are the same to the bit
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    killing.make_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tiles(inputs: Path, out: Path) -> None:
    fuse_files(inputs / "hsi.npy", inputs / "msi.npy", out, tile=16, workers=1)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_file_that_may_not_grow(inputs: Path, tmp_path: Path) -> None:
    """The state cannot be written: the one before stays, and the training goes on from it."""
    recipe = killing.recipe(inputs, epochs=4)
    train(recipe, tmp_path / "whole")
    size = (tmp_path / "whole" / "last.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    from fastfusion import training

    written = []
    write = training.write_checkpoint

    def fill(path, metadata, tensors):
        written.append(path)
        if len(written) == 4:  # some way in
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        write(path, metadata, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_checkpoint", fill)
        try:
            with pytest.raises(OSError):
                train(recipe, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = killing.finished(tmp_path / "out")
    assert kept >= 1
    assert not list((tmp_path / "out").glob(".fastfusion-*"))
    train(recipe, tmp_path / "out", resume=True)
    assert killing.content(tmp_path / "out") == killing.content(tmp_path / "whole")
    counted("faults", "full disks survived")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full(inputs: Path, tmp_path: Path, small_disk: Path) -> None:
    """Tiles on a real disk that fills; then there is room again, and they go on."""
    _tiles(inputs, tmp_path / "whole.zarr")
    with pytest.raises((Unfinished, OSError)) as caught:
        _tiles(inputs, small_disk / "out.zarr")
    assert "space" in str(caught.value)
    assert not (small_disk / "out.zarr").exists()
    kept = len(list(small_disk.glob("out.zarr.work/fuse/*.npz")))
    grown = ["mount", "-o", "remount,size=30m", str(small_disk)]
    subprocess.run(grown, check=True)
    report = fuse_files(
        inputs / "hsi.npy", inputs / "msi.npy", small_disk / "out.zarr", tile=16, workers=1
    )
    assert report.found >= kept
    assert _contents(small_disk / "out.zarr") == _contents(tmp_path / "whole.zarr")
    counted("faults", "full disks survived")


def test_a_folder_that_cannot_be_written(inputs: Path, small_disk: Path) -> None:
    """Root writes everywhere, but not on a disk that is read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError) as caught:
        _tiles(inputs, small_disk / "out.zarr")
    assert str(small_disk) in str(caught.value)
    with pytest.raises(OSError) as caught:
        train(killing.recipe(inputs, epochs=1), small_disk / "trained")
    assert str(small_disk) in str(caught.value)
    counted("faults", "read-only folders refused", 2)


def test_clocks_that_jump(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock goes back a day and on a year; neither result nor time limits know."""
    recipe = killing.recipe(inputs, epochs=3)
    train(recipe, tmp_path / "whole")
    _tiles(inputs, tmp_path / "whole.zarr")
    order, real = random.Random(0), time.time
    jumps = 0

    def jumping() -> float:
        nonlocal jumps
        jumps += 1
        return real() + order.choice([-86400.0, 0.0, 3.2e7])

    monkeypatch.setattr(time, "time", jumping)
    train(recipe, tmp_path / "out", minutes=60)
    _tiles(inputs, tmp_path / "out.zarr")
    monkeypatch.undo()
    assert killing.content(tmp_path / "out") == killing.content(tmp_path / "whole")
    assert _contents(tmp_path / "out.zarr") == _contents(tmp_path / "whole.zarr")
    counted("faults", "runs on a clock that jumps", 2)


def test_a_damaged_checkpoint_is_told(inputs: Path, tmp_path: Path) -> None:
    recipe = killing.recipe(inputs, epochs=2)
    train(recipe, tmp_path / "out")
    state = tmp_path / "out" / "last.safetensors"
    whole = state.read_bytes()
    order = random.Random(0)
    for _ in range(effort(15, 300)):
        damaged = bytearray(whole)
        damaged[order.randrange(len(whole))] ^= 1 << order.randrange(8)
        if order.random() < 0.2:
            del damaged[order.randrange(len(whole)) :]
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.safetensors"):
            train(recipe, tmp_path / "out", resume=True)
        counted("faults", "damaged checkpoints refused")
    state.write_bytes(whole)
    train(recipe, tmp_path / "out", resume=True)


def test_an_end_while_the_finished_work_is_removed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks that are left do not count as tiles of a result that is made anew."""
    _tiles(inputs, tmp_path / "whole.zarr")
    remove = shutil.rmtree

    def stop_in_the_middle(path, *arguments, **options):
        if not Path(path).name.startswith("out.zarr.work"):
            return remove(path, *arguments, **options)
        remove(Path(path, "result.zarr"), ignore_errors=True)
        for mark in sorted(Path(path).rglob("*.npz"))[::2]:
            mark.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop_in_the_middle)
        with pytest.raises(Unfinished):
            _tiles(inputs, tmp_path / "out.zarr")
    _tiles(inputs, tmp_path / "out.zarr")
    assert _contents(tmp_path / "out.zarr") == _contents(tmp_path / "whole.zarr")
    assert not list(tmp_path.glob("out.zarr.work*"))


def test_damaged_marks_of_tiles_are_found_out(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unfinished work whose files were damaged since: done again or refused, never believed."""
    from fastfusion.tiling import passes

    _tiles(inputs, tmp_path / "whole.zarr")
    expected = _contents(tmp_path / "whole.zarr")

    def stop(self, out):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_finish", stop)
        with pytest.raises(Unfinished):
            _tiles(inputs, tmp_path / "out.zarr")
    work = tmp_path / "out.zarr.work"
    shutil.copytree(work, tmp_path / "kept")
    marks = [path.relative_to(work) for path in sorted(work.rglob("*.npz"))]
    marks += [path.relative_to(work) for path in sorted(work.rglob("*.json"))]
    order = random.Random(0)
    for _ in range(effort(8, 200)):
        victim = work / order.choice(marks)
        data = bytearray(victim.read_bytes())
        if order.random() < 0.4:
            del data[order.randrange(len(data)) :]
        else:
            data[order.randrange(len(data))] ^= 1 << order.randrange(8)
        victim.write_bytes(data)
        try:
            _tiles(inputs, tmp_path / "out.zarr")
        except (ValueError, OSError, Unfinished) as error:
            assert str(error)
            counted("faults", "damaged tiles refused")
        else:
            assert _contents(tmp_path / "out.zarr") == expected, victim
            counted("faults", "damaged tiles done again")
            shutil.rmtree(tmp_path / "out.zarr")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", work)
