"""Build the compiled libraries with ninja; used by setup.py and by hand while developing.

``python csrc/build.py --out DIR`` leaves ``DIR/_C_cpu.abi3.so``, and ``FASTFUSION_LIBRARY_DIR=DIR``
makes fastfusion load it from there. Torch is neither imported nor needed where this runs: its
headers are found in the environment that the package is installed into. A portable library, for a
wheel, also runs where glibc and libstdc++ are older than here (portable.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARY = "_C_cpu.abi3.so"
OLDEST_TORCH = (2, 10)

#: The namespace of each instruction set, and what makes the compiler use it. The linker keeps the
#: first of equal inline functions, so the order here keeps newer instructions out of older paths.
CAPABILITIES = {"baseline": ["-O2"]}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    CAPABILITIES |= {"avx2": ["-O3", *avx2], "avx512": ["-O3", *avx2, *avx512]}

FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c may become one instruction; nothing else of -ffast-math
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-uninitialized",  # gcc 12 says it of its own AVX-512 header, and this one:
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",  # vectors are passed between inlined functions only
]
TORCH_FLAGS = ["-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]


class CannotBuild(Exception):
    """Why a library cannot be built here, in one line."""


def find_torch() -> Path | None:
    """The folder of the torch package, in the environment that is installed into."""
    # Where pip isolates the build, this process does not see the environment, but a plain
    # interpreter does: the isolation lies in these variables. A torch that was asked for as a
    # build requirement is seen by this process only.
    query = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    for environment in (plain, dict(os.environ)):
        result = subprocess.run(
            [sys.executable, "-c", query], env=environment, capture_output=True, text=True
        )
        if result.returncode == 0 and result.stdout.strip():
            return Path(result.stdout.strip()).parent
    return None


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: ``$CXX``, or the first of c++, g++ and clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_ninja() -> str | None:
    beside = Path(sys.executable).parent / "ninja"
    return shutil.which("ninja") or (str(beside) if beside.is_file() else None)


def why_not() -> str | None:
    """None when the tools for a build are here (torch aside), else what is missing."""
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only, this is {sys.platform}"
    if find_compiler() is None:
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        return f"no C++ compiler was found when fastfusion was installed ({wanted})"
    if find_ninja() is None:
        return "ninja was not found when fastfusion was installed"
    return None


def _check_torch(torch: Path) -> None:
    header = torch / "include" / "torch" / "headeronly" / "version.h"
    text = header.read_text() if header.is_file() else ""
    numbers = [
        re.search(rf"define TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR")
    ]
    version = tuple(int(number.group(1)) for number in numbers if number)
    if len(version) < 2 or version < OLDEST_TORCH:
        found = ".".join(map(str, version)) or "older"
        raise CannotBuild(f"the torch in {torch.parent} is {found}, 2.10 or later is needed")


def _ninja_file(
    torch: Path,
    compiler: list[str],
    objects: Path,
    library: Path,
    extra: str,
    portable: list[str],
) -> str:
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    command = shlex.join(compiler)
    include = shlex.quote(str(torch / "include"))
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {command} {shlex.join(FLAGS)} $flags {extra} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        # libtorch_cpu is named, without a path: the loader finds it by name in the process, where
        # `import torch` has brought it.
        # Under another name at first: nobody loads half a library while this runs.
        f"  command = {command} -shared {extra} $in -o $out.partial "
        f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu -Wl,--no-undefined "
        f"-Wl,--allow-shlib-undefined -Wl,--as-needed {'' if extra else '-s'} "
        f"{shlex.join(portable)} && mv -f $out.partial $out",
        "  description = link $out",
    ]
    built = []

    def compile_one(source: Path, target: str, flags: str) -> None:
        output = escape(objects / target)
        lines.extend([f"build {output}: compile {escape(source)}", f"  flags = {flags}"])
        built.append(output)

    for source in [SOURCES / "library.cpp", *sorted((SOURCES / "bindings").glob("*.cpp"))]:
        flags = f"{shlex.join(TORCH_FLAGS)} -isystem {include}"
        compile_one(source, f"{source.stem}.o", flags)
    for name, options in CAPABILITIES.items():
        for source in sorted((SOURCES / "cpu").glob("*.cpp")):
            compile_one(
                source,
                f"{source.stem}.{name}.o",
                f"{shlex.join(options)} -DFF_CAPABILITY={name}",
            )
    lines.append(f"build {escape(library)}: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


def _portable_link(compiler: list[str], folder: Path) -> list[str]:
    from portable import portable_link  # beside this file; tests load this file alone

    try:
        return portable_link(compiler, folder)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"the compiler failed: {shlex.join(error.cmd)}") from error


def build(
    out: Path,
    *,
    objects: Path | None = None,
    flags: str = "",
    portable: bool = False,
    verbose: bool = False,
) -> Path:
    """Build ``_C_cpu`` into the folder ``out`` and return its path.

    Args:
        objects: where object files are kept (what has not changed is not compiled again).
        flags: more options for the compiler and the linker, e.g. ``-fsanitize=address``.
        portable: link for older systems too, as a wheel needs it.
        verbose: show the commands.

    Raises:
        CannotBuild: a tool is missing or the compiler fails; the message is one line.
    """
    reason = why_not()
    if reason is not None:
        raise CannotBuild(reason)
    torch = find_torch()
    if torch is None:
        raise CannotBuild("torch was not found when fastfusion was installed")
    _check_torch(torch)
    compiler, ninja = find_compiler(), find_ninja()
    assert compiler is not None and ninja is not None
    out = out.resolve()
    objects = (objects or out / "objects").resolve()
    for folder in (out, objects):
        folder.mkdir(parents=True, exist_ok=True)
    library = out / LIBRARY
    plan = objects / "build.ninja"
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = [ninja, "-f", str(plan), "-C", str(objects), "-j", jobs, *["-v"] * verbose]
    import fcntl  # is on Linux alone, as this is

    with (objects / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not expect another one at the same files
        link = _portable_link(compiler, objects / "portable") if portable else []
        plan.write_text(_ninja_file(torch, compiler, objects, library, flags, link))
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    sys.stdout.write(result.stdout)
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines()]
        telling = [line for line in lines if "error:" in line] + [
            line for line in lines if line.startswith(("FAILED", "ninja: error"))
        ]
        cause = telling[0] if telling else f"ninja ended with status {result.returncode}"
        raise CannotBuild(f"the compiler failed when fastfusion was installed: {cause}")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the library")
    parser.add_argument("--flags", default="", help="more compiler and linker options")
    parser.add_argument("--portable", action="store_true", help="run on older systems too")
    parser.add_argument("--verbose", action="store_true", help="show the commands")
    arguments = parser.parse_args()
    try:
        print(
            build(
                arguments.out,
                flags=arguments.flags,
                portable=arguments.portable,
                verbose=arguments.verbose,
            )
        )
    except CannotBuild as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
