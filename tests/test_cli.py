"""The command line: what it writes, what it says, and that bad input leaves nothing behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastfusion import commands
from fastfusion.cli import main
from fastfusion.data import Cube, Degradation, read_cube, wald, write_cube
from fastfusion.models import LSO

WAVELENGTHS = np.linspace(420, 900, 12)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with a pair that two sensors took, its reference and the sensors' responses."""
    monkeypatch.chdir(tmp_path)
    rows, columns = torch.linspace(0, 3, 48)[:, None], torch.linspace(0, 4, 60)[None, :]
    abundances = torch.stack([torch.sin(rows * columns) ** 2, torch.cos(rows + columns) ** 2])
    reference = torch.einsum("gk,khw->ghw", 0.1 + 0.4 * torch.rand(12, 2), abundances)
    srf = torch.rand(3, 12)
    srf /= srf.sum(1, keepdim=True)
    lr_hsi, hr_msi = wald(reference, Degradation.gaussian(4), srf)
    write_cube("hsi.npz", Cube(lr_hsi.numpy(), WAVELENGTHS))
    write_cube("msi.npy", Cube(hr_msi.numpy()))
    write_cube("reference.npy", Cube(reference.numpy()))
    np.save("srf.npy", srf.numpy())
    np.save("psf.npy", Degradation.gaussian(4).psf.numpy())
    return tmp_path


PAIR = ["fuse", "--hsi", "hsi.npz", "--msi", "msi.npy", "--method", "bicubic"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command."""
    try:
        status = main([*arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(capsys, folder: Path, *arguments: str, status: int = 2) -> str:
    """The one line that a command says which fails and leaves the folder as it was."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = content()
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (status, ""), err
    assert content() == before
    assert not list(folder.rglob(".fastfusion-*"))
    assert err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err
    return err


def strict_json(path: Path) -> dict:
    def no(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(path.read_text(), parse_constant=no)


# ------------------------------------------------------------------------------------------------
# fuse
# ------------------------------------------------------------------------------------------------


def test_fuse_writes_the_cube_its_figures_and_a_picture(files, capsys):
    status, out, err = run(
        capsys, *PAIR, "--out", "fused.npz", "--reference", "reference.npy", "--srf", "srf.npy"
    )
    assert (status, err) == (0, "")
    assert "hsi x4 by bicubic, PSNR" in out and "wrote fused.npz, fused.npz.json" in out
    fused = read_cube("fused.npz")
    assert fused.shape == (12, 48, 60)
    np.testing.assert_allclose(fused.wavelengths, WAVELENGTHS)
    record = strict_json(files / "fused.npz.json")
    reference = np.load("reference.npy")
    error = ((fused.data - reference) ** 2).mean((1, 2))
    assert record["metrics"]["psnr"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-4)
    assert set(record["metrics"]) == {"psnr", "sam", "ergas", "ssim", "mrae"}
    assert set(record["metrics"]) < set(record["conventions"])
    assert record["sensors"] == {"srf": "given", "psf": "estimated"}
    assert record["scale"] == 4 and record["peak"] == 1
    assert set(record["seconds"]) == {"read", "fuse", "score", "draw", "write"}
    with Image.open("fused.npz.png") as picture:
        picture.load()
    assert not [path for path in files.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("out", ["fused.mat", "fused.npy", "fused.hdr", "fused.tif", "bands"])
def test_every_format_goes_out(files, capsys, out):
    assert run(capsys, *PAIR, "--out", out, "--no-figure")[0] == 0
    assert read_cube(out).shape == (12, 48, 60)
    assert strict_json(files / f"{out}.json")["outputs"] == [out, f"{out}.json"]


def test_without_a_reference_consistency_is_scored(files, capsys):
    assert run(capsys, *PAIR, "--out", "x.npy", "--no-figure")[0] == 0
    record = strict_json(files / "x.npy.json")
    assert record["sensors"] == {"srf": "estimated", "psf": "estimated"}
    # 12 x 15 pixels hold the window of 11
    assert set(record["metrics"]) == {"d_lambda", "d_s", "qnr", "rmse_lr_hsi", "rmse_hr_msi"}


def test_counts_come_back_as_counts(files, capsys):
    plain = [*PAIR, "--no-figure", "--out"]
    run(capsys, *plain, "plain.npy")
    for name in ("hsi.npz", "msi.npy"):
        cube = read_cube(name)
        counts = np.round(cube.data * 5000).astype(np.uint16)
        write_cube(f"counts_{name}", Cube(counts, cube.wavelengths))
    images = ["fuse", "--hsi", "counts_hsi.npz", "--msi", "counts_msi.npy", "--method", "bicubic"]
    run(capsys, *images, "--no-figure", "--out", "counts.npy")
    largest = max(np.load("counts_hsi.npz")["data"].max(), np.load("counts_msi.npy").max())
    assert strict_json(files / "counts.npy.json")["peak"] == 1.25 * largest
    np.testing.assert_allclose(np.load("counts.npy"), 5000 * np.load("plain.npy"), atol=1)
    truth = Cube(5000 * read_cube("reference.npy").data)
    write_cube("truth.npy", truth)
    run(capsys, *images, "--no-figure", "--out", "scored.npy", "--reference", "truth.npy")
    assert strict_json(files / "scored.npy.json")["peak"] == max(largest, truth.data.max())
    run(capsys, *images, "--no-figure", "--out", "peak.npy", "--peak", "10000")
    assert strict_json(files / "peak.npy.json")["peak"] == 10000
    np.testing.assert_allclose(np.load("peak.npy"), np.load("counts.npy"), atol=1)


def test_a_scene_is_degraded_fused_and_scored(files, capsys):
    status, _, err = run(
        capsys,
        *("fuse", "--scene", "reference.npy", "--scale", "3", "--method", "bicubic"),
        *("--out", "fused.mat", "--psf", "block"),
    )
    assert (status, err) == (0, "")
    record = strict_json(files / "fused.mat.json")
    assert (record["scale"], record["inputs"]["protocol"]) == (3, "Wald")
    assert record["lr_hsi"] == [12, 16, 20]
    assert read_cube("fused.mat").shape == (12, 48, 60)


def test_a_scene_without_out_is_scored_alone(files, capsys):
    before = sorted(files.iterdir())
    status, out, _ = run(capsys, "fuse", "--scene", "reference.npy", "--method", "bicubic")
    assert status == 0 and "PSNR" in out and "nothing was written" in out
    assert sorted(files.iterdir()) == before


def test_regression_of_files_and_of_the_demo_scene(files, capsys):
    images = ["fuse", "--hsi", "hsi.npz", "--msi", "msi.npy", "--reference", "reference.npy"]
    psnr = {}
    for name, more in {
        "bicubic": ["--method", "bicubic"],
        "blind": [],
        "given": ["--srf", "srf.npy", "--psf", "psf.npy"],
    }.items():
        assert run(capsys, *images, *more, "--out", f"{name}.npy", "--no-figure")[0] == 0
        psnr[name] = strict_json(files / f"{name}.npy.json")["metrics"]["psnr"]
    assert psnr["bicubic"] + 5 < psnr["blind"] <= psnr["given"] + 3
    local = ["--scene", "demo", "--scale", "8", "--option", "local=False"]
    status, out, _ = run(capsys, "fuse", *local)
    assert status == 0 and "demo x8 by regression" in out


def test_fsrvl_shows_a_bar(files, capsys):
    options = ["--option", "features=4", "--option", "steps=5", "--option", "minutes=0.2"]
    status, out, err = run(
        capsys, *PAIR, "--method", "fsrvl", *options, "--progress", "--out", "x.npy", "--no-figure"
    )
    assert status == 0 and "hsi x4 by fsrvl" in out
    assert "FSRVL" in err and "5/5" in err
    assert strict_json(files / "x.npy.json")["options"] == {
        "features": 4,
        "steps": 5,
        "minutes": 0.2,
    }


def test_identical_to_the_reference_is_valid_json(files, capsys, monkeypatch):
    """An infinite PSNR has no token in JSON."""
    monkeypatch.setattr(commands, "run", lambda case, *_, **__: case.reference)
    status, out, _ = run(
        capsys, *PAIR, "--reference", "reference.npy", "--out", "x.npy", "--no-figure"
    )
    assert status == 0 and "PSNR inf" in out
    assert strict_json(files / "x.npy.json")["metrics"]["psnr"] is None


def test_an_earlier_output_is_replaced(files, capsys):
    for name in ("fused.npy", "fused.npy.json", "fused.npy.png"):
        Path(name).write_text("old")
    assert run(capsys, *PAIR, "--out", "fused.npy")[0] == 0
    assert np.load("fused.npy").shape == (12, 48, 60)
    assert strict_json(files / "fused.npy.json")["method"] == "bicubic"


def test_one_of_several_arrays(files, capsys):
    msi = np.load("msi.npy")
    np.savez("both.npz", first=msi, second=msi[:2])
    line = refused(capsys, files, *PAIR[:3], "--msi", "both.npz", "--out", "x.npy")
    assert "first (3, 48, 60)" in line and "FILE:NAME" in line
    images = ["fuse", "--hsi", "hsi.npz", "--msi", "both.npz:second", "--method", "bicubic"]
    assert run(capsys, *images, "--no-figure", "--out", "x.npy")[0] == 0
    assert strict_json(files / "x.npy.json")["hr_msi"] == [2, 48, 60]


# ------------------------------------------------------------------------------------------------
# Bad usage and bad input: one line, status 2, nothing written
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["melt"], "invalid choice: 'melt'"),
        (["fuse"], "expected --hsi FILE and --msi FILE, or --scene NAME"),
        (["fuse", "--hsi", "hsi.npz"], "expected --hsi FILE and --msi FILE"),
        (["fuse", "--hsi", "hsi.npz", "--msi", "msi.npy"], "expected --out OUT"),
        (["fuse", "--scene", "demo", "--hsi", "hsi.npz"], "--hsi does not go with --scene"),
        (["fuse", "--scene", "demo", "--peak", "3"], "--peak does not go with --scene"),
        (["fuse", "--scene", "atlantis"], "no scene is called 'atlantis'"),
        (["fuse", "--scene", "demo", "--scale", "x"], "invalid int value: 'x'"),
        (["fuse", "--scene", "reference.npy", "--scale", "1"], "scale: expected 2 to 48"),
        (
            ["fuse", "--scene", "reference.npy", "--psf", "square"],
            "expected gaussian, gaussian:SIGMA",
        ),
        (["fuse", "--scene", "reference.npy", "--psf", "gaussian:-1"], "SIGMA above 0"),
        ([*PAIR, "--out", "x.npy", "--scale", "8"], "the MSI is 4 times finer"),
        ([*PAIR, "--out", "x.npy", "--method", "magic"], "invalid choice: 'magic'"),
        (
            [*PAIR, "--out", "x.npy", "--method", "lso", "--minutes", "0"],
            "minutes must be above 0",
        ),
        ([*PAIR, "--out", "x.npy", "--backend", "warp"], "invalid choice: 'warp'"),
        ([*PAIR, "--out", "x.npy", "--device", "toaster"], "device must be"),
        ([*PAIR, "--out", "x.npy", "--option", "local"], "expected NAME=VALUE"),
        ([*PAIR, "--out", "x.npy", "--option", "colour=red"], "colour"),
        ([*PAIR, "--out", "x.npy", "--peak", "0"], "--peak: expected a positive number"),
        ([*PAIR, "--out", "x.npy", "--peak", "nan"], "--peak: expected a positive number"),
        ([*PAIR, "--out", "x.npy", "--peak", "0.01"], "expected values in [0, 1]"),
        ([*PAIR, "--out", "x.npy", "--blind"], "--blind is for --scene"),
        ([*PAIR, "--out", "x.unknown"], "'.unknown' is not one of"),
        ([*PAIR, "--out", "missing/x.npy"], "does not exist"),
        ([*PAIR, "--out", "msi.npy"], "msi.npy is an input; name another"),
        (["evaluate", "--scenes", "demo@x", "--out", "."], "expected NAME@N"),
    ],
)
def test_bad_usage(files, capsys, arguments, says):
    assert says in refused(capsys, files, *arguments)


def test_a_backend_that_is_not_there_says_why(files, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    line = refused(capsys, files, *PAIR, "--out", "x.npy", "--backend", "cuda")
    assert "backend 'cuda' is not available: " in line


def test_missing_files(files, capsys):
    for option in ("--hsi", "--msi", "--reference", "--srf", "--psf"):
        line = refused(capsys, files, *PAIR, option, "gone.npy", "--out", "x.npy")
        assert "gone.npy" in line


@pytest.mark.parametrize("name", ["msi.npy", "msi.mat", "msi.npz", "msi.tif", "msi.hdr"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_truncated_files(files, capsys, name, kept):
    write_cube(name, read_cube("msi.npy"))
    damaged = next(files.glob("msi.[di]*")) if name == "msi.hdr" else Path(name)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: int(kept * len(whole))])
    line = refused(capsys, files, *PAIR[:3], "--msi", name, "--out", "x.npy")
    assert name in line


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["hsi.npz", "msi.npy", "reference.npy"])
def test_values_that_are_not_finite(files, capsys, name, value):
    cube = read_cube(name)
    cube.data[1, 2, 3] = value
    write_cube(name, cube)
    line = refused(capsys, files, *PAIR, "--reference", "reference.npy", "--out", "x.npy")
    assert name in line and "band 1, row 2, column 3" in line


def test_swapped_images(files, capsys):
    line = refused(capsys, files, "fuse", "--hsi", "msi.npy", "--msi", "hsi.npz", "--out", "x.npy")
    assert "are they swapped?" in line


def test_sizes_that_do_not_divide(files, capsys):
    np.save("msi.npy", np.load("msi.npy")[:, :-1])
    line = refused(capsys, files, *PAIR, "--out", "x.npy")
    assert "whole multiple" in line and "(12, 12, 15)" in line and "(3, 47, 60)" in line


def test_a_reference_that_does_not_fit(files, capsys):
    np.save("reference.npy", np.load("reference.npy")[:11])
    line = refused(capsys, files, *PAIR, "--reference", "reference.npy", "--out", "x.npy")
    assert "reference.npy: expected the shape of the result, (12, 48, 60), got (11, 48, 60)" in line


def test_responses_that_do_not_cover_the_bands(files, capsys):
    wanted = [*PAIR, "--out", "x.npy", "--srf"]
    np.save("narrow.npy", np.load("srf.npy")[:, :11])
    assert "12 bands of the HSI, got 11" in refused(capsys, files, *wanted, "narrow.npy")
    np.save("two.npy", np.load("srf.npy")[:2])
    assert "MSI's 3 bands, got 2" in refused(capsys, files, *wanted, "two.npy")
    table = ["wavelength_nm,blue,green,swir", "400,1,0,0", "500,0,1,0", "1600,0,0,1", "1700,0,0,1"]
    Path("far.csv").write_text("\n".join(table))
    line = refused(capsys, files, *wanted, "far.csv")
    assert "far.csv" in line and "swir lies outside the HSI's bands" in line
    Path("words.csv").write_text("hello\nworld\n")
    assert "words.csv" in refused(capsys, files, *wanted, "words.csv")


def test_a_folder_that_cannot_be_written(files, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = files / "locked"
    locked.mkdir(mode=0o500)
    line = refused(capsys, files, *PAIR, "--out", "locked/x.npy")
    assert "no permission" in line


# ------------------------------------------------------------------------------------------------
# What goes wrong on the way: status 1, nothing half written, nothing earlier lost
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["run", "score", "save_figure", "write_cube"])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some space"),
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("a bug"), "RuntimeError: a bug (--debug shows where)"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_trouble_on_the_way(files, capsys, monkeypatch, where, error, says):
    work = getattr(commands, where)

    def fail(*arguments, **options):
        if where == "write_cube" and arguments[1].data.size == 1:
            return work(*arguments, **options)  # the trial before the work
        raise error

    Path("x.npy.json").write_text("an earlier result")
    monkeypatch.setattr(commands, where, fail)
    plain = [] if where == "save_figure" else ["--no-figure"]
    assert says in refused(capsys, files, *PAIR, "--out", "x.npy", *plain, status=1)


def test_debug_shows_where(files, capsys, monkeypatch):
    monkeypatch.setattr(commands, "score", lambda *_: 1 / 0)
    status, _, err = run(capsys, *PAIR, "--out", "x.npy", "--debug")
    assert status == 1 and "Traceback" in err and "ZeroDivisionError" in err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(files, capsys, monkeypatch):
    """The figures' file lies on a disk with no space left."""
    write = Path.write_text

    def full(path, *arguments, **options):
        return write(Path("/dev/full") if path.suffix == ".json" else path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    found, _, err = run(capsys, *PAIR, "--out", "x.npy", "--no-figure")
    assert found == 1 and "No space left on device; free some space" in err
    assert not Path("x.npy.json").exists()


def test_ctrl_c_in_the_middle(files):
    """A real signal to a real process: status 1, one line, no output."""
    script = (
        "import signal, sys, time\n"
        # What is started behind an ampersand ignores Ctrl-C, and so would its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastfusion import cli, commands\n"
        "def work(*_, **__):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "commands.run = work\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    before = sorted(files.rglob("*"))
    process = subprocess.Popen(
        [sys.executable, "-c", script, *PAIR, "--out", "x.npy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(commands.__file__).parents[1])},
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        1,
        "fastfusion fuse: interrupted; no output was left half written\n",
    )
    assert sorted(files.rglob("*")) == before


# ------------------------------------------------------------------------------------------------
# evaluate and info
# ------------------------------------------------------------------------------------------------


def test_evaluate(files, capsys):
    status, out, err = run(
        capsys,
        *("evaluate", "--scenes", "reference.npy@3,4", "--methods", "bicubic", "--out", "a/b"),
        *("--no-figures", "--quick"),
    )
    assert status == 0
    lines = (files / "a/b/table.md").read_text().splitlines()
    assert lines[: len(out.splitlines())] == out.splitlines() and lines[4] == ""
    assert "- images: Wald" in lines and "- psnr: dB, mean over bands" in "".join(lines)
    assert lines[2].startswith("| reference.npy | 3 | bicubic |")
    rows = (files / "a/b/table.csv").read_text().splitlines()
    assert rows[0].startswith("scene,scale,method,psnr,sam,ergas,mrae,ssim,seconds,parameters,")
    assert "[2/2] reference.npy x4 by bicubic" in err
    assert sorted(path.name for path in (files / "a/b").iterdir()) == ["table.csv", "table.md"]


def test_evaluate_with_options_displacement_and_pictures(files, capsys):
    status, _, _ = run(
        capsys,
        *("evaluate", "--scenes", "reference.npy", "--out", "out", "--shift", "0.5"),
        *("--methods", "regression:local=False", "--blind"),
    )
    assert status == 0
    table = (files / "out/table.csv").read_text()
    assert "HSI moved 0.5 pixels" in table and "regression local=False" in table
    assert ",estimated,estimated," in table
    assert (files / "out/reference.npy_x4_regression_local=False.png").exists()


@pytest.fixture
def trained(files) -> Path:
    """A network of scale 4 for the pair in the files."""
    torch.manual_seed(0)
    sizes = {"width": 8, "heads": 2, "tokens": 2, "basis": 2, "guide_width": 4, "guide_blocks": 0}
    LSO(12, 3, 4, **sizes).save("x4.safetensors")
    return files


EVALUATE = ["evaluate", "--scenes", "reference.npy@4", "--out", "out", "--no-figures"]


def test_evaluate_tells_quality_and_cost_of_a_trained_network(trained, capsys):
    lso = ["--methods", "lso", "--weights", "lso=x4.safetensors"]
    assert run(capsys, *EVALUATE, *lso)[0] == 0
    with open("out/table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == "lso x4"
    for name in ("psnr", "ssim", "sam", "ergas", "d_lambda", "d_s", "qnr", "latency"):
        assert np.isfinite(float(row[name])), name
    model = LSO.load("x4.safetensors")
    assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
    assert float(row["gflops"]) > 0 and row["seconds"] >= row["latency"]


def test_evaluate_across_scales(trained, capsys):
    scenes = ["--scenes", "reference.npy@2,4,3"]
    lso = [*EVALUATE, *scenes, "--methods", "lso", "bicubic", "--weights", "lso=x4.safetensors"]
    line = refused(capsys, trained, *lso)
    assert "it was trained at x4, and x2 is asked for; --cross-scale" in line
    lso.remove("--no-figures")
    assert run(capsys, *lso, "--quick", "--cross-scale", "script")[0] == 0
    table = Path("out/table.md").read_text()
    assert "cross-scale: as in LSO's script: the LR-HSI resized" in table
    names = {path.name for path in Path("out").iterdir()}
    assert {"psnr_against_scale.png", "reference.npy_x2.png", "reference.npy_x2_lso_x4.png"} < names
    with open("out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["cross_scale"] == "" for row in rows} == {True, False}


def test_evaluate_refuses_weights_before_any_work(trained, capsys):
    said = {
        "lso": "--weights lso: expected METHOD=FILE",
        "x=y": "--weights x=y: expected METHOD=FILE",
        "lso=none.safetensors": "none.safetensors",
        "cofusion=x4.safetensors": "--methods does not name cofusion",
        "lso=reference.npy": "is no safetensors file, or truncated",
    }
    for text, says in said.items():
        assert says in refused(capsys, trained, *EVALUATE, "--methods", "lso", "--weights", text)
    mixed = [*EVALUATE, "--methods", "cofusion", "--weights", "cofusion=x4.safetensors"]
    assert "it holds a LSO" in refused(capsys, trained, *mixed)
    assert "--methods nothing: expected one of" in refused(
        capsys, trained, *EVALUATE, "--methods", "nothing"
    )
    assert "is there twice" in refused(capsys, trained, *EVALUATE, "--methods", "lso", "lso")


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0 and "reference  available" in out and "torchmetrics" in out
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0 and json.loads(out)["backends"]["reference"] == "available"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fastfusion", "--help"], capture_output=True, text=True, check=True
    )
    assert "fuse" in done.stdout and "evaluate" in done.stdout and "info" in done.stdout


# -- train -----------------------------------------------------------------------------------------


def test_train_on_the_demo_scene(capsys, tmp_path):
    pytest.importorskip("safetensors")
    options = ["width=8", "heads=2", "tokens=2", "basis=3", "guide_width=8", "guide_blocks=1"]
    command = [
        "train",
        "--config",
        "lso-cave",
        "--scenes",
        "demo",
        "--validation",
        "demo@0:32,0:64",
    ]
    command += [part for option in options for part in ("--option", option)]
    for change in ("epochs=1", "steps=1", "patch=16", "batch=1"):
        command += ["--set", change]
    assert main([*command, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "best of LSO after 1 epochs, PSNR" in said and "model.safetensors" in said
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "holds a training already: resume it" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path), "--resume"]) == 0
    fuse = ["fuse", "--scene", "demo", "--scale", "4", "--method", "lso"]
    assert main([*fuse, "--option", f"weights={tmp_path / 'model.safetensors'}"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nothing"], "config: expected a .json file or one of lso-cave"),
        (["--config", "cofusion-pavia"], "scenes: expected names of scenes to train on"),
        (["--config", "lso-cave", "--set", "colour=1"], "a recipe has no 'colour'"),
        (["--config", "lso-cave", "--scenes", "demo", "--option", "colour=1"], "colour"),
        (["--config", "lso-cave", "--minutes", "0"], "minutes must be above 0"),
    ],
)
def test_train_with_bad_usage(capsys, tmp_path, arguments, message):
    assert main(["train", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_network_without_weights_says_where_it_gains_nothing(capsys, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "hsi.npy", rng.random((6, 5, 5), np.float32))
    np.save(tmp_path / "msi.npy", rng.random((2, 20, 20), np.float32))
    command = ["fuse", "--hsi", str(tmp_path / "hsi.npy"), "--msi", str(tmp_path / "msi.npy")]
    command += ["--out", str(tmp_path / "out.npy"), "--no-figure", "--method", "lso"]
    assert main([*command, "--bands-axis", "0"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "fastfusion: the result is that of regression: "
        "an HSI of 5 x 5 pixels is too small to learn from"
    ]
