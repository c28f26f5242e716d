"""Dependencies with bounds and a reason each; no network while the library works or is built."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.effort import counted

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "dependencies.md"


def _requirements() -> dict[str, str]:
    """Name and bounds of everything that pyproject.toml asks for."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli", reason="tomli is not installed")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
    lists += project["project"]["optional-dependencies"].values()
    found = {}
    for requirement in (item for items in lists for item in items):
        name, bounds = re.fullmatch(r"([\w.-]+)(?:\[.*\])?([^;]*).*", requirement).groups()
        if name != "fastfusion":
            found.setdefault(name.lower(), bounds.strip())  # the package's own come first
    return found


def test_every_dependency_has_a_lower_bound_and_a_reason() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    told = {name.lower(): (bounds, reason) for name, bounds, reason in rows}
    wanted = _requirements()
    assert told.keys() == wanted.keys(), told.keys() ^ wanted.keys()
    for name, bounds in wanted.items():
        assert ">=" in bounds, f"{name} has no lower bound"
        lower = re.search(r">=\s*([\w.]+)", bounds)[1]
        assert lower in told[name][0], f"docs/dependencies.md tells another bound of {name}"
        assert len(told[name][1]) > 10
    counted("supply chain", "dependencies with bounds and a reason", len(wanted))


OFFLINE = """
import sys
def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby",
                         "socket.sendto", "urllib.", "http.", "ftplib.", "smtplib.")):
        sys.stderr.write(f"NETWORK {event} {arguments}\\n")
        import os
        os._exit(99)
sys.addaudithook(refuse)
import torch
import fastfusion
from fastfusion import cli, data, metrics, models, nn, training
fastfusion.info()
fastfusion.accelerate(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 7, padding=3, groups=4)))
assert cli.main(["info"]) == 0
data.write_cube("scene.npy", data.demo_scene(32, 32, 8))
assert cli.main(["fuse", "--scene", "scene.npy", "--scale", "4", "--out", "out.npy",
                 "--no-progress"]) == 0
tiny = {"width": 8, "heads": 2, "tokens": 2, "basis": 3, "guide_width": 8, "guide_blocks": 1}
recipe = training.Recipe(options=tiny, scenes=("scene.npy",), validation=("scene.npy",), epochs=1,
                         steps=1, patch=8, batch=1)
training.train(recipe, "trained")
models.FusionModel.load("trained/model.safetensors")
"""


def test_the_library_works_without_a_network(tmp_path: Path) -> None:
    """Anything that would open a connection ends the process."""
    for library in ("safetensors", "torchmetrics", "matplotlib"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted("supply chain", "runs without a network")


def test_the_build_opens_no_connection() -> None:
    """What builds the package knows no library that could."""
    networking = {"socket", "urllib", "http", "ftplib", "requests", "httpx", "ssl", "asyncio"}
    for path in [ROOT / "setup.py", *sorted((ROOT / "csrc").glob("*.py"))]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & networking, path
        words = set(re.findall(r"[\w-]+", path.read_text()))
        assert not words & {"curl", "wget", "FetchContent"}, path
