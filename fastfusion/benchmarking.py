"""Time the operators here: every backend against the definition, as rows anyone can read.

A row is one contestant on one piece of work. Contestants take turns, so that whatever else the
machine does falls on all of them alike; the median and the quartiles are kept. Rows have the layout
of pytest-benchmark's JSON, so its own tools (``pytest-benchmark compare``) read them too.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfusion import machine, ops
from fastfusion._version import __version__
from fastfusion.environment import backends
from fastfusion.ops.operator import OPERATORS, Operator

__all__ = ["OPERATIONS", "SHAPES", "Change", "compare", "measure", "take_turns"]

#: Without --shape: three sizes, for the curves.
SHAPES = ((1, 64, 64, 64), (1, 64, 128, 128), (1, 64, 256, 256))
#: What others are compared with: the definition in plain PyTorch, by the names that it has.
PLAIN = ("definition", "eager")
_ROUNDS = (5, 200)
# How often all the work is gone through, so that the quartiles hold what a machine does in minutes
# and not only in the second of one row. Once where each pass would have to compile again.
_PASSES = 3
# What a kernel may be off by beyond 1.5 times the definition in the same dtype, relative L2.
_BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}

Call = Callable[[], Any]
Make = Callable[[tuple[int, ...], Callable[..., Tensor]], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """How an operator is called for a shape ``(B, C, H, W)``: its arguments, and its call."""

    call: Callable[..., Any]
    make: Make
    note: str = ""


def latent(
    tokens: int = 8, basis: int = 24, patch: int | None = 4, *, squash: bool = True, note: str = ""
) -> Operation:
    """The latent operator, by default as LSO has it."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        channels = shape[1]
        heads = math.gcd(8, channels)
        weights = [draw(channels, channels) / channels**0.5 for _ in range(3)]
        biases = [draw(channels) for _ in range(3)]
        key, value, query = zip(weights, biases, strict=True)
        series = [draw(channels, basis) / basis for _ in range(2)]
        prompts = draw(heads, tokens, channels // heads)
        return draw(*shape), prompts, *key, *value, *query, *series

    fundamental = math.pi if squash else math.pi / basis
    call = _bound(ops.latent_operator, patch_size=patch, squash=squash, fundamental=fundamental)
    return Operation(call, make, note)


def frequency_filter(mode: str) -> Operation:
    """FSRVL's filter, 7x7, with its batch norm in the evaluation form."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        c = shape[1]
        mixing, kernel = draw(2, c, c) / c**0.5, draw(2, c, 7, 7) / 7
        return draw(*shape), mixing, kernel, draw(2, c), draw(2, c)

    def call(x: Tensor, mixing: Tensor, kernel: Tensor, gain: Tensor, bias: Tensor, *,
             backend: str) -> Tensor:  # fmt: skip
        return ops.frequency_filter2d(
            x, mixing, kernel, gain=gain, bias=bias, padding_mode=mode, backend=backend
        )

    return Operation(call, make, f"7x7, {mode}")


def depthwise(size: int, dilation: int = 1) -> Operation:
    """A depthwise convolution with its bias."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        c = shape[1]
        return draw(*shape), draw(c, 1, size, size) / size, draw(c)

    note = f"{size}x{size}" + (f", dilation {dilation}" if dilation > 1 else "")
    return Operation(_bound(ops.depthwise_conv2d, dilation=dilation), make, note)


def large_attention() -> Operation:
    """VAN's large-kernel attention."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        c = shape[1]
        local, context, mix = draw(c, 1, 5, 5) / 5, draw(c, 1, 7, 7) / 7, draw(c, c) / c**0.5
        return draw(*shape), local, draw(c), context, draw(c), mix, draw(c)

    return Operation(ops.large_kernel_attention, make, "5x5, 7x7 dilated by 3, 1x1")


def multiscale() -> Operation:
    """CoFusion's attention over the scales."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        c = shape[1]
        return draw(*shape), draw(c, 1, 3, 3) / 3, draw(c, 1, 5, 5) / 5, draw(c), draw(c)

    def call(x: Tensor, *filters: Tensor, backend: str) -> Tensor:
        return ops.multiscale_attention(x, list(filters[:2]), list(filters[2:]), backend=backend)

    return Operation(call, make, "3x3 and 5x5")


def haar(name: str) -> Operation:
    """A Haar transform by its name."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        batch, channels, rows, columns = shape
        if name != "haar_idwt2d":
            return (draw(*shape),)
        return tuple(draw(batch, channels, -(-rows // 2), -(-columns // 2)) for _ in range(4))

    return Operation(getattr(ops, name), make)


def mixing() -> Operation:
    """SpeCAM's coordinate mixing of C coordinates, of which it keeps a quarter."""

    def make(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        batch, channels = shape[:2]
        return draw(batch, channels, channels).relu(), draw(batch, channels)

    def call(candidates: Tensor, state: Tensor, *, backend: str) -> Tensor:
        k = max(1, candidates.shape[2] // 4)
        return ops.coordinate_mixing(candidates, state, k=k, backend=backend)

    return Operation(call, make, "C/4 of C")


def _bound(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *args, backend: function(*args, **options, backend=backend)


#: What can be timed, by name.
OPERATIONS: dict[str, Operation] = {
    "latent_operator": latent(note="4x4 patches, 8 tokens, 24 terms"),
    "frequency_filter2d": frequency_filter("zeros"),
    "frequency_filter2d_circular": frequency_filter("circular"),
    **{name: haar(name) for name in ("haar_dwt2d", "haar_idwt2d", "haar_split2d")},
    "coordinate_mixing": mixing(),
    "depthwise_conv2d": depthwise(7),
    "depthwise_conv2d_dilated": depthwise(7, 3),
    "large_kernel_attention": large_attention(),
    "multiscale_attention": multiscale(),
}


#: What each of them does, for a reader who has never seen it.
ABOUT: dict[str, str] = {
    "latent_operator": "LSO's and LSM's layer: from the pixels of a patch to a few tokens by "
    "attention, a trigonometric series on these, and back",
    "frequency_filter2d": "FSRVL's layer: Fourier transform, mixing of the channels, a filter over "
    "the frequencies, and back",
    "frequency_filter2d_circular": "FSRVL's layer, periodic over the frequencies: computed without "
    "any transform",
    "haar_dwt2d": "Haar wavelet transform, one level",
    "haar_idwt2d": "inverse Haar wavelet transform, one level",
    "haar_split2d": "an image cut into its low and its high part by the Haar transform",
    "coordinate_mixing": "CoFusion's: the most salient columns of a matrix, swept from left to "
    "right into a state",
    "depthwise_conv2d": "convolution of each channel with its own filter",
    "depthwise_conv2d_dilated": "convolution of each channel with its own filter, with gaps "
    "between its taps",
    "large_kernel_attention": "VAN's: an image weighted by two depthwise convolutions and a 1x1",
    "multiscale_attention": "CoFusion's: filters of several sizes, weighted pixel by pixel",
}


class _Caught(Exception):
    """Carries an op and its arguments out of the public function that called it."""


class _Catch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastfusion":
            raise _Caught(OPERATORS[func._opname], list(args[:-1]))
        return func(*args, **(kwargs or {}))


def op_called(call: Callable[[], Any]) -> tuple[Operator, list[Any]]:
    """The first op of this library that ``call`` would run, and its arguments but the backend.

    >>> operator, (x,) = op_called(lambda: ops.haar_split2d(torch.ones(1, 1, 2, 2)))
    >>> operator.name, x.shape
    ('haar_split2d', torch.Size([1, 1, 2, 2]))
    """
    try:
        with torch.no_grad(), _Catch():
            call()
    except _Caught as caught:
        operator, arguments = caught.args
        return operator, arguments
    raise AssertionError("no op of this library was called")


def costs(operator: Operator, arguments: Sequence[Any], backward: bool = False) -> tuple[int, int]:
    """Bytes if each input is read once and each output written once, and FLOPs by formula.

    With ``backward`` its own too: it reads the inputs and the gradients of the outputs, and writes
    those of the inputs. Meta tensors will do.

    >>> costs(*op_called(lambda: ops.haar_split2d(torch.empty(1, 1, 8, 8))))
    (768, 128)
    """

    def size(tensors: Sequence[Any]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    arguments = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    outputs = operator.op(*arguments, "auto")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in arguments]
    moved, flops = size(arguments) + size(outputs), operator.flops(*shapes)
    if backward:
        moved += 2 * size(arguments) + size(outputs)
        wanted = {operator.argument_names[i] for i in operator.tensors}
        flops += operator.backward_flops(*shapes, wanted=wanted)
    return moved, int(flops)


def measure(
    operations: Sequence[str],
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    contestants: Sequence[str] = ("auto",),
    compiled: bool = False,
    backward: bool = False,
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda work: None,
) -> dict[str, Any]:
    """Time operators and give the rows.

    Args:
        operations: names of `OPERATIONS`.
        shapes: ``(B, C, H, W)`` each.
        dtype, device: of all tensors.
        contestants: backends; the definition in plain PyTorch always takes part.
        compiled: let ``torch.compile`` of the definition take part too (seconds to minutes each).
        backward: time forward and backward together.
        seconds: for each piece of work, about.
        progress: told the name of each piece of work before it begins.

    Returns:
        pytest-benchmark's JSON: ``machine_info``, ``benchmarks`` and so on.

    Raises:
        ValueError: an operation, a shape or a backend is not known, or a backend cannot run here.

    >>> rows = measure(["haar_split2d"], [(1, 4, 8, 8)], seconds=0.01)
    >>> [row["extra_info"]["contestant"] for row in rows["benchmarks"]]
    ['auto', 'definition']
    """
    for name in operations:
        if name not in OPERATIONS:
            raise ValueError(f"op: expected one of {', '.join(OPERATIONS)}, got {name!r}")
    for shape in shapes:
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape: expected BxCxHxW, each at least 1, got {shape}")
    here = backends()
    for contestant in contestants:
        if contestant != "auto" and here.get(contestant) != "available":
            reason = here.get(contestant, f"expected one of auto, {', '.join(here)}")
            raise ValueError(f"backend {contestant!r} cannot be timed here: {reason}")
    names = list(dict.fromkeys([*contestants, "definition", *["compiled"] * compiled]))
    limits = machine.limits(device)
    works = [(name, shape) for name in operations for shape in shapes]
    passes = 1 if compiled else _PASSES
    samples: dict[tuple[str, tuple[int, ...]], dict[str, list[float]]] = {}
    facts = {}
    for turn in range(passes):
        for work in works:
            name, shape = work
            number = f", {turn + 1} of {passes}" if passes > 1 else ""
            progress(f"{name} {'x'.join(map(str, shape))}{number}")
            calls, facts[work] = _prepared(
                name, shape, names, dtype, device, backward, check=turn == 0
            )
            for contestant, found in take_turns(calls, seconds / passes, device).items():
                samples.setdefault(work, {}).setdefault(contestant, []).extend(found)
    rows = [
        row
        for work in works
        for row in _rows(*work, samples[work], facts[work], dtype, device, backward, limits)
    ]
    return {
        "machine_info": {
            "node": "",
            "machine": platform.machine(),
            "system": platform.system(),
            "python_version": platform.python_version(),
            "cpu": {"brand_raw": machine.processor()},
        },
        "commit_info": {},
        "benchmarks": rows,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": __version__,
    }


def _prepared(
    name: str,
    shape: tuple[int, ...],
    contestants: Sequence[str],
    dtype: torch.dtype,
    device: str,
    backward: bool,
    *,
    check: bool,
) -> tuple[dict[str, Call], tuple[int, int]]:
    """The contestants' calls on fresh inputs, checked if so wished; bytes and FLOPs of the work."""
    operation = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

    arguments = operation.make(shape, draw)
    operator, inputs = op_called(lambda: operation.call(*arguments, backend="auto"))
    for contestant in contestants if check else ():
        _check(name, operation, arguments, contestant)
    calls = _calls(operation, arguments, operator.reference, inputs, contestants, backward)
    return calls, costs(operator, inputs, backward)


def _rows(
    name: str,
    shape: tuple[int, ...],
    samples: dict[str, list[float]],
    facts: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    backward: bool,
    limits: machine.Limits,
) -> list[dict[str, Any]]:
    moved, flops = facts
    kind = str(dtype).removeprefix("torch.")
    size = "x".join(map(str, shape))
    title = f"{name}{' forward + backward' if backward else ''}"
    return [
        {
            "group": f"{title} {size} {kind}",
            "name": f"{name}[{size}-{kind}-{contestant}]",
            "fullname": f"{name}[{size}-{kind}-{contestant}]",
            "params": {"operation": title, "shape": size, "dtype": kind, "device": device},
            "extra_info": {
                "contestant": contestant,
                "note": OPERATIONS[name].note,
                "pixels": shape[0] * shape[2] * shape[3],
                "moved": moved,
                "flops": flops,
                "floor": limits.floor(moved, flops),
                "bandwidth": limits.bandwidth,
                "matrix_rate": limits.matrix_rate,
                **machine.describe(),
            },
            "stats": _statistics(found),
        }
        for contestant, found in samples.items()
    ]


def _calls(
    operation: Operation,
    tensors: tuple[Tensor, ...],
    definition: Callable[..., Any],
    arguments: Sequence[Any],
    contestants: Sequence[str],
    backward: bool,
) -> dict[str, Call]:
    """Each contestant's call: the public function, or the definition on the op's arguments."""

    def step(function: Callable[..., Any], inputs: Sequence[Any]) -> Call:
        if not backward:
            return torch.no_grad()(lambda: function(*inputs))
        inputs = [
            value.detach().requires_grad_() if isinstance(value, Tensor) else value
            for value in inputs
        ]
        wanted = [value for value in inputs if isinstance(value, Tensor)]

        def run() -> Any:
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

        return run

    calls = {}
    for contestant in contestants:
        if contestant == "definition":
            calls[contestant] = step(definition, arguments)
        elif contestant == "compiled":
            torch._dynamo.reset()
            calls[contestant] = step(torch.compile(definition), arguments)
        else:
            calls[contestant] = step(functools.partial(operation.call, backend=contestant), tensors)
    return calls


def _check(name: str, operation: Operation, tensors: tuple[Tensor, ...], contestant: str) -> None:
    """No figure for a kernel whose result is not the definition's in float64."""
    if contestant in ("definition", "compiled"):
        return
    with torch.no_grad():
        found = operation.call(*tensors, backend=contestant)
        plain = operation.call(*tensors, backend="reference")
        truth = operation.call(*(t.double() for t in tensors), backend="reference")
    triples = zip(
        *(y if isinstance(y, tuple) else (y,) for y in (found, plain, truth)), strict=True
    )
    for result, definition, exact in triples:
        scale = exact.norm().clamp(min=1e-30)
        error, allowed = ((y.double() - exact).norm() / scale for y in (result, definition))
        if not error <= 1.5 * allowed + _BOUND.get(result.dtype, 0.0):
            raise RuntimeError(
                f"no figure for {name}: backend {contestant!r} is off by {error:.1e} (relative L2)"
            )


def take_turns(
    calls: dict[str, Call], seconds: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each round of each call, the calls taking turns for about so many seconds.

    >>> len(take_turns({"sum": lambda: sum(range(1000))}, 0.01)["sum"]) >= 5
    True
    """
    clock = machine.clock(device)
    first = {}
    for name, call in calls.items():
        call()  # compiles, fills caches
        first[name] = clock(call, 1)
    rounds = min(max(int(seconds / sum(first.values())), _ROUNDS[0]), _ROUNDS[1])
    # A round long enough for the clock: several calls where one takes under 0.2 ms.
    loops = {name: max(1, int(2e-4 / once)) for name, once in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(clock(call, loops[name]) / loops[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def _statistics(samples: list[float]) -> dict[str, float | int]:
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "min": min(samples),
        "max": max(samples),
        "mean": statistics.fmean(samples),
        "stddev": statistics.stdev(samples),
        "median": median,
        "q1": q1,
        "q3": q3,
        "iqr": q3 - q1,
        "rounds": len(samples),
        "iterations": 1,
    }


@dataclasses.dataclass(frozen=True)
class Change:
    """A row in two runs: how many times faster it got, and whether that is beyond the noise.

    ``control`` is the same ratio of the definition in plain PyTorch on the same work, where both
    runs have it: what the machine, or PyTorch, was faster by.
    """

    name: str
    ratio: float
    beyond_noise: bool
    control: float | None = None

    def __str__(self) -> str:
        if self.beyond_noise:
            return _faster(self.ratio)
        if self.control is not None and abs(math.log(self.ratio)) > 0.05:
            return f"within the noise ({self.ratio:.2f}; the definition {self.control:.2f})"
        return f"within the noise ({self.ratio:.2f})"


def _faster(ratio: float) -> str:
    return f"{ratio:.2f} times faster" if ratio > 1 else f"{1 / ratio:.2f} times slower"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The rows that two runs share, by name.

    A change is beyond the noise where the quartiles of the two runs do not overlap, neither as they
    are nor divided by the median of the definition in the same run: a machine that was busy in one
    of them slows everybody down, and is no change of a kernel.

    >>> def run(median, definition):
    ...     def row(who, x):
    ...         stats = {"median": x, "q1": 0.9 * x, "q3": 1.1 * x}
    ...         extra = {"contestant": who}
    ...         return {"name": who, "group": "work", "stats": stats, "extra_info": extra}
    ...     return {"benchmarks": [row("auto", median), row("definition", definition)]}
    >>> print(*compare(run(3.0, 9.0), run(1.5, 9.0)), sep="; ")
    2.00 times faster; within the noise (1.00)
    >>> print(compare(run(3.0, 9.0), run(1.5, 4.5))[0])  # everybody is twice as fast
    within the noise (2.00; the definition 2.00)
    """
    old = {row["name"]: row["stats"] for row in before["benchmarks"]}
    controls = [_controls(run) for run in (before, after)]
    changes = []
    for row in after["benchmarks"]:
        if row["name"] not in old:
            continue
        a, b = old[row["name"]], row["stats"]
        scales: list[tuple[float, float]] = [(1.0, 1.0)]
        control = None
        if _contestant(row) not in PLAIN and all(row.get("group") in found for found in controls):
            scales.append((controls[0][row["group"]], controls[1][row["group"]]))
            control = scales[1][0] / scales[1][1]
        directions = {_apart(a, b, *scale) for scale in scales}
        beyond = len(directions) == 1 and 0 not in directions
        changes.append(Change(row["name"], a["median"] / b["median"], beyond, control))
    return changes


def _contestant(row: dict[str, Any]) -> str:
    return str(row.get("extra_info", {}).get("contestant", ""))


def _controls(run: dict[str, Any]) -> dict[str, float]:
    """The median of the definition for each piece of work."""
    return {
        row["group"]: row["stats"]["median"]
        for row in run["benchmarks"]
        if "group" in row and _contestant(row) in PLAIN
    }


def _apart(before: dict[str, float], after: dict[str, float], one: float, other: float) -> int:
    """1 where the quartiles say faster, -1 slower, 0 where they overlap, each in its own unit."""
    if before["q1"] / one > after["q3"] / other:
        return 1
    return -1 if after["q1"] / other > before["q3"] / one else 0
