"""What the Triton kernels promise, tested without a GPU.

Their parity matrix runs through Triton's interpreter, in a process of its own because Triton reads
TRITON_INTERPRET when it is imported. Every launch is compiled for every architecture.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import kernels as gate
from fastfusion.ops.operator import OPERATORS
from tests import ahead

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ("-m", "pytest", "-x", "-p", "no:warnings", "-p", "tests.ops.interpreter")
FOLDERS = sorted(path.parent.name for path in ROOT.glob("fastfusion/ops/*/kernels.py"))

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="a compiler cannot be had under the interpreter",
    ),
    # Compiling and interpreting an operator's folder takes a minute or two where nothing else runs.
    pytest.mark.timeout(1500),
]


def operators(folder: str) -> list[str]:
    """The operators of a folder that have Triton kernels."""
    module = importlib.import_module(f"fastfusion.ops.{folder}.kernels")
    return [
        name
        for name, operator in OPERATORS.items()
        if "triton" in operator.backends and hasattr(module, name)
    ]


def interpreted(*command: str) -> ahead.Command:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return ahead.Command([sys.executable, *command], environment)


def parity(folder: str) -> ahead.Command:
    names = " or ".join(f"triton-{name}" for name in operators(folder))
    return interpreted(*PYTEST, "tests/ops/test_parity.py", "-k", names)


@pytest.mark.ahead(command=parity)
@pytest.mark.parametrize("folder", FOLDERS)
def test_parity_through_the_interpreter(folder: str) -> None:
    done = ahead.result(parity, folder=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def first_stage() -> ahead.Command:
    return interpreted(
        *PYTEST,
        "tests/ops/test_haar.py",
        "-k",
        "not long and (float32 or parts or equal or some or special or strides)",
    )


@pytest.mark.ahead(command=first_stage)
def test_first_stage_through_the_interpreter() -> None:
    done = ahead.result(first_stage)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


TRITONS = sorted(path for path in (ROOT / "build").glob("triton-*") if path.is_dir())


@pytest.mark.skipif(not TRITONS, reason="other Tritons: make triton-versions brings and tests them")
@pytest.mark.parametrize("folder", TRITONS, ids=lambda folder: folder.name)
def test_the_other_tritons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator with masks of every kind; all of them: make triton-versions."""
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    done = ahead.run(interpreted("-c", "import triton; print(triton.__version__)"))
    assert done.stdout.strip() == folder.name.removeprefix("triton-")
    names = "triton-haar and (float32 or layout and channels_last)"
    done = ahead.run(interpreted(*PYTEST, "tests/ops/test_parity.py", "-k", names))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_every_operator_has_its_launchers_and_examples() -> None:
    found = {name for folder in FOLDERS for name in operators(folder)}
    assert found == {n for n, operator in OPERATORS.items() if "triton" in operator.backends}
    for folder in FOLDERS:
        module = importlib.import_module(f"fastfusion.ops.{folder}.kernels")
        assert module.EXAMPLES
        assert all(hasattr(module, f"{name}_backward") for name in operators(folder))


# With the other architectures it takes the better part of an hour: `make triton-gate`.
EVERYWHERE = os.environ.get("FASTFUSION_TRITON_GATE") == "all"


@pytest.mark.parametrize("architecture", gate.ARCHITECTURES if EVERYWHERE else ["sm_90"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_kernel_compiles(folder: str, architecture: str) -> None:
    """Within the architecture's shared memory, no spills, no doubles, matrix units where meant."""
    figures = gate.figures(folder, architecture)
    assert figures
    problems = [f"{row.name}: {problem}" for row in figures for problem in row.problems()]
    assert not problems, "\n".join(problems)


def test_the_gate_sees_what_is_wrong() -> None:
    good = gate.Figures("k", "x", "sm_90", "", 4, 1, 32, 0, 1024, frozenset(), True, False)
    assert good.problems() == []
    bad = gate.Figures("k", "x", "sm_90", "", 4, 1, 255, 8, 300_000, frozenset({"f64"}), True, True)
    assert len(bad.problems()) == 3
    plain = gate.Figures("k", "x", "sm_90", "", 4, 1, 32, 0, 0, frozenset(), False, True)
    assert plain.problems() == ["no matrix instruction"]


def test_a_table_serves_other_architectures_and_lists_each_tile_once() -> None:
    from fastfusion.ops.triton import Table, Tile

    one, other = Tile({"BLOCK": 64}), Tile({"BLOCK": 128}, warps=8)
    table = Table("t", {"small": {"": one, "sm_90": other, "gfx942": one}})
    assert table.tile("small", "sm_90") is other
    assert table.tile("small", "sm_80") is one
    assert table.all("small") == [one, other]


def test_tuning_keeps_the_fastest_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastfusion.ops.triton import Tile, fastest

    monkeypatch.setenv("FASTFUSION_CACHE", str(tmp_path / "cache"))
    tiles = [Tile({"BLOCK": 64}), Tile({"BLOCK": 128}), Tile({"BLOCK": 256}, warps=8)]
    timed: list[int] = []

    def seconds(run: object) -> float:
        run()  # type: ignore[operator]
        return {64: 3.0, 128: 1.0, 256: 2.0}[timed[-1]]

    def run(tile: Tile) -> None:
        timed.append(tile["BLOCK"])

    assert fastest("scale", "sm_90", tiles, run, seconds) == tiles[1]
    assert timed == [64, 128, 256]
    assert fastest("scale", "sm_90", tiles, run, seconds) == tiles[1]
    assert timed == [64, 128, 256]  # from the disk
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("not JSON")
    assert fastest("scale", "sm_90", tiles, run, seconds) == tiles[1]
    assert len(timed) == 6
    assert len(json.loads(file.read_text())) == 1
    for damaged in ("[1]", "null", "[" * 100_000, '{"scale": 3}'):
        file.write_text(damaged)
        assert fastest("scale", "sm_90", tiles, run, seconds) == tiles[1]
    assert len(timed) == 18
    # No room or no permission: what was found is kept in this process.
    monkeypatch.setattr("fastfusion.ops.triton._unwritten", {})
    monkeypatch.setenv("FASTFUSION_CACHE", str(file))  # a file where the folder should be
    for _ in range(2):
        assert fastest("scale", "sm_90", tiles, run, seconds) == tiles[1]
    assert len(timed) == 21


def test_triton_says_why_it_cannot() -> None:
    x = torch.zeros(1, 1, 2, 2)
    split = OPERATORS["haar_split2d"]
    assert "TRITON_INTERPRET=1" in (split.why_not("triton", x) or "")
    assert "a GPU, got meta" in (split.why_not("triton", x.to("meta")) or "")


def test_auto_leaves_the_interpreter_alone() -> None:
    code = (
        "import torch; from fastfusion.ops.operator import OPERATORS\n"
        "operator = OPERATORS['haar_split2d']\n"
        "x = torch.zeros(1, 1, 2, 2)\n"
        "print(operator.why_not('triton', x))\n"
        "print(operator.choose('auto', x) is operator.backends['triton'])\n"
        "print(operator.why_not('triton', x.double()))"
    )
    done = ahead.run(interpreted("-c", code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["None", "False"]
    assert "float64" in done.stdout


def test_the_sanitizer_sees_a_missing_mask() -> None:
    code = """
import torch, triton, triton.language as tl
from tests.ops import bounds
bounds.install()

@triton.jit
def copy(x, y, size, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    place = tl.arange(0, BLOCK)
    mask = place < (size if MASKED else BLOCK)
    tl.store(y + place, tl.load(x + place, mask=mask), mask=place < size)

x, y = torch.ones(7), torch.zeros(7)
copy[(1,)](x, y, 7, 8, True)
assert y.sum() == 7
try:
    copy[(1,)](x, y, 7, 8, False)
except Exception as error:
    print(error)
"""
    # Kernels must stand in a file: the interpreter reads their source.
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(code)
        done = ahead.run(interpreted(str(script)))
    assert "load of 1 addresses out of bounds" in done.stdout, done.stdout + done.stderr
