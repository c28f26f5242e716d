"""Run the C++ kernels' tests under the compiler's sanitizers: ``python -m tests.sanitize``.

AddressSanitizer and UndefinedBehaviorSanitizer watch the whole parity matrix of the C++ backend, at
each instruction set that this processor has; ThreadSanitizer at the best of them. The library is
built for each; Python and torch are the ordinary ones. So that ThreadSanitizer sees who waits for
whom, the kernels then run on three threads of their own instead of torch's pool.

Every sanitizer is first shown a planted fault of its kind, which it must find. ``--write PAGE``
puts what was run and found into the table that ``make torture`` writes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from csrc import build as script
from tests.reliability import torture

ROOT = Path(__file__).resolve().parents[1]

#: What each run is compiled with, and the library that must be in the process before Python.
SANITIZERS = {
    "address": (
        # A null pointer is an address that AddressSanitizer finds too; its checks as calls are half
        # the code to compile.
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer "
        "-fno-sanitize=null --param asan-instrumentation-with-call-threshold=0",
        ("libasan.so", "libubsan.so"),
    ),
    "thread": ("-fsanitize=thread -DFASTFUSION_OWN_THREADS -pthread", ("libtsan.so",)),
}

LEVELS = ["default", "avx2", "avx512", "avx512_bf16"]

#: One planted fault a sanitizer: what must be found, or its run proves nothing.
FAULTS = {
    "address": (
        "int main(int n, char**) { int* p = new int[4]; int v = p[3 + n]; delete[] p; return v; }",
        "heap-buffer-overflow",
    ),
    "undefined": (
        "int main(int n, char**) { int big = 2147483647; big += n; return big; }",
        "signed integer overflow",
    ),
    "thread": (
        "#include <thread>\nint n; int main() { std::thread a([] { ++n; }), b([] { ++n; });"
        " a.join(); b.join(); }",
        "data race",
    ),
}


def preload(compiler: list[str], sanitizer: str) -> str | None:
    """What must be in the process before Python, or None where the compiler has it not."""
    found = []
    for name in SANITIZERS[sanitizer][1]:
        told = subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        found.append(Path(told.stdout.strip()))
    return ":".join(map(str, found)) if all(path.is_absolute() for path in found) else None


def show_faults(compiler: list[str]) -> None:
    """Compile and run each planted fault; ends the program where one is not found."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, expected) in FAULTS.items():
            program = Path(folder) / name
            program.with_suffix(".cpp").write_text(source)
            flags = ["-std=c++17", "-pthread", f"-fsanitize={name}", "-g"]
            command = [*compiler, *flags, f"{program}.cpp", "-o", str(program)]
            subprocess.run(command, check=True)
            told = subprocess.run([*_no_aslr(name), str(program)], capture_output=True, text=True)
            if expected not in told.stderr:
                sys.exit(f"sanitize: the {name} sanitizer does not find a planted {expected}")
            print(f"sanitize: the {name} sanitizer finds a planted {expected}", flush=True)


def _no_aslr(sanitizer: str) -> list[str]:
    """ThreadSanitizer of gcc 12 cannot live with today's random address layouts."""
    return ["setarch", platform.machine(), "-R"] if sanitizer == "thread" else []


def capabilities() -> list[str]:
    """The instruction sets of this processor, by the names of FASTFUSION_CPU_CAPABILITY."""
    code = "import fastfusion.native as native; print(native.capability())"
    environment = {**os.environ, "FASTFUSION_CPU_CAPABILITY": ""}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    best = told.stdout.strip()
    if best == "none":
        sys.exit("sanitize: fastfusion is installed without its C++ kernels (see fastfusion info)")
    return LEVELS[: LEVELS.index(best) + 1]


#: How a sanitizer begins what it has to say.
FOUND = re.compile(r"(AddressSanitizer: |runtime error: |ThreadSanitizer: )(.*)")


def run(sanitizer: str, capability: str, compiler: list[str], library: Path) -> dict[str, str]:
    """The tests with one sanitizer on one instruction set: a row of the table."""
    libraries = preload(compiler, sanitizer)
    if libraries is None:
        sys.exit(f"sanitize: {compiler[0]} has no {' or no '.join(SANITIZERS[sanitizer][1])}")
    environment = {
        **os.environ,
        "FASTFUSION_LIBRARY_DIR": str(library),
        "FASTFUSION_CPU_CAPABILITY": capability,
        "FASTFUSION_BACKEND": "cpp",
        "LD_PRELOAD": libraries,
        # Python's own allocations live as long as the process: only writes and reads are judged.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=0:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
    }
    files = ["test_parity", "test_empty", "test_haar", "test_depthwise", "test_local_map"]
    files += ["test_frequency_filter", "test_latent_operator"]
    chosen = [f"tests/ops/{name}.py" for name in files]
    chosen += ["-k", "cpp or test_haar or test_depthwise or test_local_map"]
    command = [
        *_no_aslr(sanitizer),
        # -s: a sanitizer ends the process where pytest would still hold its report back.
        *[
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-s",
            "-p",
            "no:cacheprovider",
            "--timeout=0",
        ],
        *chosen,
    ]
    print(f"sanitize: {sanitizer}, {capability}: {shlex.join(command)}", flush=True)
    start, said = time.monotonic(), []
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        said.append(line)
    status = process.wait()
    text = "".join(said)
    found = sorted({f"{kind}{what.strip()}" for kind, what in FOUND.findall(text)})
    passed = re.findall(r"(\d+) passed", text)
    outcome = "nothing found"
    if found or status != 0:
        outcome = f"failed: {'; '.join(found[:3]) or f'status {status}'}"
    names = {"address": "address and undefined behaviour", "thread": "threads"}
    return {
        "part": f"sanitizers, {names[sanitizer]}: {capability}",
        "tried": f"{passed[-1] if passed else 'no'} tests of the C++ kernels passed",
        "outcome": outcome,
        "minutes": f"{(time.monotonic() - start) / 60:.1f}",
        "date": torture.today(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SANITIZERS, help="one kind (default: every)")
    parser.add_argument("--level", choices=LEVELS, help="one instruction set (default: every)")
    parser.add_argument("--write", type=Path, help="the page whose table gets the rows")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sanitize")
    arguments = parser.parse_args()
    compiler = script.find_compiler()
    if compiler is None:
        sys.exit("sanitize: no C++ compiler")
    show_faults(compiler)
    good = True
    for sanitizer in [arguments.only] if arguments.only else SANITIZERS:
        library = arguments.out / sanitizer
        # Later options win. At -Og variables live in registers, so that a third of the code is left
        # to compile and run of what -O0 makes; accesses to the arrays are all judged.
        script.build(library, flags=f"{SANITIZERS[sanitizer][0]} -Og -g1")
        levels = capabilities()
        # Races do not depend on the instruction set.
        for capability in levels if sanitizer == "address" else levels[-1:]:
            if arguments.level in (None, capability):
                row = run(sanitizer, capability, compiler, library)
                print(row, flush=True)
                good &= row["outcome"] == "nothing found"
                if arguments.write:
                    torture.write(arguments.write, [row])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
