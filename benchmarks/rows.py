"""What a row of the tables is, and how its contestants are timed: interleaved, in one process."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfusion import benchmarking, machine
from fastfusion.ops.operator import Operator

machine.keep_freed_memory()  # else large rows time the system's fresh pages

ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_ROW = float(os.environ.get("FASTFUSION_BENCH_SECONDS", "4"))
OURS = "fastfusion"

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: a piece of work and everyone who can do it.

    Args:
        work: what is done, as the table says it.
        operators: whose parity tests must be green before a figure is given.
        contestants: by name, a function that prepares inputs and gives the call to be timed. The
            first is "fastfusion"; "eager" and "compiled" are the reference as it is and through
            ``torch.compile``; others are what a user would install instead.
        moved: bytes if each input is read once and each output written once.
        flops: 2 a multiply-add.
        target: the ratios of TARGETS, by contestant, and "share" of the floor.
        series: for a row that shows how the time grows: what grows, and an image's side.
    """

    work: str
    operators: tuple[str, ...]
    contestants: dict[str, Callable[[], Call]]
    moved: float
    flops: float
    target: dict[str, float] = dataclasses.field(default_factory=dict)
    series: tuple[str, int] | None = None

    def __str__(self) -> str:
        return self.work


def against_reference(
    ours: Callable[..., Any], reference: Callable[..., Any], make: Callable[[], tuple[Any, ...]]
) -> dict[str, Callable[[], Call]]:
    """The usual three: ours, the reference eager, the reference compiled, on fresh inputs."""

    def prepared(function: Callable[..., Any]) -> Callable[[], Call]:
        def prepare() -> Call:
            args = make()
            return lambda: function(*args)

        return prepare

    def compiled() -> Call:
        torch._dynamo.reset()
        function = torch.compile(reference)
        args = make()
        return lambda: function(*args)

    return {OURS: prepared(ours), "eager": prepared(reference), "compiled": compiled}


def of_operation(
    work: str,
    operation: benchmarking.Operation,
    shape: tuple[int, ...],
    target: dict[str, float],
    *,
    train: bool = False,
    moved: float | None = None,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> Row:
    """The row of an operation that `fastfusion bench` times too: the usual three on fresh inputs.

    ``moved`` replaces the bytes of the inputs and outputs where the definition cannot do with them;
    ``layout`` is that of the image.
    """

    def tensors(device: str = "cpu") -> list[torch.Tensor]:
        image, *others = operation.make(
            shape, lambda *size: torch.randn(size, device=device).to(dtype)
        )
        if image.dim() == 4:
            image = image.contiguous(memory_format=layout)
        return [value.detach().requires_grad_(train) for value in (image, *others)]

    def called(*values: torch.Tensor) -> tuple[Operator, list[Any]]:
        return benchmarking.op_called(lambda: operation.call(*values, backend="auto"))

    operator, arguments = called(*tensors("meta"))
    all_moved, _ = benchmarking.costs(operator, arguments, train)
    _, flops = benchmarking.costs(operator, arguments)
    ours: Callable[..., Any] = functools.partial(operation.call, backend="auto")

    theirs = operator.reference
    if train:
        ours, theirs = training_step(ours), training_step(theirs)
    fast = against_reference(ours, theirs, lambda: tuple(tensors()))
    plain = against_reference(ours, theirs, lambda: tuple(called(*tensors())[1]))
    return Row(
        work=work + (", forward and backward" if train else ""),
        operators=(operator.name,),
        contestants={**plain, OURS: fast[OURS]},
        moved=all_moved if moved is None else moved,
        flops=flops * (3 if train else 1),  # a product has two gradients of its own size
        target=target,
    )


def training_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward of the sum of squares, for tensors that want a gradient."""

    def step(*args: Any) -> None:
        outputs = function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

    return step


@functools.cache
def parity(operator: str) -> bool:
    """Whether the operator's parity tests pass here, for the backend that is timed."""
    command = [sys.executable, "-m", "pytest", "tests/ops/test_parity.py", "-q", "--tb=no"]
    command += ["-k", f"cpp and {operator}", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@functools.cache
def measure(row: Row) -> dict[str, list[float] | str]:
    """Seconds of each round of each contestant, the contestants taking turns.

    For a contestant that cannot be imported here, the reason.
    """
    with torch.no_grad() if "backward" not in row.work else torch.enable_grad():
        calls: dict[str, Call] = {}
        absent: dict[str, list[float] | str] = {}
        for name, prepare in row.contestants.items():
            try:
                calls[name] = prepare()
            except ImportError as error:
                absent[name] = f"{name} cannot be imported: {error}"
        samples = benchmarking.take_turns(calls, SECONDS_A_ROW)
    return {**samples, **absent}


def for_each(rows: Sequence[Row]) -> Callable[[Any], Any]:
    """Run a benchmark for every contestant of every row."""
    pairs = [(row, name) for row in rows for name in row.contestants]
    ids = [f"{row.work}-{name}" for row, name in pairs]
    return pytest.mark.parametrize(("row", "contestant"), pairs, ids=ids)


def record(benchmark: Any, row: Row, contestant: str) -> None:
    """Put one contestant's rounds into pytest-benchmark, with all that the tables need."""
    # pytest-benchmark times one function at a time; the rounds were measured in turns, and are
    # handed to it so that its JSON and its comparisons can carry them.
    for operator in row.operators:
        if not parity(operator):
            pytest.fail(f"no figure for {row.work}: the parity tests of {operator} are not green")
    samples = measure(row)[contestant]
    if isinstance(samples, str):
        pytest.skip(samples)
    benchmark.group = row.work
    stats = benchmark._make_stats(1)
    for seconds in samples:
        stats.update(seconds)
    limits = machine.limits()
    memory = None
    if contestant == OURS:
        memory = machine.peak_memory(row.contestants[OURS]())
    benchmark.extra_info.update(
        contestant=contestant,
        moved=row.moved,
        flops=row.flops,
        floor=limits.floor(row.moved, row.flops),
        bandwidth=limits.bandwidth,
        matrix_rate=limits.matrix_rate,
        peak_memory=memory,
        target=row.target,
        series=row.series,
        **machine.describe(),
    )
