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
from typing import Any

import pytest
import torch

from benchmarks import kernels as gate
from fastfusion.ops.operator import OPERATORS
from tests import ahead
from tests.ops import tritons

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


def never_ran(output: str, folder: str, first_stage: bool = False) -> set[str]:
    """The kernels of a folder that tests.ops.interpreter did not name in its last line."""
    ran = {
        word for line in output.splitlines() if line.startswith("kernels:") for word in line.split()
    }
    kernels = {k for k in tritons.kernels(folder) if k.startswith("spectral_m") == first_stage}
    assert kernels or first_stage
    return kernels - ran


@pytest.mark.ahead(command=parity)
@pytest.mark.parametrize("folder", FOLDERS)
def test_parity_through_the_interpreter(folder: str) -> None:
    done = ahead.result(parity, folder=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert not never_ran(done.stdout, folder)


def first_stage() -> ahead.Command:
    return interpreted(*PYTEST, *tritons.FIRST_STAGE)


@pytest.mark.ahead(command=first_stage)
def test_first_stage_through_the_interpreter() -> None:
    done = ahead.result(first_stage)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert not never_ran(done.stdout, "haar", first_stage=True)


# -- other Tritons: `make triton-parity` runs them, in CI too ----------------------------------


def test_a_triton_that_cannot_be_had_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tritons, "BUILD", tmp_path)
    monkeypatch.setattr(
        tritons, "INSTALL", [sys.executable, "-c", "import sys; sys.exit('ERROR: no index')"]
    )
    assert tritons.main(["9.9.9"]) == 0
    assert capsys.readouterr().out == (
        "triton-parity: NOT TESTED with Triton 9.9.9, which could not be fetched: ERROR: no index\n"
    )
    assert tritons.main(["9.9.9", "--fetch-only"]) == 1


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("kernels: one\nkernels: other\n", []),
        ("1 failed in 2s\n", ["1 failed in 2s"]),
        ("1 passed in 2s\nkernels: one\n", ["never ran: other"]),
    ],
)
def test_a_run_with_another_triton_fails_for_a_kernel_that_is_wrong_or_was_not_run(
    monkeypatch: pytest.MonkeyPatch, output: str, wrong: list[str]
) -> None:
    monkeypatch.setattr(tritons, "all_kernels", lambda: {"one", "other"})
    assert tritons.wrong_in(output, int("failed" in output)) == wrong


def test_every_operator_has_its_launchers_and_examples() -> None:
    found = {name for folder in FOLDERS for name in operators(folder)}
    assert found == {n for n, operator in OPERATORS.items() if "triton" in operator.backends}
    for folder in FOLDERS:
        module = importlib.import_module(f"fastfusion.ops.{folder}.kernels")
        assert module.EXAMPLES
        assert all(hasattr(module, f"{name}_backward") for name in operators(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_examples_reach_every_table_of_tiles(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no example launches would never be compiled by the tests."""
    from fastfusion.ops.triton import Table, recording

    reached: set[tuple[str, str]] = set()

    def watched(method: Any) -> Any:
        def call(table: Table, shape_class: str, architecture: str) -> Any:
            reached.add((table.name, shape_class))
            return method(table, shape_class, architecture)

        return call

    for name in ("tile", "all"):
        monkeypatch.setattr(Table, name, watched(getattr(Table, name)))
    module = importlib.import_module(f"fastfusion.ops.{folder}.kernels")
    with recording("sm_90"):
        for example in module.EXAMPLES.values():
            example()
    tables = [value for value in vars(module).values() if isinstance(value, Table)]
    assert tables
    assert {(table.name, key) for table in tables for key in table.tiles} <= reached


# Each architecture takes 100 s of a core: the others are for `make triton-gate`, beside the tests.
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
    table = Table("t", {"small": {"": one, "sm_90": other, "sm_100": one}})
    assert table.tile("small", "sm_90") is other
    assert table.tile("small", "sm_80") is one
    assert table.all("small", "sm_80") == table.all("small", "gfx942") == [one, other]


def test_what_amd_has_of_its_own_is_all_that_runs_there() -> None:
    from fastfusion.ops.triton import Table, Tile

    one, other = Tile({"BLOCK": 64}), Tile({"BLOCK": 64}, warps=2)
    table = Table("t", {"small": {"": one, "gfx942": other, "cpu": Tile({"BLOCK": 512})}})
    assert table.all("small", "sm_90") == [one]
    assert table.all("small", "gfx942") == [other]


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
