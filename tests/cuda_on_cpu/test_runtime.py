"""The host runtime itself: what it computes, and that it finds planted faults."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu import library

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))


def compiled(folder: Path, *flags: str) -> Path:
    program = folder / "programs"
    compiler = library.build_script().find_compiler()
    sources = [str(HERE / "programs.cpp"), str(HERE / "runtime.cpp")]
    options = ["-std=c++20", "-O1", "-g", "-Wno-unknown-pragmas", f"-I{HERE}", *flags]
    done = subprocess.run(
        [*compiler, *options, *sources, "-o", str(program)], capture_output=True, text=True
    )
    if done.returncode != 0 and "cannot find" in done.stderr:
        pytest.skip("this compiler has no address sanitizer")
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return compiled(tmp_path_factory.mktemp("sanitized"), *flags)


def told(program: Path, name: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_ON_CPU_ORDER": order}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run([str(program), name], env=environment, capture_output=True, text=True)


def values(program: Path, name: str, order: str = "forward") -> list[float]:
    done = told(program, name, order)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(word) for word in done.stdout.split()]


ORDERS = ("forward", "reverse", "random")


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_shared_memory_and_blocks(plain: Path, order: str) -> None:
    assert values(plain, "turn", order) == [*range(63, -1, -1), *range(127, 63, -1)]


def test_a_race_on_shared_memory_shows_in_the_order(plain: Path) -> None:
    found = [values(plain, "race", order) for order in ("forward", "reverse")]
    assert str(found[0]) != str(found[1])  # as text: NaN where nothing was written yet


@pytest.mark.parametrize("order", ORDERS)
def test_asynchronous_copies(plain: Path, order: str) -> None:
    turned = values(plain, "copied", order)
    cut = [0, 0, 0]
    assert turned == [*cut, *range(60, -1, -1), *cut, *range(124, 63, -1)]


def test_a_copy_that_was_not_waited_for_is_poison(plain: Path) -> None:
    assert all(math.isnan(value) for value in values(plain, "copied too late"))


def test_a_copy_without_a_barrier_shows_in_the_order(plain: Path) -> None:
    found = [values(plain, "copied, no barrier", order) for order in ("forward", "reverse")]
    assert str(found[0]) != str(found[1])


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_over_a_block_of_two_dimensions(plain: Path, order: str) -> None:
    expected = [
        max(lane - 1, 0) + 100 * (lane + 2 if lane < 30 else lane) + 30000 + 0.75
        for lane in [*range(32)] * 2
    ]
    assert values(plain, "exchange", order)[:64] == pytest.approx(expected, abs=0.01)


def test_shared_memory_is_poisoned(plain: Path) -> None:
    assert all(math.isnan(value) for value in values(plain, "unwritten")[:64])


def test_atomics_vectors_and_rounding(plain: Path) -> None:
    assert values(plain, "count") == [21]
    assert values(plain, "fours")[:33] == [*range(0, 64, 2), 0]
    half_and_bfloat = [1, 1, 1, 1, math.inf, 65536, 3.14062, 3.14062]
    assert values(plain, "rounded") == pytest.approx(half_and_bfloat, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond shared", "beyond its shared memory"),
        ("half wait", "barrier that others never reach"),
        ("too large", "not launched"),
        ("never waits", "ended before its copies arrived"),
        ("copies elsewhere", "not shared memory"),
        ("copies misaligned", "misaligned addresses"),
    ],
)
def test_faults_are_told(plain: Path, name: str, message: str) -> None:
    assert message in told(plain, name).stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond shared", "heap-buffer-overflow"),
        ("beyond output", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
        ("copies beyond", "heap-buffer-overflow"),
        ("copies nothing", ""),
        ("copied", ""),
        ("turn", ""),
        ("exchange", ""),
    ],
)
def test_the_sanitizers_find_planted_faults(sanitized: Path, name: str, message: str) -> None:
    done = told(sanitized, name)
    assert message in done.stderr
    assert (done.returncode == 0) == (message == ""), done.stderr
