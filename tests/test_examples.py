"""Each example runs, at a reduced size, and what it computes by itself is right."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as the command line does, and gives what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def functions(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_is_in_the_documentation(path):
    assert path.name in (ROOT / "docs" / "examples.md").read_text()
    assert path.read_text().startswith('"""')


def test_darcy(run):
    told = run("darcy", "--size", 16, "--pairs", 32, "--steps", 40, "--width", 8)
    plain, latent = (
        [float(value) for value in re.findall(r"\d\.\d{4}", line)]
        for line in told.splitlines()
        if line.startswith("U-Net")
    )
    assert len(plain) == len(latent) == 5
    assert plain[-1] < plain[0] and latent[-1] < latent[0]


def test_the_pressure_of_a_uniform_medium():
    u = functions("darcy")["pressure"](np.ones((32, 32)))
    assert abs(u.max() - 0.07367) < 2e-4  # the membrane's largest deflection, a series
    assert np.allclose(u, u.T) and np.allclose(u, u[::-1])


def test_the_pressure_of_a_layered_medium():
    """Every cell is in balance: what flows out of it over its four faces is its source."""
    a = np.where(np.arange(12)[:, None] < 5, 1.0, 9.0) * np.ones((12, 12))
    u = functions("darcy")["pressure"](a)
    wide = np.pad(u, 1)
    for row, column in [(3, 4), (4, 7), (5, 2), (8, 8)]:
        out = 0.0
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            face = 2 / (1 / a[row, column] + 1 / a[r, c])
            out += face * (u[row, column] - wide[r + 1, c + 1])
        assert out == pytest.approx(1 / 144)


def test_convnext_block(run):
    told = run("convnext_block", "--size", 12, "--width", 16)
    errors = [float(found) for found in re.findall(r"differ by (\S+)", told)]
    assert len(errors) == 2 and max(errors) < 1e-5
    assert told.count("times faster on the example") == 2


def test_fuse_files(run, tmp_path):
    told = run("fuse_files", "--out", tmp_path / "fused.npy")
    assert float(re.findall(r"PSNR (\S+)", told)[0]) > 45
    assert np.load(tmp_path / "fused.npy").shape == (31, 256, 256)
    again = run(
        "fuse_files",
        *("--hsi", tmp_path / "coarse.mat", "--msi", tmp_path / "fine.npy"),
        *("--out", tmp_path / "again.npy"),
    )
    assert "PSNR" not in again  # of a pair of one's own there is no truth
    assert np.array_equal(np.load(tmp_path / "again.npy"), np.load(tmp_path / "fused.npy"))


def test_unmix(run):
    told = run("unmix", "--scene", "made", "--steps", 60)
    figures = {
        line.split("  ")[0]: [float(value) for value in re.findall(r"\d\.\d{4}", line)]
        for line in told.splitlines()
        if "   all " in line
    }
    assert list(figures) == ["FSRVL", "purest pixels, bicubic", "the same everywhere"]
    assert all(len(values) == 5 for values in figures.values())
    assert figures["FSRVL"][-1] < figures["the same everywhere"][-1]


def test_unmix_matches_and_solves():
    unmix = functions("unmix")
    spectra = torch.rand(3, 20)
    abundances = torch.rand(3, 4, 5).softmax(0)
    order = [2, 0, 1]
    found, degrees = unmix["matched"](abundances[order], 3 * spectra[order], spectra)
    assert torch.equal(found, abundances)
    assert degrees.max() < 0.1
    pixels = abundances.flatten(1).T @ spectra
    solved = unmix["on_simplex"](pixels, spectra, steps=3000)
    assert torch.allclose(solved, abundances.flatten(1), atol=0.02)


def test_unmix_jasper_ridge(run, scenes):
    told = run("unmix", "--scene", "jasper_ridge", "--steps", 10)
    assert "jasper_ridge" in told and "RMSE of abundances" in told
