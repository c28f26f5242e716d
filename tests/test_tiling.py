"""Scenes from disk to disk: tiles agree with the whole, and no stop on the way does harm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfusion import fuse, tiling
from fastfusion.cli import main
from fastfusion.data import (
    Cube,
    Degradation,
    demo_scene,
    open_cube,
    read_cube,
    wald,
    write_cube,
)
from fastfusion.data.windows import Stretch, Windows
from fastfusion.fusing import Unavailable
from fastfusion.models import LSO, CoFusion
from fastfusion.models.base import ResidualModel
from fastfusion.nn.cofusion import SceneMaxima
from fastfusion.scheduling import executor
from fastfusion.tiling import Unfinished, fuse_files, job, passes, plan

dask = pytest.importorskip("dask", reason="dask is not installed (extra large)")
pytest.importorskip("zarr", reason="zarr is not installed (extra large)")

SCALE, ROWS, COLUMNS, BANDS = 4, 152, 184, 8


def pair(boundary: str = "circular") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A part of the demo scene as two sensors see it, and the response of the second."""
    scene = torch.from_numpy(demo_scene().data[::4, 40 : 40 + ROWS, 60 : 60 + COLUMNS].copy())
    srf = torch.rand(3, BANDS, generator=torch.Generator().manual_seed(3))
    srf /= srf.sum(1, keepdim=True)
    return *wald(scene, Degradation.gaussian(SCALE, boundary=boundary), srf), srf


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    store(*pair()[:2])
    return tmp_path


def store(lr_hsi: torch.Tensor, hr_msi: torch.Tensor, suffix: str = "zarr") -> None:
    write_cube(f"hsi.{suffix}", Cube(lr_hsi.numpy(), np.linspace(400, 700, BANDS)))
    write_cube(f"msi.{suffix}", Cube(hr_msi.numpy()))


def result(name: str = "out.zarr") -> torch.Tensor:
    return torch.from_numpy(read_cube(name).data)


def content(folder: str | Path) -> dict[str, bytes]:
    top = Path(folder)
    return {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}


PLAIN = ("hsi.zarr", "msi.zarr", "out.zarr")


# ------------------------------------------------------------------------------------------------
# No seams
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["circular", "symmetric"])
@pytest.mark.parametrize("known", [False, True])
def test_the_regression_in_tiles_is_that_of_the_whole(files, boundary, known):
    lr_hsi, hr_msi, srf = pair(boundary)
    store(lr_hsi, hr_msi)
    sensors = {}
    if known:
        sensors = {"srf": srf, "psf": Degradation.gaussian(SCALE, boundary=boundary)}
    report = fuse_files(*PLAIN, tile=64, **sensors)
    assert (report.tiles, report.found, report.tile) == (3 * 3, 0, 64)
    whole = fuse(lr_hsi, hr_msi, **sensors)
    torch.testing.assert_close(result(), whole, atol=1e-5, rtol=0)
    np.testing.assert_allclose(read_cube("out.zarr").wavelengths, np.linspace(400, 700, BANDS))
    assert not Path("out.zarr.work").exists()


def test_without_local_maps_and_by_bicubic_interpolation(files):
    lr_hsi, hr_msi, _ = pair()
    for method, options in (("regression", {"local": False}), ("bicubic", {})):
        fuse_files(*PLAIN, method, tile=64, **options)
        whole = fuse(lr_hsi, hr_msi, method, **options)
        torch.testing.assert_close(result(), whole, atol=1e-5, rtol=0)


SMALL = {
    "lso": lambda prior: LSO(
        *(BANDS, 3, SCALE), width=8, heads=2, tokens=2, basis=2, guide_width=8, prior=prior
    ),
    "cofusion": lambda prior: CoFusion(BANDS, 3, SCALE, width=4, depths=(1, 1, 2), prior=prior),
}


def network(kind: str, prior: str) -> ResidualModel:
    torch.manual_seed(1)
    model = SMALL[kind](prior)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.save("weights.safetensors")
    return model


@pytest.mark.parametrize(("kind", "prior"), [("lso", "regression"), ("lso", "bicubic")])
def test_lso_in_tiles_is_that_of_the_whole(files, kind, prior):
    network(kind, prior)
    fuse_files(*PLAIN, kind, tile=64, weights="weights.safetensors")
    whole = fuse(*pair()[:2], kind, weights="weights.safetensors")
    torch.testing.assert_close(result(), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spectral", ["specam", "residual"])
def test_cofusion_in_tiles_is_that_of_the_whole(files, spectral, monkeypatch):
    monkeypatch.setitem(
        SMALL,
        "cofusion",
        lambda prior: CoFusion(
            *(BANDS, 3, SCALE), width=4, depths=(1, 1, 2), prior=prior, spectral=spectral
        ),
    )
    network("cofusion", "bicubic")
    report = fuse_files(*PLAIN, "cofusion", tile=64, weights="weights.safetensors")
    passes = [name for name in report.seconds if name.startswith("maxima")]
    assert len(passes) == (3 if spectral == "specam" else 1)
    whole = fuse(*pair()[:2], "cofusion", weights="weights.safetensors")
    torch.testing.assert_close(result(), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lso", "cofusion"])
def test_the_support_of_a_network_is_its_receptive_field(kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = network(kind, "bicubic").double()
    reach, unit = plan.support(model)
    side = 2 * -(-reach // unit) * unit + 2 * unit
    prior = torch.rand(1, BANDS, unit, side, dtype=torch.float64)
    msi = torch.rand(1, 3, unit, side, dtype=torch.float64)
    middle = side // 2
    prior.requires_grad_()
    # Maxima over the image are told to tiles: leave them out.
    maxima = [module for module in model.modules() if isinstance(module, SceneMaxima)]
    for module in maxima:
        module.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    output = model.eval().correction(prior, msi)
    output[..., middle : middle + unit].square().sum().backward()
    assert prior.grad is not None
    seen = prior.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert middle - reach <= seen.min() and seen.max() < middle + unit + reach
    if kind == "lso":
        assert seen.min() < middle - reach // 2  # no needless margin


def test_a_narrower_margin_is_taken_and_shows(files):
    network("lso", "bicubic")
    whole = fuse(*pair()[:2], "lso", weights="weights.safetensors")
    errors = []
    for margin in (0, 16, 64):
        report = fuse_files(*PLAIN, "lso", tile=64, margin=margin, weights="weights.safetensors")
        errors.append((result() - whole).abs().max().item())
        assert report.margin == margin + 3 * SCALE
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_geotiff_and_counts(files):
    lr_hsi, hr_msi, _ = pair()
    counts = [(1000 * image).round().to(torch.uint16) for image in (lr_hsi, hr_msi)]
    store(*counts, suffix="tif")
    report = fuse_files("hsi.tif", "msi.tif", "out.tif", tile=64)
    largest = max(int(image.int().max()) for image in counts)
    peak = 1.25 * largest if largest > 1 else 1
    assert report.peak == peak
    whole = peak * fuse(*(image.float() / peak for image in counts))
    torch.testing.assert_close(result("out.tif"), whole, atol=1e-5 * peak, rtol=0)
    np.testing.assert_allclose(read_cube("out.tif").wavelengths, np.linspace(400, 700, BANDS))
    assert not list(files.glob("*.work"))


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("margin", [0, 1, 3, 20])
def test_a_margin_goes_on_at_the_other_end_or_stops(tmp_path, circular, margin):
    values = np.random.default_rng(0).random((2, 12, 9), dtype=np.float32)
    write_cube(tmp_path / "x.npy", Cube(values))
    windows = Windows(str(tmp_path / "x.npy"))
    mode = "wrap" if circular else "edge"
    for first, end in ((0, 4), (4, 8), (8, 12), (0, 12)):
        rows = Stretch.of(first, end).grown(margin, 12, circular=circular)
        window = windows.read(rows, Stretch.of(2, 5)).numpy()
        assert window.shape[1] == rows.length
        np.testing.assert_array_equal(window[:, rows.inner], values[:, first:end, 2:5])
        if rows.length < 12 and circular:
            wide = np.pad(values, ((0, 0), (margin, margin), (0, 0)), mode)
            np.testing.assert_array_equal(window, wide[:, first : end + 2 * margin, 2:5])


# ------------------------------------------------------------------------------------------------
# Killed and resumed
# ------------------------------------------------------------------------------------------------

KILLED = """
import os, pathlib, signal, sys, time
from fastfusion import cli
from fastfusion.tiling import job
work = job.Job.fuse
count = left = int(sys.argv[1])
before = len(list(pathlib.Path("out.zarr.work/fuse").glob("*.npz")))
def fuse(self, rows, columns):
    global left
    result = work(self, rows, columns)
    left -= 1
    if left == 0:  # its chunks are there, its mark is not
        # The tiles before it may lie with other threads: they get the time to leave their marks.
        while len(list((self.work / "fuse").glob("*.npz"))) < before + count - 1:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return result
job.Job.fuse = fuse
sys.exit(cli.main(sys.argv[2:]))
"""
TILED = ["fuse", "--hsi", "hsi.zarr", "--msi", "msi.zarr", "--tile", "64", "--no-progress"]


def test_killed_twice_and_resumed_gives_the_same_bytes(files, capsys):
    assert main([*TILED, "--out", "whole.zarr"]) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(tiling.__file__).parents[2])}
    command = [*TILED, "--out", "out.zarr"]
    for tiles in (2, 3):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tiles), *command], env=environment, check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert not Path("out.zarr").exists() and not list(files.glob(".*"))
    # A chunk that was being written leaves this, and the last tile's chunks are doubled.
    chunk = next(path for path in Path("out.zarr.work/result.zarr/c").rglob("*") if path.is_file())
    stray = chunk.with_name(f"{chunk.name}.0123.partial")
    stray.write_bytes(b"half")
    marks = len(list(Path("out.zarr.work/fuse").glob("*.npz")))
    assert 3 <= marks <= 5
    assert main(command) == 0
    assert f"9 tiles of 64 pixels, {marks} of them found" in capsys.readouterr().out
    assert content("out.zarr") == content("whole.zarr")
    assert not Path("out.zarr.work").exists()


@pytest.mark.parametrize("stage", ["moments", "sharpness", "fuse"])
def test_a_disk_that_fills(files, capsys, monkeypatch, stage):
    fuse_files(*PLAIN[:2], "whole.zarr", tile=64)
    work, calls = getattr(job.Job, stage), []

    def fail(self, rows, columns):
        calls.append(rows)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return work(self, rows, columns)

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, stage, fail)
        assert main([*TILED, "--out", "out.zarr"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device; free some space; what is done stays in" in said
    assert "out.zarr.work: run the same again to go on" in said and said.count("\n") == 1
    assert not Path("out.zarr").exists() and not Path("out.zarr.json").exists()
    report = fuse_files(*PLAIN, tile=64, workers=2)
    assert stage != "fuse" or 2 <= report.found <= 4
    assert content("out.zarr") == content("whole.zarr")


def test_the_end_came_between_the_result_and_the_folder(files, monkeypatch):
    def stop(work):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(tiling, "remove", stop)
        with pytest.raises(Unfinished):
            fuse_files(*PLAIN, tile=64)
    before = content("out.zarr")
    assert fuse_files(*PLAIN, tile=64).tiles == 9
    assert content("out.zarr") == before and not Path("out.zarr.work").exists()


def test_an_interrupt_says_how_to_go_on(files, monkeypatch, capsys):
    def stop(self, out):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_finish", stop)
        assert main([*TILED, "--out", "out.zarr"]) == 1
    assert "interrupted; what is done stays in" in capsys.readouterr().err
    assert fuse_files(*PLAIN, tile=64).found == 9


def test_an_interrupt_after_the_result_is_in_place_says_so(files, monkeypatch):
    fuse_files(*PLAIN, tile=64)
    whole = content("out.zarr")

    rmtree = shutil.rmtree

    def stop(path, **options):
        if path.name == "out.zarr.work.removed":
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(Unfinished, match=r"out.zarr is done, and \S*removed is left to remove"):
            fuse_files(*PLAIN, tile=64)
    assert content("out.zarr") == whole
    assert fuse_files(*PLAIN, tile=64).tiles == 9
    assert not list(Path().glob("out.zarr.work*"))


# ------------------------------------------------------------------------------------------------
# On a cluster
# ------------------------------------------------------------------------------------------------


def test_on_a_cluster_with_a_worker_that_dies(files, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    fuse_files(*PLAIN[:2], "whole.zarr", tile=64)
    dashboard = {"dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **dashboard) as cluster:
        victim, seen = next(iter(cluster.workers.values())).pid, []

        def bar(shown, title, total, done):
            import contextlib

            def advance():
                seen.append(title)
                if seen.count("fuse") == 2 and title == "fuse":
                    os.kill(victim, signal.SIGKILL)

            return contextlib.nullcontext(advance)

        monkeypatch.setattr(passes, "_bar", bar)
        report = fuse_files(*PLAIN, tile=64, scheduler=cluster.scheduler_address)
    assert report.tiles == seen.count("fuse") == 9
    assert content("out.zarr") == content("whole.zarr")


def test_a_scheduler_that_is_not_there(files, monkeypatch, capsys):
    pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setattr("fastfusion.scheduling.CONNECT", 1)
    address = "tcp://127.0.0.1:9"
    assert main([*TILED, "--out", "out.zarr", "--scheduler", address]) == 2
    assert f"no dask scheduler answers at {address}" in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == ["hsi.zarr", "msi.zarr"]


def test_a_failed_task_waits_for_those_that_run():
    both, late = threading.Barrier(2), []

    def task(number: int) -> None:
        if number > 1:
            late.append("begun after the failure")
            return
        both.wait(10)
        if number == 0:
            raise ValueError("bad tile")
        time.sleep(0.3)
        late.append("ended")

    with executor(None, 2) as run, pytest.raises(ValueError, match="bad tile"):
        run(task, [(number,) for number in range(20)], lambda: None)
    ended = list(late)
    time.sleep(0.2)
    assert late == ended and "ended" in late


# ------------------------------------------------------------------------------------------------
# Bad input: one line, and nothing is left
# ------------------------------------------------------------------------------------------------


def refused(files: Path, capsys, *arguments: str) -> str:
    before = content(files)
    assert main([*TILED, "--out", "out.zarr", *arguments]) == 2
    said = capsys.readouterr().err
    assert content(files) == before and said.count("\n") == 1
    return said


def test_arguments_that_do_not_go_with_tiles(files, capsys):
    said = {
        ("--method", "fsrvl"): "fsrvl does not go in tiles",
        ("--method", "lso"): "needs trained weights",
        ("--tile", "0"): "tile: expected at least 1, got 0",
        ("--workers", "0"): "workers: expected at least 1",
        ("--memory", "0"): "memory must be above 0",
        ("--margin", "8"): "margin: is for networks",
        ("--scale", "3"): "the MSI is 4 times finer",
        ("--reference", "msi.zarr"): "--tile does not go with --reference",
        ("--out", "out.npy"): "tiles go to .zarr or .tif",
        ("--out", "nowhere/out.zarr"): "folder",
        ("--hsi", "none.zarr"): "none.zarr does not exist",
        ("--hsi", "msi.zarr", "--msi", "hsi.zarr"): "are they swapped?",
        ("--option", "steps=3"): "regression in tiles has no option steps",
        ("--option", "ridge=-1"): "ridge must be above 0",
        ("--peak", "0.1"): "expected values in [0, 1] after division by the peak 0.1",
        ("--peak", "-1"): "peak must be above 0",
    }
    for arguments, says in said.items():
        assert says in refused(files, capsys, *arguments), arguments


def test_a_ratio_that_is_none(files, capsys):
    write_cube("msi.zarr", Cube(np.ones((3, ROWS + 1, COLUMNS), np.float32)))
    assert "the same whole multiple" in refused(files, capsys)


def test_values_that_are_not_there(files, capsys):
    lr_hsi, hr_msi, _ = pair()
    hr_msi[1, 100, 7] = torch.nan
    store(lr_hsi, hr_msi)
    line = refused(files, capsys)
    assert "msi.zarr holds NaN or infinite values, as in band 1, row 100, column 7" in line


def test_a_network_of_other_bands_or_scale(files, capsys):
    LSO(BANDS, 3, 8, width=8, heads=2, guide_width=8).save("x8.safetensors")
    line = refused(files, capsys, "--method", "lso", "--option", "weights='x8.safetensors'")
    assert "expected a network for 8 and 3 bands and scale 4, got one for 8, 3 and 8" in line


def test_a_folder_that_cannot_be_written(files, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (files / "locked").mkdir(mode=0o500)
    assert "no permission" in refused(files, capsys, "--out", "locked/out.zarr")


def test_unfinished_work_of_another_call_is_kept(files, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_finish", lambda *_: (_ for _ in ()).throw(OSError(5, "bad")))
        with pytest.raises(Unfinished, match="bad; what is done stays in"):
            fuse_files(*PLAIN, tile=64)
    before = content("out.zarr.work")
    with pytest.raises(ValueError, match=r"unfinished work that differs in .*tile"):
        fuse_files(*PLAIN, tile=32)
    shutil.copytree("hsi.zarr", "copy.zarr")
    with pytest.raises(ValueError, match="unfinished work that differs in hsi"):
        fuse_files("copy.zarr", *PLAIN[1:], tile=64)
    assert content("out.zarr.work") == before


def test_two_runs_at_once(files):
    import fcntl

    Path("out.zarr.work").mkdir()
    with open("out.zarr.work/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is at work there"):
            fuse_files(*PLAIN, tile=64)


def test_an_earlier_result_stays_until_the_new_one_is_there(files, monkeypatch):
    fuse_files(*PLAIN, tile=64)
    earlier = content("out.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "fuse", lambda *_: 1 / 0)
        with pytest.raises(Unfinished, match="division by zero"):
            fuse_files(*PLAIN, "bicubic", tile=64)
    assert content("out.zarr") == earlier
    fuse_files(*PLAIN, "bicubic", tile=64)
    assert content("out.zarr") != earlier and not Path("out.zarr.work").exists()
    assert Unavailable is not Unfinished and open_cube("out.zarr").shape == (BANDS, ROWS, COLUMNS)
