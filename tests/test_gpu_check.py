"""The logic of the GPU check, on the CPU: time, rows, table, JSON, a part that fails."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_check import Part
from benchmarks.works import WORKS, Work
from fastfusion.benchmarking import depthwise
from fastfusion.ops.operator import OPERATORS
from tests.ops.cases import CASES, FIRST

CASE = next(case for case in FIRST if case.operator == "haar_split2d")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- time --------------------------------------------------------------------------------------


def test_each_part_gets_its_share_of_what_is_left() -> None:
    clock, shares = Clock(), {}

    def work(part: Part, seconds: float) -> list[Any]:
        shares[part.name] = seconds
        clock.now += {"a": 1.0, "b": 5.0, "c": 2.0}[part.name]
        return [{"part": part.name, "what": "x", "ok": True}]

    parts = [Part("a", 2), Part("b", 1), Part("c", 1)]
    rows = gpu_check.run(parts, work, 10.0, clock)
    assert shares == {"a": 5.0, "b": 4.5, "c": 4.0}  # what a leaves over goes to b and c
    assert [row["ok"] for row in rows] == [True] * 3


def test_a_part_that_fails_does_not_end_the_others() -> None:
    seen: list[int] = []

    def work(part: Part, seconds: float) -> list[Any]:
        if part.name == "a":
            raise RuntimeError("the device is gone")
        return [{"part": part.name, "what": "x", "ok": True}]

    rows = gpu_check.run(
        [Part("a", 1), Part("b", 1)], work, 10.0, Clock(), done=lambda r: seen.append(len(r))
    )
    assert rows[0]["ok"] is False
    assert rows[0]["detail"] == "RuntimeError: the device is gone"
    assert rows[1]["ok"] is True
    assert seen == [1, 2]  # what is there is kept after each part


def test_nothing_starts_when_the_time_is_over() -> None:
    clock = Clock()

    def work(part: Part, seconds: float) -> list[Any]:
        clock.now += 20.0
        return []

    rows = gpu_check.run([Part("a", 1), Part("b", 1)], work, 10.0, clock)
    assert [(row["part"], row["ok"]) for row in rows] == [("b", None)]


def test_the_whole_fits_in_eight_minutes() -> None:
    ends = gpu_check.BUDGET + gpu_check.GRACE * len(gpu_check.PARTS)
    assert ends <= 480
    assert {part.name for part in gpu_check.PARTS} <= set(gpu_parts.PARTS)


def test_processes_give_rows_and_say_how_they_died(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(gpu_check.ROOT))
    rows = gpu_check.in_processes(Part("no such part", 1), 3600.0, tmp_path)
    assert [row["ok"] for row in rows] == [False]
    assert "exit status 1: KeyError" in rows[0]["detail"]
    monkeypatch.setattr(gpu_check, "GRACE", 0.0)
    rows = gpu_check.in_processes(Part("determinism", 1, processes=2), 0.0, tmp_path)
    assert [row["ok"] for row in rows] == [None, None]
    assert "its time was over" in rows[0]["detail"]


# -- rows --------------------------------------------------------------------------------------


def test_a_check_that_fails_does_not_end_the_others() -> None:
    def wrong() -> None:
        raise AssertionError("output 0: too far\nmore")

    def missing() -> None:
        raise gpu_parts.NotHere("no such tool")

    items = [
        ("good", lambda: None),
        ("wrong", wrong),
        ("missing", missing),
        ("timed", lambda: {"seconds": {"fastfusion": [1, 2, 3]}}),
        {"what": "row", "ok": True},
    ]
    rows = list(gpu_parts.carry_out("p", iter(items), 10.0, 0, 1, Clock()))
    assert [row["ok"] for row in rows] == [True, False, None, True, True]
    assert rows[1]["detail"] == "AssertionError: output 0: too far"
    assert rows[2]["detail"] == "no such tool"
    assert rows[3]["seconds"] == {"fastfusion": [1, 2, 3]}


def test_checks_are_shared_among_processes_and_stop_in_time() -> None:
    clock, run = Clock(), []

    def check(index: int) -> Any:
        def body() -> None:
            run.append(index)
            clock.now += 4.0

        return str(index), body

    rows = list(gpu_parts.carry_out("p", (check(i) for i in range(10)), 10.0, 1, 2, clock))
    assert run == [1, 3, 5]
    assert [row["ok"] for row in rows] == [True, True, True, None, None]


@pytest.mark.parametrize("operator", sorted({case.operator for case in CASES}))
def test_parity_opcheck_and_determinism_on_the_cpu(operator: str) -> None:
    case = min((c for c in CASES if c.operator == operator), key=lambda case: case.elements)
    gpu_parts.parity(case, "reference", torch.float32, "cpu", False)
    gpu_parts.parity(case, "reference", torch.bfloat16, "cpu", True)
    gpu_parts.determinism(case, "cpu")


def test_opcheck_of_a_forward_and_a_backward_op() -> None:
    gpu_parts.opcheck(CASE, False, "cpu")
    gpu_parts.opcheck(CASE, True, "cpu")


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    # The check is tested here, not Inductor, which would call a C++ compiler for seconds.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    gpu_parts.compiled(CASE, "cpu")


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["haar_split2d"]
    monkeypatch.setitem(operator.backends, "triton", operator.backends["reference"])
    gpu_parts.parity(CASE, "triton", torch.float32, "cpu", False)
    right = operator.backends["reference"].forward
    operator.add_backend(
        "triton",
        forward=lambda x: (right(x)[0] * 1.0001, right(x)[1]),
        backward=operator.backends["reference"].backward,
        why_not=lambda *args: None,
    )
    with pytest.raises(AssertionError, match="output 0: relative L2 error"):
        gpu_parts.parity(CASE, "triton", torch.float32, "cpu", False)


def test_a_backend_that_cannot_run_is_no_error() -> None:
    with pytest.raises(gpu_parts.NotHere, match="on an NVIDIA GPU"):
        gpu_parts.parity(CASE, "cuda", torch.float32, "cpu", False)


# -- times -------------------------------------------------------------------------------------


def test_contestants_take_turns_on_fresh_inputs() -> None:
    log: list[Any] = []

    def contestant(name: str) -> Any:
        return lambda index: log.append((name, index))

    spent = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0])

    def timer(calls: Any, host: float) -> Any:
        for call in calls:
            call()
        seconds = next(spent)
        return lambda: seconds

    times = gpu_parts.measure(
        {"a": contestant("a"), "b": contestant("b")}, 2, timer, rounds=3, loops=2
    )
    assert times["a"][1] == 2.0
    assert times["b"][1] == 20.0
    timed = log[-12:]
    assert [name for name, _ in timed] == ["a", "a", "b", "b"] * 3
    assert [index for _, index in timed[:6]] == [0, 1, 0, 1, 1, 0]


def test_the_device_timer_waits_for_nothing_between_the_calls(monkeypatch: Any) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))
    seconds = gpu_parts.DeviceTimer()([lambda: log.append("call")] * 3, 1e-3)
    assert log == ["busy", "record", "call", "call", "call", "record"]
    assert seconds() == pytest.approx(2e-3)
    assert log[-1] == "wait"


def test_inputs_do_not_fit_in_the_cache() -> None:
    assert gpu_parts.input_sets(16 << 20) == 8
    assert gpu_parts.input_sets(1 << 30) == 1
    assert gpu_parts.input_sets(0) == 8


def test_contestants_compute_the_same() -> None:
    size = (1, 4, 8, 8)
    for backward in (False, True):
        work = Work(depthwise(3, 2), "3x3", size, backward=backward)
        calls = gpu_parts.contestants(work, [work.arguments("cpu", torch.float32)], False)
        assert set(calls) == {"fastfusion", "eager", "cuDNN"}
        results = [call(0) for call in calls.values()]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])
    assert gpu_parts.chosen_backend(work, work.arguments("cpu", torch.float32)) in (
        "cpp",
        "reference",
    )


# -- bytes and FLOPs ---------------------------------------------------------------------------


def test_costs_by_hand() -> None:
    size = (2, 4, 8, 8)
    work = Work(depthwise(5), "", size)
    image, parameters = 2 * 4 * 64, 4 * 25 + 4
    assert work.costs(torch.float32) == (4 * (2 * image + parameters), 2 * image * 25)
    both = Work(depthwise(5), "", size, backward=True)
    moved, flops = both.costs(torch.bfloat16)
    assert moved == 2 * (2 * image + parameters) + 2 * (3 * image + 2 * parameters)
    assert flops == 3 * 2 * image * 25


def test_every_piece_of_work_has_costs() -> None:
    names = [str(work) for work in WORKS]
    assert len(set(names)) == len(names)
    for work in WORKS:
        moved, flops = work.costs(torch.bfloat16)
        assert moved > 0
        assert flops > 0


def test_every_operator_with_triton_kernels_has_its_floors() -> None:
    wanted = {name for name, operator in OPERATORS.items() if "triton" in operator.backends}
    for backward in (False, True):
        assert {w.definition.name for w in WORKS if w.backward == backward} == wanted


# -- the page and the command ------------------------------------------------------------------


ROWS = [
    {
        "part": "environment",
        "what": "environment",
        "ok": True,
        "facts": {"GPU": "Card", "torch": "2.0"},
    },
    {"part": "parity", "what": "triton haar", "ok": False, "detail": "output 0: too far"},
    {
        "part": "tables",
        "what": "limits",
        "ok": True,
        "card": "Card",
        "bandwidth": 1e12,
        "matrix_rate": 1e14,
    },
    {
        "part": "tables",
        "what": "work",
        "dtype": "float32",
        "ok": True,
        "seconds": {"fastfusion": [1e-5, 2e-5, 3e-5], "eager": [0, 3e-5, 0]},
        "moved": 1e7,
        "flops": 1e8,
        "backend": "triton",
    },
]


def test_the_table_says_ratio_floor_and_share() -> None:
    limits = gpu_check.limits_in(ROWS)
    assert limits is not None
    (line,) = gpu_check.measured_lines(ROWS, limits)[2:]
    assert line == "| work | float32 | 20 (triton) | eager 1.50 | 10 | 0.50 | 500 | 5 |"


def test_means_over_the_latest_rows_stand_beside_their_targets() -> None:
    limits = gpu_check.limits_in(ROWS)
    assert limits is not None
    again = {**ROWS[-1], "seconds": {"fastfusion": [0, 1e-5, 0], "eager": [0, 2e-5, 0]}}
    other = {**ROWS[-1], "what": "other", "seconds": {"fastfusion": [0, 1e-5, 0]}}
    assert gpu_check.mean_lines([*ROWS, again, other], limits) == [
        "- share of the floor: 1.00, geometric mean of 2 rows",
        "- times faster than eager: 2.00, geometric mean of 1 rows, target 15",
    ]


def test_a_choice_that_is_the_slower_one_is_told() -> None:
    assert gpu_check.choice_lines(ROWS)[0].startswith("Of 0 rows with both")
    faster = {**ROWS[-1]["seconds"], "backend cuda": [0, 1e-5, 0]}
    slower = {**ROWS[-1]["seconds"], "backend cuda": [0, 3e-5, 0]}
    rows = [{**ROWS[-1], "seconds": faster}, {**ROWS[-1], "what": "other", "seconds": slower}]
    head, _, line = gpu_check.choice_lines(rows)
    assert head.startswith('Of 2 rows with both GPU backends, "auto" took the slower one in 1 ')
    assert line == "- work, float32: cuda 2.00 times faster than triton"


def test_both_gpu_backends_are_timed(monkeypatch: Any) -> None:
    operator = OPERATORS["depthwise_conv2d"]
    monkeypatch.setattr(operator, "why_not", lambda name, *args: None)
    work = Work(depthwise(3, 2), "3x3", (1, 4, 8, 8))
    monkeypatch.setattr(gpu_parts, "chosen_backend", lambda work, args: "cuda")
    calls = gpu_parts.contestants(work, [work.arguments("cpu", torch.float32)], False)
    assert set(calls) == {"fastfusion", "eager", "cuDNN", "backend triton"}
    monkeypatch.setattr(gpu_parts, "chosen_backend", lambda work, args: "triton")
    calls = gpu_parts.contestants(work, [work.arguments("cpu", torch.float32)], False)
    assert set(calls) == {"fastfusion", "eager", "cuDNN", "backend cuda"}


def test_the_cuda_kernels_are_built_for_the_card(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check.os, "environ", {})
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_check.built(tmp_path, 60)["detail"] == "was there"  # or torch could not load it
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(gpu_check.native, "library_path", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    done: Any = subprocess.CompletedProcess([], 0, "", "")
    asked = []

    def run(command: Any, env: Any, **rest: Any) -> Any:
        asked.append((command[1:], env["TORCH_CUDA_ARCH_LIST"]))
        return done

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    row = gpu_check.built(tmp_path, 60)
    assert (row["ok"], row["detail"]) == (True, "built for 9.0")
    assert gpu_check.os.environ["FASTFUSION_LIBRARY_DIR"] == str(tmp_path)
    ((command, architecture),) = asked
    assert Path(command[0]).is_file() and command[1:] == ["--cuda", "--out", str(tmp_path)]
    assert architecture == "9.0"
    done = subprocess.CompletedProcess([], 1, "", "nvcc was not found\n")
    row = gpu_check.built(tmp_path, 60)
    assert (row["ok"], row["detail"]) == (None, "nvcc was not found")


def test_the_page_says_what_is_wrong_and_what_was_measured() -> None:
    text = gpu_check.page(ROWS)
    assert "GPU Card; torch 2.0." in text
    assert "- parity, triton haar: output 0: too far" in text
    assert "| parity | 0 | 1 | 0 |" in text
    assert "eager 1.50" in text
    assert "Nothing was measured" not in text


def test_the_page_in_the_repository_is_what_the_script_makes() -> None:
    kept = gpu_check.PAGE.read_text()
    floors = "## Floors on an"
    made = gpu_check.page(None)
    assert kept[kept.index(floors) :] == made[made.index(floors) :]
    if "Nothing was measured" in kept:
        assert kept == made


def test_without_a_gpu_one_line_and_no_file(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: "no GPU here")
    places = ["--page", str(tmp_path / "page.md"), "--json", str(tmp_path / "rows.json")]
    assert gpu_check.main(places) == 0
    assert capsys.readouterr().out == (
        "gpu-check: no GPU here; nothing was checked, nothing was measured\n"
    )
    assert not list(tmp_path.iterdir())


def test_with_a_gpu_json_page_and_the_table_last(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check.os, "environ", dict(os.environ))
    monkeypatch.setattr(
        gpu_check,
        "in_processes",
        lambda part, seconds, folder: [row for row in ROWS if row["part"] == part.name],
    )
    built = {"part": "build", "what": "_C_cuda", "ok": None, "detail": "no nvcc"}
    monkeypatch.setattr(gpu_check, "built", lambda folder, seconds: built)
    places = ["--page", str(tmp_path / "page.md"), "--json", str(tmp_path / "rows.json")]
    assert gpu_check.main(places) == 1  # a kernel is wrong
    assert json.loads((tmp_path / "rows.json").read_text()) == [built, *ROWS]
    assert (tmp_path / "page.md").read_text() == gpu_check.page([built, *ROWS])
    assert capsys.readouterr().out.splitlines()[-1].startswith("| work | float32 | 20 (triton)")
