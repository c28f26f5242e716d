"""The parts of the GPU check, each run in processes of its own by ``gpu_check.py``.

``python -m benchmarks.gpu_parts PART ROWS SECONDS SHARD SHARDS`` writes the rows of PART to the
file ROWS, one JSON a line, and stops before the row that would begin after SECONDS. With
FASTFUSION_GPU_CHECK_DEVICE=cpu the checks of the results run on the CPU: their tests do that.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import OTHER
from benchmarks.works import WORKS, Work
from fastfusion.benchmarking import op_called
from fastfusion.ops.operator import BACKENDS, OPERATORS
from tests.closeness import relative_error
from tests.ops.cases import CASES, FIRST, Case

Row = dict[str, Any]
#: A check: what is checked, and the function that does it. It returns a remark or raises.
Check = tuple[str, Callable[[], str | None]]

ROOT = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("FASTFUSION_GPU_CHECK_DEVICE", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NotHere(Exception):
    """What a check needs is not on this machine."""


# -- the results -------------------------------------------------------------------------------


def evaluate(
    case: Case, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of a fixed functional of them, by name, on the CPU."""
    inputs = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    outputs = case.outputs(inputs, backend)
    generator = torch.Generator().manual_seed(7)
    seeds = [
        torch.randn(y.shape, generator=generator).bfloat16().to(y.device, dtype) for y in outputs
    ]
    grads = torch.autograd.grad(outputs, list(inputs.values()), seeds, materialize_grads=True)
    found = {f"output {index}": y for index, y in enumerate(outputs)}
    found |= {f"gradient of {n}": g for n, g in zip(inputs, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in found.items()}


def on_device(
    case: Case, dtype: torch.dtype, device: str, channels_last: bool, seed: int = 0
) -> Any:
    """The case's tensors; images in channels_last where asked for."""
    tensors = {}
    for name, value in case.tensors(seed).items():
        value = value.to(device, dtype)
        if channels_last and name in case.images and value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        tensors[name] = value
    return tensors


def parity(case: Case, backend: str, dtype: torch.dtype, device: str, channels_last: bool) -> None:
    """A backend against the float64 reference on the CPU, by the bounds of the parity tests."""
    tensors = on_device(case, dtype, device, channels_last)
    _require(case, backend, tensors)
    truth = evaluate(
        case, {n: t.cpu().double() for n, t in tensors.items()}, "reference", torch.float64
    )
    found = evaluate(case, tensors, backend, dtype)
    plain = {}
    if dtype != torch.float32:
        plain = evaluate(case, {n: t.cpu() for n, t in tensors.items()}, "reference", dtype)
    for name, value in found.items():
        tensor = name.removeprefix("gradient of ")
        sister = case.scale_of.get(tensor)
        scale = truth[f"gradient of {sister}"].norm().item() if sister else None
        error = relative_error(value, truth[name], scale)
        if plain:
            rounding = torch.finfo(torch.float32).eps
            bound = max(1.5 * relative_error(plain[name], truth[name], scale), rounding)
        else:
            bound = case.bounds[name.startswith("gradient")]
        if not error <= bound:
            raise AssertionError(f"{name}: relative L2 error {error:.3g}, bound {bound:.3g}")


def parity_checks(device: str = DEVICE) -> Iterator[Check]:
    """Every backend that can run there, every case, float32 before the others."""
    for dtype, channels_last in [(d, last) for d in DTYPES for last in (False, True)]:
        for case in CASES:
            for backend in BACKENDS:
                place = "cpu" if backend == "cpp" else device
                if backend == "reference" and dtype != torch.float32:
                    continue
                if backend not in OPERATORS[case.operator].backends:
                    continue
                short = str(dtype).removeprefix("torch.")
                what = f"{backend} {case} {short}" + (" channels_last" if channels_last else "")
                yield what, functools.partial(parity, case, backend, dtype, place, channels_last)


def _require(case: Case, backend: str, tensors: dict[str, Tensor]) -> None:
    """Raise :class:`NotHere` where the backend cannot run this."""
    _, args = op_called(lambda: case.outputs(tensors, "auto"))
    reason = OPERATORS[case.operator].why_not(backend, *args)
    if reason is not None:
        raise NotHere(reason)


def _same(first: dict[str, Tensor], second: dict[str, Tensor], bound: float) -> None:
    for name, value in first.items():
        error = relative_error(second[name], value)
        if not error <= bound:
            raise AssertionError(f"{name}: relative L2 difference {error:.3g}, bound {bound:.3g}")


def _float32(case: Case, device: str, seed: int = 0) -> dict[str, Tensor]:
    return on_device(case, torch.float32, device, False, seed)


def opcheck(case: Case, backward: bool, device: str) -> None:
    """``torch.library.opcheck`` on the op or its backward op."""
    operator = OPERATORS[case.operator]
    tensors = _float32(case, device)
    _, args = op_called(lambda: case.outputs(tensors, "auto"))
    args = [a.clone() if isinstance(a, Tensor) else a for a in args]
    if backward:
        with torch.no_grad():
            outputs = operator.op(*args, "auto")
        grads = [
            torch.ones_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))
        ]
        mask = [isinstance(args[index], Tensor) for index in operator.tensors]
        torch.library.opcheck(operator.backward_op, (*grads, *args, mask, "auto"))
    else:
        args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(operator.op, (*args, "auto"))


def compiled(case: Case, device: str) -> None:
    """``torch.compile(fullgraph=True)``, forward and backward, against eager mode."""
    tensors = _float32(case, device)
    names = list(tensors)

    @torch.compile(fullgraph=True)
    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return case.outputs(dict(zip(names, values, strict=True)), "auto")

    twin = _Twin(case, lambda t, b: call(*t.values()))
    eager = evaluate(case, tensors, "auto", torch.float32)
    _same(eager, evaluate(twin, tensors, "auto", torch.float32), 1e-5)  # type: ignore[arg-type]


class _Twin:
    """A case with another way to get its outputs."""

    def __init__(self, case: Case, outputs: Callable[..., tuple[Tensor, ...]]) -> None:
        self.case, self.outputs = case, outputs


def graph(case: Case, device: str) -> None:
    """Captured in a CUDA graph, forward and backward, and replayed on other values."""
    static, fresh = _float32(case, device), _float32(case, device, seed=1)
    expected = evaluate(case, fresh, "auto", torch.float32)

    def step() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = case.outputs(static, "auto")
        grads = torch.autograd.grad(outputs, list(static.values()), seeds, materialize_grads=True)
        return outputs, grads

    static = {name: value.requires_grad_() for name, value in static.items()}
    generator = torch.Generator().manual_seed(7)
    shapes = [y.shape for y in case.outputs(static, "auto")]
    seeds = [torch.randn(s, generator=generator).bfloat16().float().to(device) for s in shapes]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        outputs, grads = step()
    with torch.no_grad():
        for name, value in static.items():
            value.copy_(fresh[name])
    recorded.replay()
    torch.cuda.synchronize()
    found = {f"output {index}": y.detach().cpu() for index, y in enumerate(outputs)}
    found |= {f"gradient of {n}": g.cpu() for n, g in zip(static, grads, strict=True)}
    _same(expected, found, 1e-6)


def determinism(case: Case, device: str) -> None:
    """Two runs with deterministic algorithms give the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        tensors = _float32(case, device)
        first = evaluate(case, tensors, "auto", torch.float32)
        second = evaluate(case, tensors, "auto", torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        if not torch.equal(value.nan_to_num(), second[name].nan_to_num()):
            raise AssertionError(f"{name} differs between two runs")


def checks_of_first(function: Callable[[Case, str], None]) -> Iterator[Check]:
    """A check of the first case of each operator."""
    for case in FIRST:
        yield str(case), functools.partial(function, case, DEVICE)


def opchecks() -> Iterator[Check]:
    for case in FIRST:
        for backward in (False, True):
            what = f"{case} {'backward' if backward else 'forward'}"
            yield what, functools.partial(opcheck, case, backward, DEVICE)


def sanitizer_checks() -> Iterator[Check]:
    """compute-sanitizer over the Triton kernels of the first cases, where the tool is there."""
    yield "memcheck", _memcheck


def _memcheck() -> str | None:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        raise NotHere("compute-sanitizer is not on this machine")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", "--print-limit", "5"]
    command += [
        sys.executable,
        "-m",
        "benchmarks.gpu_parts",
        "sanitized",
        os.devnull,
        "30",
        "0",
        "1",
    ]
    # Each allocation by itself: inside torch's large blocks no access is out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"exit status {done.returncode}: {done.stdout[-500:]}")
    return None


def sanitized_checks() -> Iterator[Check]:
    """What compute-sanitizer watches."""
    for case in FIRST:
        for backend in {"triton", "cuda"} & set(OPERATORS[case.operator].backends):
            yield f"{backend} {case}", functools.partial(_run_once, case, backend)


def _run_once(case: Case, backend: str) -> None:
    tensors = _float32(case, DEVICE)
    _require(case, backend, tensors)
    evaluate(case, tensors, backend, torch.float32)


# -- the times ---------------------------------------------------------------------------------


class DeviceTimer:
    """Seconds on the device of a few calls in a row.

    The host first hands the device something to do that outlasts the launches, so that all calls
    stand in the queue when the first begins and no time of the host is measured.
    """

    def __call__(self, calls: Sequence[Callable[[], Any]], host: float) -> Callable[[], float]:
        """Enqueue the calls, which take ``host`` seconds to launch; the result waits and reads."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e9 * (1.5 * host + 2e-5)))  # in cycles, of less than 2 GHz
        begin.record()
        for call in calls:
            call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / len(calls)

        return seconds


def measure(
    contestants: dict[str, Callable[[int], Any]],
    sets: int,
    timer: Callable[..., Callable[[], float]],
    *,
    rounds: int = 15,
    loops: int = 6,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, float, float]]:
    """Quartiles of the seconds a call, the contestants taking turns, the input sets as well."""
    host = {}
    for name, call in contestants.items():
        for _ in range(2):
            call(0)  # compiles
        wait()
        start = clock()
        for index in range(loops):
            call(index % sets)
        host[name] = clock() - start
        wait()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, call in contestants.items():
            calls = [functools.partial(call, (turn + index) % sets) for index in range(loops)]
            samples[name].append(timer(calls, host[name])())
    return {
        name: tuple(statistics.quantiles(values, n=4)) if len(values) > 1 else (values[0],) * 3
        for name, values in samples.items()
    }  # type: ignore[return-value]


def _step(function: Callable[..., Any], args: list[Any]) -> Any:
    """Forward and backward with respect to every tensor."""
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return torch.autograd.grad(outputs, wanted, outputs, materialize_grads=True)


def contestants(work: Work, sets: list[list[Any]], compile_too: bool) -> dict[str, Any]:
    """Ours, and what a user would run instead, each on one of the input sets."""
    operator = work.definition
    functions: dict[str, Callable[..., Any]] = {
        "fastfusion": lambda *args: operator.op(*args, "auto"),
        "eager": operator.reference,
    }
    if compile_too:
        functions["torch.compile max-autotune"] = torch.compile(
            operator.reference, mode="max-autotune"
        )
    if operator.name == "depthwise_conv2d":
        functions["cuDNN"] = _cudnn
    # The GPU backend that fastfusion/ops/choice.py does not take: whether it should is measured.
    for name in {"cuda", "triton"} & set(operator.backends) - {chosen_backend(work, sets[0])}:
        if operator.why_not(name, *sets[0]) is None:
            functions[OTHER + name] = functools.partial(_by_name, operator, name)

    def prepared(function: Callable[..., Any]) -> Callable[[int], Any]:
        if work.backward:
            return lambda index: _step(function, sets[index])
        return lambda index: function(*sets[index])

    return {name: prepared(function) for name, function in functions.items()}


def _by_name(operator: Any, backend: str, *args: Any) -> Any:
    return operator.op(*args, backend)


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, rows: int, columns: int, _: str) -> Tensor:
    padding = [d * (k // 2) for d, k in zip((rows, columns), weight.shape[-2:], strict=True)]
    return torch.nn.functional.conv2d(
        x, weight, bias, padding=padding, dilation=(rows, columns), groups=x.shape[1]
    )


def chosen_backend(work: Work, args: list[Any]) -> str:
    """The backend that "auto" takes."""
    operator = work.definition
    taken = operator.choose("auto", *args)
    return next(name for name, backend in operator.backends.items() if backend is taken)


def input_sets(moved: int) -> int:
    """As many sets of inputs as a cache of 64 MB cannot hold, at most 8."""
    return min(8, max(1, -(-(128 << 20) // max(moved, 1))))


def card_limits(device: str) -> tuple[float, float]:
    """Bytes a second of a large copy, bf16 FLOPs a second of a large product of random matrices."""
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = measure(
        {"copy": lambda _: target.copy_(source), "product": lambda _: a @ b},
        1,
        DeviceTimer(),
        wait=torch.cuda.synchronize,
    )
    return 2 * source.nbytes / times["copy"][1], 2 * 8192**3 / times["product"][1]


def tables() -> Iterator[Row | Check]:
    """Every piece of work; first against what needs no compiling, then against torch.compile."""
    torch.backends.cudnn.benchmark = True
    bandwidth, matrix_rate = card_limits(DEVICE)
    yield {
        "what": "limits",
        "ok": True,
        "card": torch.cuda.get_device_name(),
        "bandwidth": bandwidth,
        "matrix_rate": matrix_rate,
    }
    for compile_too in (False, True):
        for work in WORKS:
            for dtype in DTYPES if not compile_too else (torch.float32, torch.bfloat16):
                short = str(dtype).removeprefix("torch.")
                yield f"{work} {short}", functools.partial(_timed, work, dtype, compile_too)


def _timed(work: Work, dtype: torch.dtype, compile_too: bool) -> Row:
    moved, flops = work.costs(dtype)
    torch._dynamo.reset()
    sets = [work.arguments(DEVICE, dtype) for _ in range(input_sets(moved))]
    with torch.enable_grad() if work.backward else torch.no_grad():
        seconds = measure(
            contestants(work, sets, compile_too),
            len(sets),
            DeviceTimer(),
            wait=torch.cuda.synchronize,
        )
        backend = chosen_backend(work, sets[0])
    return {
        "what": str(work),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "moved": moved,
        "flops": flops,
        "backend": backend,
    }


# -- what there is -----------------------------------------------------------------------------


def environment() -> Iterator[Row]:
    """The card, the driver, the versions; which backends there are."""
    import fastfusion

    triton = sys.modules.get("triton") or _imported("triton")
    card = torch.cuda.get_device_properties(0)
    facts = {
        "GPU": card.name,
        "memory": f"{card.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{card.major}.{card.minor}",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or torch.version.hip,
        "cuDNN": torch.backends.cudnn.version(),
        "Triton": getattr(triton, "__version__", "not installed"),
        "Python": platform.python_version(),
        "fastfusion": fastfusion.__version__,
    }
    facts |= {f"backend {name}:": state for name, state in fastfusion.backends().items()}
    yield {"what": "environment", "ok": True, "facts": facts}


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None


PARTS: dict[str, Callable[[], Iterator[Any]]] = {
    "environment": environment,
    "parity": parity_checks,
    "opcheck": opchecks,
    "compile": lambda: checks_of_first(compiled),
    "graphs": lambda: checks_of_first(graph),
    "determinism": lambda: checks_of_first(determinism),
    "sanitizer": sanitizer_checks,
    "sanitized": sanitized_checks,
    "tables": tables,
}


def carry_out(
    part: str,
    items: Iterator[Any],
    seconds: float,
    shard: int,
    shards: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """The rows of this shard's items; one that fails does not end the others.

    An item is a row or a check. After ``seconds`` the rest is counted, not run.
    """
    end = clock() + seconds
    left_out = 0
    for index, item in enumerate(items):
        if index % shards != shard:
            continue
        if clock() >= end:
            left_out += 1
            continue
        if isinstance(item, dict):
            yield {"part": part, **item}
            continue
        what, check = item
        row: Row = {"part": part, "what": what, "ok": True, "detail": ""}
        try:
            remark = check()
            row |= remark if isinstance(remark, dict) else {"detail": remark or ""}
        except NotHere as reason:
            row |= {"ok": None, "detail": str(reason)}
        except Exception as error:
            words = str(error).strip().splitlines()
            row |= {"ok": False, "detail": f"{type(error).__name__}: {words[0] if words else ''}"}
        yield row
    for _ in range(left_out):
        yield {"part": part, "what": part, "ok": None, "detail": "the time was over"}


def main(arguments: Sequence[str]) -> int:
    """Write the rows as they come: what is there counts if the process dies."""
    part, target, seconds, shard, shards = arguments
    wrong = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products need it
    if part != "tables":  # whose contestants run as they come
        torch.backends.cudnn.allow_tf32 = False
    with open(target, "w") as file:
        for row in carry_out(part, PARTS[part](), float(seconds), int(shard), int(shards)):
            file.write(json.dumps(row) + "\n")
            file.flush()
            wrong |= row["ok"] is False
    return int(wrong) if part == "sanitized" else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
