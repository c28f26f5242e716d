"""Every Triton kernel in float32 through the interpreters of other versions of Triton.

``python -m tests.ops.tritons 3.6.0 3.9.0`` (``make triton-parity``) fetches each version into
build/triton-VERSION, unless it is there, and runs with each, side by side, the parity matrix in
float32 (``--full``: in every dtype, layout and size) and the tests of SpeCAM's first stage. A
version that cannot be fetched is named; what was run and is wrong, or was not reached by any test,
makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
INSTALL = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
MATRIX = ("tests/ops/test_parity.py", "-k", "triton and float32")
FULL_MATRIX = ("tests/ops/test_parity.py", "-k", "triton")
FIRST_STAGE = (
    "tests/ops/test_haar.py",
    "-k",
    "not long and (float32 or parts or equal or some or special or strides)",
)
PYTEST = (
    "-m",
    "pytest",
    "-p",
    "no:warnings",
    "-p",
    "no:cacheprovider",
    "-p",
    "tests.ops.interpreter",
)


def kernels(folder: str) -> set[str]:
    """The names of the kernels in an operator's folder."""
    text = (ROOT / "fastfusion" / "ops" / folder / "kernels.py").read_text()
    return set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))


def all_kernels() -> set[str]:
    folders = (path.parent.name for path in ROOT.glob("fastfusion/ops/*/kernels.py"))
    return set().union(*map(kernels, folders))


def ran_in(output: str) -> set[str]:
    """The kernels that tests.ops.interpreter named at the ends of runs."""
    lines = [line for line in output.splitlines() if line.startswith("kernels:")]
    return {word for line in lines for word in line.split()[1:]}


def fetch(version: str) -> str | None:
    """None where Triton lies in build/triton-VERSION, else why it could not be fetched."""
    target = BUILD / f"triton-{version}"
    done = target / "fetched"
    if done.is_file():
        return None
    wanted = [f"triton=={version}"]
    if version.startswith("3.6"):
        # Its interpreter turns arrays of one element into integers, which NumPy 2.4 refuses.
        wanted.append("numpy==2.2.6")
    command = [*INSTALL, "--no-deps", "--upgrade", "--target", str(target), *wanted]
    reason = why_not(command)
    if reason is None:
        done.touch()
    return reason


def why_not(command: Sequence[str]) -> str | None:
    """Run pip: None, or the line in which it says why it failed."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode == 0:
        return None
    said = (ended.stderr + ended.stdout).strip().splitlines()
    return next((line for line in said if "ERROR" in line), said[-1] if said else "no reason")


def start(version: str, matrix: Sequence[str]) -> subprocess.Popen[str]:
    """Both runs, one after the other (pytest's -k holds for all files), with a version."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(BUILD / f"triton-{version}"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    code = (
        "import subprocess, sys, triton\n"
        f"assert triton.__version__ == {version!r}, triton.__version__\n"
        f"for tests in {(matrix, FIRST_STAGE)!r}:\n"
        f"    ended = subprocess.run([sys.executable, *{PYTEST!r}, *tests])\n"
        "    if ended.returncode: sys.exit(1)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wrong_in(output: str, status: int) -> list[str]:
    """What is wrong in the output of both runs."""
    if status != 0:
        return output.splitlines()[-40:]
    missing = all_kernels() - ran_in(output)
    return [f"never ran: {', '.join(sorted(missing))}"] if missing else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--fetch-only", action="store_true", help="status 1 where one is not there")
    parser.add_argument("--full", action="store_true", help="the matrix in every dtype and layout")
    options = parser.parse_args(arguments)
    matrix, what = (FULL_MATRIX, "in full") if options.full else (MATRIX, "in float32")
    reasons = {version: fetch(version) for version in options.versions}
    for version, reason in reasons.items():
        if reason is not None:
            print(
                f"triton-parity: NOT TESTED with Triton {version}, "
                f"which could not be fetched: {reason}"
            )
    if options.fetch_only:
        return int(any(reasons.values()))
    begin = time.monotonic()
    running = {v: start(v, matrix) for v, reason in reasons.items() if reason is None}
    wrong = False
    for version, process in running.items():
        output, _ = process.communicate()
        problems = wrong_in(output, process.returncode)
        passed = sum(map(int, re.findall(r"(\d+) passed", output)))
        reached, seconds = all_kernels() & ran_in(output), time.monotonic() - begin
        print("\n".join(problems), end="\n" if problems else "")
        print(
            f"triton-parity: Triton {version}: {'WRONG' if problems else 'right'}, {passed} tests "
            f"and {len(reached)} kernels {what}, after {seconds:.0f} s",
            flush=True,
        )
        wrong |= bool(problems)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
