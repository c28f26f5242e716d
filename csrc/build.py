"""Build the compiled libraries with ninja; used by setup.py and by hand while developing.

``python csrc/build.py --out DIR`` leaves ``DIR/_C_cpu.abi3.so``, and ``FASTFUSION_LIBRARY_DIR=DIR``
makes fastfusion load it from there; with ``--cuda`` it is ``DIR/_C_cuda.abi3.so``, which takes nvcc
and no GPU. ``TORCH_CUDA_ARCH_LIST`` names its architectures ("9.0" or "8.0;9.0+PTX"). Torch is
neither imported nor needed where this runs: its headers are found in the environment that the
package is installed into. A portable library, for a wheel, also runs where glibc and libstdc++ are
older than here (portable.py).
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
CUDA_LIBRARY = "_C_cuda.abi3.so"
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

#: Whose machine code is in the CUDA library; later architectures take the PTX of the last.
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
CUDA_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-Werror", "all-warnings"]


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


def find_nvcc() -> str | None:
    """CUDA's compiler: in ``$CUDA_HOME``, on the path, or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def cuda_options(architectures: str | None = None) -> list[str]:
    """nvcc's options for architectures as ``TORCH_CUDA_ARCH_LIST`` writes them.

    >>> cuda_options("8.0 9.0+PTX")
    ['-gencode=arch=compute_80,code=sm_80', '-gencode=arch=compute_90,code=[sm_90,compute_90]']
    """
    named = architectures or os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    options = []
    for name in re.split(r"[;\s]+", named.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+a?)(\+PTX)?", name)
        if match is None:
            raise CannotBuild(
                f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', the part {name!r} is not"
            )
        if int(match[1]) < 8:  # asynchronous copies, bfloat16
            raise CannotBuild(f"the CUDA kernels need compute capability 8.0, not {name}")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


def torch_cuda(torch: Path) -> str | None:
    """The version of CUDA that a torch was built with, without importing it."""
    version = torch / "version.py"
    text = version.read_text() if version.is_file() else ""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return match[1] if match else None


def why_not_cuda() -> str | None:
    """None when the tools for the CUDA library are here (torch aside), else what is missing."""
    if find_nvcc() is None:
        return "nvcc was not found when fastfusion was installed"
    return why_not()


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


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _plan(
    compile_command: str,
    link_command: str,
    sources: list[tuple[Path, str, str]],
    objects: Path,
    library: Path,
) -> str:
    """The ninja file: each source with its object's name and its flags, then the library."""
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compile_command}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        # Under another name at first: nobody loads half a library while this runs.
        f"  command = {link_command} -o $out.partial && mv -f $out.partial $out",
        "  description = link $out",
    ]
    built = []
    for source, target, flags in sources:
        output = _escaped(objects / target)
        lines.extend([f"build {output}: compile {_escaped(source)}", f"  flags = {flags}"])
        built.append(output)
    lines.append(f"build {_escaped(library)}: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


def _cpu_plan(
    torch: Path, compiler: str, objects: Path, library: Path, extra: str, portable: str
) -> str:
    include = f"-isystem {shlex.quote(str(torch / 'include'))}"
    sources = [
        (source, f"{source.stem}.o", f"{shlex.join(TORCH_FLAGS)} {include}")
        for source in [SOURCES / "library.cpp", *sorted((SOURCES / "bindings").glob("*.cpp"))]
    ] + [
        (source, f"{source.stem}.{name}.o", f"{shlex.join(options)} -DFF_CAPABILITY={name}")
        for name, options in CAPABILITIES.items()
        for source in sorted((SOURCES / "cpu").glob("*.cpp"))
    ]
    return _plan(
        f"{compiler} {shlex.join(FLAGS)} $flags {extra} -MMD -MF $out.d -c $in -o $out",
        f"{compiler} -shared {extra} $in "
        # libtorch is named, without a path: the loader finds it by name in the process, where
        # `import torch` has brought it.
        f"-L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu -Wl,--no-undefined "
        f"-Wl,--allow-shlib-undefined -Wl,--as-needed {'' if extra else '-s'} {portable}",
        sources,
        objects,
        library,
    )


def _cuda_folders(nvcc: str) -> str:
    """Where CUDA's own libraries lie, as options; nvcc may be a script that lies elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    match = re.search(r"LIBRARIES=(.*)", told)
    if match is None:
        raise CannotBuild(f"{nvcc} does not tell where its libraries are")
    return shlex.join(shlex.split(match[1]))


def _cuda_plan(
    torch: Path, compiler: str, objects: Path, library: Path, extra: str, portable: str
) -> str:
    nvcc = find_nvcc()
    assert nvcc is not None
    include = f"-isystem {shlex.quote(str(torch / 'include'))}"
    flags = " ".join([*CUDA_FLAGS, *TORCH_FLAGS[1:], *map(shlex.quote, cuda_options())])
    # A torch without CUDA has no libtorch_cuda to link with: its name and the one function that is
    # needed of it will do, and where the kernels run the real one is found.
    stub = objects / "stub"
    stub.mkdir(exist_ok=True)
    subprocess.run(
        [*shlex.split(compiler), "-shared", "-fPIC", "-x", "c++", "-", "-o",
         str(stub / "libtorch_cuda.so"), "-Wl,-soname,libtorch_cuda.so"],
        input='extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n',
        text=True,
        check=True,
    )  # fmt: skip
    return _plan(
        f"{shlex.quote(nvcc)} -ccbin {shlex.quote(compiler)} {flags} $flags {extra} "
        "-Xcompiler=-fPIC,-fvisibility=hidden -MMD -MF $out.d -c $in -o $out",
        f"{compiler} -shared $in {_cuda_folders(nvcc)} -lcudart_static -ldl -lrt -pthread "
        f"-L{shlex.quote(str(stub))} -ltorch_cuda -L{shlex.quote(str(torch / 'lib'))} -ltorch_cpu "
        "-Wl,--exclude-libs,ALL -Wl,--no-undefined -Wl,--allow-shlib-undefined -Wl,--as-needed -s "
        f"{portable}",
        [
            (source, f"{source.stem}.cuda.o", include)
            for source in sorted((SOURCES / "cuda").glob("*.cu"))
        ],
        objects,
        library,
    )


def _portable_link(compiler: list[str], folder: Path) -> list[str]:
    from portable import portable_link  # beside this file; tests load this file alone

    try:
        return portable_link(compiler, folder)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"the compiler failed: {shlex.join(error.cmd)}") from error


def build(
    out: Path,
    *,
    cuda: bool = False,
    objects: Path | None = None,
    flags: str = "",
    portable: bool = False,
    verbose: bool = False,
) -> Path:
    """Build ``_C_cpu``, or ``_C_cuda``, into the folder ``out`` and return its path.

    Args:
        objects: where object files are kept (what has not changed is not compiled again).
        flags: more options for the compiler and the linker, e.g. ``-fsanitize=address``.
        portable: link for older systems too, as a wheel needs it.
        verbose: show the commands.

    Raises:
        CannotBuild: a tool is missing or the compiler fails; the message is one line.
    """
    reason = why_not_cuda() if cuda else why_not()
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
    library = out / (CUDA_LIBRARY if cuda else LIBRARY)
    plan = objects / ("cuda.ninja" if cuda else "build.ninja")
    make_plan = _cuda_plan if cuda else _cpu_plan
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = [ninja, "-f", str(plan), "-C", str(objects), "-j", jobs, *["-v"] * verbose]
    import fcntl  # is on Linux alone, as this is

    with (objects / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not expect another one at the same files
        link = shlex.join(_portable_link(compiler, objects / "portable")) if portable else ""
        plan.write_text(make_plan(torch, shlex.join(compiler), objects, library, flags, link))
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    sys.stdout.write(result.stdout)
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines()]
        telling = [line for line in lines if "error:" in line or ": error" in line] + [
            line for line in lines if line.startswith(("FAILED", "ninja: error"))
        ]
        cause = telling[0] if telling else f"ninja ended with status {result.returncode}"
        raise CannotBuild(f"the compiler failed when fastfusion was installed: {cause}")
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the library")
    parser.add_argument("--cuda", action="store_true", help="the CUDA library")
    parser.add_argument("--flags", default="", help="more compiler and linker options")
    parser.add_argument("--portable", action="store_true", help="run on older systems too")
    parser.add_argument("--verbose", action="store_true", help="show the commands")
    arguments = parser.parse_args()
    try:
        print(
            build(
                arguments.out,
                cuda=arguments.cuda,
                flags=arguments.flags,
                portable=arguments.portable,
                verbose=arguments.verbose,
            )
        )
    except CannotBuild as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
