"""The long profile: every part of these tests with much more of it, and a table of what was tried.

``python -m tests.reliability.torture [--parts "A; B"] [--write PAGE]`` runs each part in a process
of its own, with the time that it has, and writes the figures between two marks of the page. A part
whose tools or room are missing says so in the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("part", "tried", "outcome", "minutes", "date")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclasses.dataclass(frozen=True)
class Part:
    """A file of tests, or a module that prints JSON, and how many minutes it may take."""

    name: str
    target: str
    minutes: float
    environment: tuple[tuple[str, str], ...] = ()


PARTS = [
    Part("bad arguments", "tests/reliability/test_bad_arguments.py", 10),
    Part("files", "tests/reliability/test_hostile_files.py", 20),
    Part("properties", "tests/reliability/test_properties.py", 60),
    Part(
        "properties, Triton's interpreter",
        "tests/reliability/test_properties.py",
        60,
        (
            ("TRITON_INTERPRET", "1"),
            ("PYTEST_ADDOPTS", "-p no:warnings -p tests.ops.interpreter"),
        ),
    ),
    Part(
        "properties, CUDA kernels on the CPU",
        "tests/reliability/test_properties.py",
        60,
        (
            ("CUDA_ON_CPU_ORDER", "random"),
            ("PYTEST_ADDOPTS", "-p no:warnings -p tests.cuda_on_cpu.library"),
        ),
    ),
    Part("faults", "tests/reliability/test_faults.py", 60),
    Part("concurrency", "tests/reliability/test_concurrency.py", 20),
    Part("leaks", "tests/reliability/test_leaks.py", 60),
    Part("sizes", "tests/reliability/test_sizes.py", 30),
    Part("supply chain", "tests/reliability/test_supply_chain.py", 5),
    Part("memcheck", "tests.reliability.memcheck", 60),
]


def run(part: Part, minutes: float, share: float) -> dict[str, str]:
    """A row of the table."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        figures = Path(room, "figures.json")
        environment = {
            **os.environ,
            **dict(part.environment),
            "FASTFUSION_TORTURE": str(share),
            "FASTFUSION_TORTURE_FIGURES": str(figures),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m"]
        if part.target.endswith(".py"):
            command += ["pytest", "-q", "-rsfE", "--timeout", "3600", part.target]
        else:
            command += [part.target, str(max(1, round(100 * share)))]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What is started behind an ampersand ignores Ctrl-C, and so would this.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            said, _ = process.communicate(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            said = _ended(process)
            tried, passed, failed = _figures(figures)
            outcome = f"stopped after {minutes:g} minutes: until then {passed} tests passed, " + (
                f"these failed: {', '.join(failed)}" if failed else "none failed"
            )
        else:
            outcome, tried = _told(part, process.returncode, said, figures)
        sys.stdout.write(said)
    seconds = time.monotonic() - start
    if share != 1:
        tried = f"{share:g} of the long profile: {tried}"
    return {
        "part": part.name,
        "tried": tried,
        "outcome": outcome,
        "minutes": f"{seconds / 60:.1f}",
        "date": today(),
    }


def today() -> str:
    """The date of a row."""
    return f"{datetime.date.today():%d %B %Y}"


def _ended(process: subprocess.Popen[str]) -> str:
    """What a part says that has to end now: pytest reports the failures until then."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def _told(part: Part, status: int, said: str, figures: Path) -> tuple[str, str]:
    """Outcome and what was tried."""
    if not part.target.endswith(".py"):
        answer = json.loads(said.strip().splitlines()[-1]) if said.strip() else {}
        if "skipped" in answer:
            return f"left out: {answer['skipped']}", ""
        tried = (
            f"{answer.get('calls', 0)} calls of all operators, forward and backward, at "
            f"{answer.get('capabilities', '?')}"
        )
        if "errors" not in answer:
            return "failed", tried
        found = "; ".join(answer["errors"][:3])
        return f"failed: {found}" if found else "none but the planted fault", tried
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.+)$", said, re.MULTILINE)
    tried, _, failed = _figures(figures)
    outcome = "all good" if status == 0 else f"failed: {', '.join(failed) or 'no tests'}"
    if skipped:
        outcome += f" (left out: {'; '.join(sorted(set(skipped)))})"
    return outcome, tried


def _figures(file: Path) -> tuple[str, int, list[str]]:
    """What was counted, in words, how many tests passed and the names of those that failed."""
    told = json.loads(file.read_text()) if file.exists() else {}
    passed, failed = told.pop("tests", {}).get("passed", 0), list(told.pop("failed", {}))
    words = [f"{n:,.0f} {thing}" for things in told.values() for thing, n in things.items()]
    return "; ".join(words), round(passed), failed


def table(rows: list[dict[str, str]]) -> str:
    """The figures as Markdown, with where the latest were taken."""
    head = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"`{torch.backends.cpu.get_cpu_capability()}`."
    )
    lines = [head, "", f"| {' | '.join(COLUMNS)} |", "|---|---|---|--:|---|"]
    lines += [f"| {' | '.join(row[name] for name in COLUMNS)} |" for row in rows]
    return "\n".join(lines)


def write(page: Path, rows: list[dict[str, str]]) -> None:
    """Put the rows between the marks, beside those of other parts that are there."""
    before, rest = page.read_text().split(BEGIN)
    figures, after = rest.split(END)
    there = [
        dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split(" | ")), strict=True))
        for line in figures.splitlines()
        if line.count(" | ") == len(COLUMNS) - 1 and not line.startswith("| part |")
    ]
    known = {row["part"]: row for row in [*there, *rows]}
    first = [part.name for part in PARTS if part.name in known]
    ordered = [known[name] for name in [*first, *sorted(known.keys() - set(first))]]
    page.write_text(f"{before}{BEGIN}\n{table(ordered)}\n{END}{after}")


def main() -> int:
    """Run the parts and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", help="names, with ; between them; by default all")
    parser.add_argument("--share", type=float, default=1.0, help="of the long profile's counts")
    parser.add_argument("--minutes", type=float, help="at most for each part")
    parser.add_argument("--write", type=Path, help="the page whose figures are replaced")
    arguments = parser.parse_args()
    every = [part.name for part in PARTS]
    wanted = [name.strip() for name in arguments.parts.split(";")] if arguments.parts else every
    unknown = set(wanted) - set(every)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    rows = []
    for part in PARTS:
        if part.name in wanted:
            rows.append(run(part, arguments.minutes or part.minutes, arguments.share))
            print(json.dumps(rows[-1]), flush=True)
            if arguments.write:  # after each part, so that an end on the way loses nothing
                write(arguments.write, rows)
    return 1 if any(row["outcome"].startswith(("failed", "stopped")) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
