"""Everything that needs a GPU, in one go and unattended: ``make gpu-check``.

Runs from a plain checkout (``PYTHONPATH=. python -m benchmarks.gpu_check``) on a machine with
torch and Triton; needs no network and no pytest. The CUDA kernels are built for the card first
where they are not there and nvcc is, in half of the time at most. Each part
(``gpu_parts.py``) runs in processes of its own, because a fault of the device ends every later call
of a process, and within its share of the time; what one part leaves over goes to the next. Writes a
JSON with every row and docs/performance-gpu.md, prints the table last. Exit status 0 when all that
ran is right, 1 when something is not; where there is no GPU it says so in one line, writes nothing
and exits with 0.

``--predict`` writes the page without a GPU: bytes, FLOPs and the floor on an H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastfusion import native
from fastfusion.data.atomic import atomic_path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance-gpu.md"
RESULTS = ROOT / "out" / "gpu-check.json"

#: Seconds for everything; the promise is eight minutes.
BUDGET = 430.0
#: Seconds that a process may take beyond its share to finish the row it is at.
GRACE = 5.0

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the check: its share of the time, and how many processes work on it."""

    name: str
    weight: float
    processes: int = 1


#: Correctness first: a figure counts only where the results are right.
PARTS = (
    Part("environment", 20),
    Part("parity", 90, processes=6),
    Part("opcheck", 40, processes=3),
    Part("compile", 50, processes=3),
    Part("graphs", 25, processes=2),
    Part("determinism", 20, processes=2),
    Part("sanitizer", 40),
    Part("tables", 200),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a card can do: bytes a second of a copy, bfloat16 FLOPs a second of a product."""

    card: str
    bandwidth: float
    matrix_rate: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds under which nothing can be: the larger of the two limits."""
        return max(moved / self.bandwidth, flops / self.matrix_rate)


#: What the geometric means over all rows should reach.
TARGETS = {"times faster than eager": 15.0, "times faster than torch.compile max-autotune": 3.0}

#: How the times of the GPU backend that "auto" does not take are called: this and its name.
OTHER = "backend "

#: A copy and a product of 8192 x 8192 matrices measured on such a card.
H200 = Limits("NVIDIA H200", 4.3e12, 790e12)


# -- running -----------------------------------------------------------------------------------


def in_processes(part: Part, seconds: float, folder: Path) -> list[Row]:
    """The rows of a part from processes that are ended when its time is over."""
    children = []
    for shard in range(part.processes):
        rows, log = folder / f"{part.name}.{shard}.jsonl", folder / f"{part.name}.{shard}.log"
        rows.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name, str(rows)]
        command += [str(seconds), str(shard), str(part.processes)]
        with log.open("w") as out:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        children.append((child, rows, log))
    end = time.monotonic() + seconds + GRACE
    found = []
    for child, rows, log in children:
        try:
            status: int | None = child.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its own children too
            child.wait()
            status = None
        if rows.is_file():
            found += [json.loads(line) for line in rows.read_text().splitlines() if line]
        if status != 0:
            words = log.read_text().strip().splitlines()
            reason = "its time was over" if status is None else f"exit status {status}"
            last = words[-1] if words else "no output"
            found.append(problem(part.name, f"{reason}: {last}", run=status is not None))
    return found


def problem(part: str, detail: str, *, run: bool = True) -> Row:
    """A row that says what went wrong or, ``run`` False, that time was short."""
    return {"part": part, "what": part, "ok": False if run else None, "detail": detail}


def run(
    parts: Sequence[Part],
    work: Callable[[Part, float], Iterable[Row]],
    budget: float,
    clock: Callable[[], float] = time.monotonic,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of all parts within the budget; one that fails does not end the others.

    A part gets the share of its weight of the time that is left. ``done`` is called after each.
    """
    end = clock() + budget
    rows: list[Row] = []
    for index, part in enumerate(parts):
        left = end - clock()
        weights = sum(other.weight for other in parts[index:])
        if left <= 0:
            rows.append(problem(part.name, "the time was over", run=False))
            continue
        try:
            rows += work(part, left * part.weight / weights)
        except Exception as error:
            rows.append(problem(part.name, f"{type(error).__name__}: {error}"))
        done(rows)
    return rows


# -- the page ----------------------------------------------------------------------------------


def _scaled(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def predicted_lines() -> list[str]:
    """Bytes, FLOPs and the floor on an H200 of every piece of work."""
    import torch

    from benchmarks.works import WORKS

    lines = [
        "| work | dtype | MB | GFLOP | FLOP/byte | floor, us | set by |",
        "|---|---|---|---|---|---|---|",
    ]
    for work in WORKS:
        for dtype in (torch.float32, torch.bfloat16):
            moved, flops = work.costs(dtype)
            by_memory = moved / H200.bandwidth >= flops / H200.matrix_rate
            cells = [
                str(work),
                str(dtype).removeprefix("torch."),
                _scaled(moved / 1e6),
                _scaled(flops / 1e9),
                _scaled(flops / moved),
                _scaled(1e6 * H200.floor(moved, flops)),
                "memory" if by_memory else "matrix units",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each piece of work: a later one was timed against more."""
    return list({(row["what"], row["dtype"]): row for row in rows if "seconds" in row}.values())


def mean_lines(rows: Sequence[Row], limits: Limits) -> list[str]:
    """How the whole stands against the targets: geometric means of the ratios and of the share."""
    values: dict[str, list[float]] = {}
    for row in _latest(rows):
        times = {name: quartiles[1] for name, quartiles in row["seconds"].items()}
        ours = times.pop("fastfusion")
        values.setdefault("share of the floor", []).append(
            limits.floor(row["moved"], row["flops"]) / ours
        )
        for name, theirs in times.items():
            values.setdefault(f"times faster than {name}", []).append(theirs / ours)
    lines = []
    for name, ratios in values.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        wanted = f", target {TARGETS[name]:g}" if name in TARGETS else ""
        lines.append(f"- {name}: {mean:.2f}, geometric mean of {len(ratios)} rows{wanted}")
    return lines


def measured_lines(rows: Sequence[Row], limits: Limits) -> list[str]:
    """Each piece of work: ours, what others take, and the share of the floor."""
    lines = [
        "| work | dtype | fastfusion (backend), us | times faster than | floor, us | share "
        "| GB/s | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _latest(rows):
        times = {name: q[1] for name, q in row["seconds"].items()}
        ours = times.pop("fastfusion")
        floor = limits.floor(row["moved"], row["flops"])
        others = ", ".join(f"{name} {time / ours:.2f}" for name, time in times.items())
        cells = [
            row["what"],
            row["dtype"],
            f"{_scaled(1e6 * ours)} ({row['backend']})",
            others,
            _scaled(1e6 * floor),
            f"{floor / ours:.2f}",
            _scaled(row["moved"] / ours / 1e9),
            _scaled(row["flops"] / ours / 1e12),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def choice_lines(rows: Sequence[Row]) -> list[str]:
    """Where the GPU backend that "auto" took is not the faster one: what to change in choice.py."""
    found = []
    compared = 0
    for row in _latest(rows):
        ours = row["seconds"]["fastfusion"][1]
        for name, quartiles in row["seconds"].items():
            if not name.startswith(OTHER):
                continue
            compared += 1
            if quartiles[1] < ours:
                times = f"{ours / quartiles[1]:.2f} times faster than {row['backend']}"
                found.append(f"- {row['what']}, {row['dtype']}: {name.removeprefix(OTHER)} {times}")
    head = (
        f'Of {compared} rows with both GPU backends, "auto" took the slower one in {len(found)} '
        "(fastfusion/ops/choice.py)."
    )
    return [head, *([""] if found else []), *found]


def limits_in(rows: Sequence[Row]) -> Limits | None:
    """The card's limits as the tables' part measured them."""
    for row in rows:
        if "bandwidth" in row:
            return Limits(row["card"], row["bandwidth"], row["matrix_rate"])
    return None


def check_lines(rows: Sequence[Row]) -> list[str]:
    """One line a part, then one for each thing that is wrong."""
    lines = ["| part | right | wrong | not run |", "|---|---|---|---|"]
    for part in dict.fromkeys(row["part"] for row in rows):
        oks = [row["ok"] for row in rows if row["part"] == part]
        counts = [oks.count(True), oks.count(False), oks.count(None)]
        lines.append(f"| {part} | " + " | ".join(str(n) for n in counts) + " |")
    wrong = [row for row in rows if row["ok"] is False]
    if wrong:
        lines += ["", "Wrong:", ""]
        lines += [f"- {row['part']}, {row['what']}: {row['detail']}" for row in wrong]
    return lines


def page(rows: Sequence[Row] | None) -> str:
    """docs/performance-gpu.md, with what was measured or, without rows, that nothing was."""
    lines = ["# Speed on a GPU", ""]
    limits = limits_in(rows) if rows else None
    if limits is None:
        lines += [
            "**Nothing was measured: no GPU was at hand when this page was made.** `make "
            "gpu-check` checks the kernels on a GPU and replaces this page by its results, within "
            "eight minutes. Until then the kernels are known to be right through Triton's "
            "interpreter and to compile for every architecture ([kernels.md](kernels.md)).",
        ]
    else:
        facts = next((row["facts"] for row in rows or [] if "facts" in row), {})
        lines += [
            "Made by `make gpu-check`, whose rows are in the JSON it writes.",
            "",
            "; ".join(f"{name} {value}" for name, value in facts.items()) + ".",
            "",
            f"Measured in the same run on {limits.card}: a large copy "
            f"{limits.bandwidth / 1e12:.2f} TB/s (read + write), a bfloat16 matrix product "
            f"{limits.matrix_rate / 1e12:.0f} TFLOP/s. Medians of interleaved rounds, by the "
            "device's own events, with nothing waited for inside the timed region.",
            "",
            *check_lines(rows or []),
            "",
            *mean_lines(rows or [], limits),
            "",
            *choice_lines(rows or []),
            "",
            *measured_lines(rows or [], limits),
        ]
    lines += [
        "",
        f"## Floors on an {H200.card}",
        "",
        "Bytes: each input read once and each output written once (backward: the inputs and the "
        "outputs' gradients read, the inputs' written). FLOPs: the operators' formulas, 2 a "
        "multiply-add. Floor: the larger of bytes over a copy's bandwidth, "
        f"{H200.bandwidth / 1e12:.1f} TB/s, and FLOPs over the rate of a bfloat16 matrix product, "
        f"{H200.matrix_rate / 1e12:.0f} TFLOP/s. Computed by `python -m benchmarks.gpu_check "
        "--predict` from the operators, not measured.",
        "",
        *predicted_lines(),
        "",
    ]
    return "\n".join(lines)


def write(text: str, path: Path) -> None:
    """Completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text)


# -- the command -------------------------------------------------------------------------------


def why_no_gpu() -> str | None:
    """None where there is a GPU, else the reason in one line."""
    import torch

    if not torch.cuda.is_available():
        return f"no GPU here that torch {torch.__version__} can use"
    return None


def built(folder: Path, seconds: float) -> Row:
    """Build the CUDA kernels for this card and let the parts load them, if they are not there.

    Where that takes longer than the seconds, the check goes on without them.
    """
    import torch

    row: Row = {"part": "build", "what": "_C_cuda", "ok": True, "detail": "was there"}
    if torch.version.cuda is None or native.library_path(native.CUDA) is not None:
        return row
    number = ".".join(map(str, torch.cuda.get_device_capability()))
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--cuda", "--out", str(folder)]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": number}
    print(f"build: the CUDA kernels for compute capability {number}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {**row, "ok": None, "detail": f"not built within {seconds:.0f} s"}
    if done.returncode == 0:
        os.environ["FASTFUSION_LIBRARY_DIR"] = str(folder)
        return {**row, "detail": f"built for {number}"}
    words = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return {**row, "ok": None, "detail": words[-1] if words else f"status {done.returncode}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure, or predict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--predict", action="store_true", help="only the floors, without a GPU")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/performance-gpu.md")
    parser.add_argument("--json", type=Path, default=RESULTS, help="default: out/gpu-check.json")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for everything")
    options = parser.parse_args(arguments)
    if options.predict:
        write(page(None), options.page)
        return 0
    missing = why_no_gpu()
    if missing is not None:
        print(f"gpu-check: {missing}; nothing was checked, nothing was measured")
        return 0
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    folder = options.json.resolve().parent / "gpu-check"
    folder.mkdir(parents=True, exist_ok=True)

    def work(part: Part, seconds: float) -> list[Row]:
        print(f"{part.name}: up to {seconds:.0f} s", flush=True)
        return in_processes(part, seconds, folder)

    def keep(rows: list[Row]) -> None:
        write(json.dumps(rows, indent=1), options.json)

    start = time.monotonic()
    build = built(folder / "libraries", options.seconds / 2)
    if build["ok"] is not True:
        print(f"build: no CUDA kernels: {build['detail']}", flush=True)
    left = options.seconds - (time.monotonic() - start)
    rows = [build, *run(PARTS, work, left, done=keep)]
    keep(rows)
    write(page(rows), options.page)
    print("\n".join(check_lines(rows)))
    limits = limits_in(rows)
    if limits is not None:
        print("\n".join([*mean_lines(rows, limits), *measured_lines(rows, limits)]))
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
