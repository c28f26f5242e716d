"""The CUDA kernels' tests on the CPU under sanitizers: ``python -m tests.cuda_on_cpu.sanitize``.

The host runtime and the kernels are compiled with AddressSanitizer and UndefinedBehaviorSanitizer,
and tests are run with that library, by default the whole parity matrix (``make cuda-sanitize``),
once for each order in which the threads of a block may take their turns. That the sanitizers find
planted faults is tested by test_runtime.py. ``-- PYTEST ARGUMENTS`` are other tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.cuda_on_cpu.library import ROOT, build, build_script
from tests.sanitize import SANITIZERS, preload

FLAGS = f"{SANITIZERS['address'][0]} -g1"
ORDERS = ("forward", "reverse", "random")
MATRIX = ["tests/ops/test_parity.py", "-k", "cuda and not threads"]


def libraries() -> str | None:
    """What must be in the process before Python, or None where no compiler has the sanitizers."""
    compiler = build_script().find_compiler()
    return preload(compiler, "address") if compiler else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("tests", nargs="*", metavar="PYTEST ARGUMENT")
    arguments = parser.parse_args()
    before_python = libraries()
    if before_python is None:
        sys.exit("cuda-sanitize: no C++ compiler with an address sanitizer")
    sanitized = Path(os.environ.get("CUDA_ON_CPU_BUILD", ROOT / "build" / "cuda_on_cpu")) / "asan"
    build(sanitized, FLAGS)  # before the sanitizer is in the compiler's process too
    environment = {
        **os.environ,
        "CUDA_ON_CPU_BUILD": str(sanitized),
        "CUDA_ON_CPU_FLAGS": FLAGS,
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "LD_PRELOAD": before_python,
    }
    if not arguments.tests:
        environment["CUDA_ON_CPU_IN_FULL"] = "1"
    # -s: a sanitizer ends the process where pytest would still hold its report back.
    command = [sys.executable, "-m", "pytest", "-x", "-s", "--timeout=0", "-p", "no:warnings"]
    command += ["-p", "no:cacheprovider", "-p", "tests.cuda_on_cpu.library"]
    command += arguments.tests or MATRIX
    for order in arguments.orders:
        print(f"cuda-sanitize: {order}", flush=True)
        environment["CUDA_ON_CPU_ORDER"] = order
        if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
            sys.exit(1)


if __name__ == "__main__":
    main()
