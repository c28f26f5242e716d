"""The CUDA kernels' parity matrix on the CPU under the sanitizers: ``make cuda-sanitize``.

The host runtime and the kernels are compiled with AddressSanitizer and UndefinedBehaviorSanitizer;
the matrix runs once for each order in which the threads of a block may take their turns. That the
sanitizers find planted faults is tested by test_runtime.py, which runs first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cuda_on_cpu.library import ROOT, build, build_script
from tests.sanitize import SANITIZERS, _runtime

FLAGS = f"{SANITIZERS['address'][0]} -g1"


def main() -> None:
    compiler = build_script().find_compiler()
    if compiler is None:
        sys.exit("cuda-sanitize: no C++ compiler")
    pytest = [sys.executable, "-m", "pytest", "-x", "-p", "no:warnings", "-p", "no:cacheprovider"]
    if subprocess.run([*pytest, "tests/cuda_on_cpu"], cwd=ROOT).returncode != 0:
        sys.exit("cuda-sanitize: the host runtime does not find planted faults")
    sanitized = Path(os.environ.get("CUDA_ON_CPU_BUILD", ROOT / "build" / "cuda_on_cpu")) / "asan"
    environment = {
        **os.environ,
        "CUDA_ON_CPU_BUILD": str(sanitized),
        "CUDA_ON_CPU_FLAGS": FLAGS,
        "CUDA_ON_CPU_IN_FULL": "1",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    build(sanitized, FLAGS)  # before the sanitizer is in the compiler's process too
    environment["LD_PRELOAD"] = ":".join(
        _runtime(compiler, f"lib{n}.so") for n in ("asan", "ubsan")
    )
    chosen = ["-p", "tests.cuda_on_cpu.library", "tests/ops/test_parity.py", "-k"]
    for order in ("forward", "reverse", "random"):
        environment["CUDA_ON_CPU_ORDER"] = order
        print(f"cuda-sanitize: {order}", flush=True)
        # -s: a sanitizer ends the process where pytest would still hold its report back.
        command = [*pytest, "-s", "--timeout=0", *chosen, "cuda and not threads"]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
            sys.exit(1)


if __name__ == "__main__":
    main()
