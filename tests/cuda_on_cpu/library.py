"""Compile csrc/cuda with the host compiler, and let the backend "cuda" take CPU tensors by it.

``pytest -p tests.cuda_on_cpu.library ...`` does so for a whole run: the library is built (ninja,
only what has changed) in the folder ``CUDA_ON_CPU_BUILD``, by default build/cuda_on_cpu, with the
further compiler options in ``CUDA_ON_CPU_FLAGS``.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

#: Whether the backend "cuda" takes CPU tensors in this process.
installed = False


def build_script() -> ModuleType:
    """csrc/build.py."""
    from csrc import build  # is not there where an installed package is tested

    return build


def why_not() -> str | None:
    """None where the library can be built, else the reason."""
    return build_script().why_not()


def build(out: Path, flags: str = "") -> Path:
    """The library in the folder ``out``.

    Raises:
        RuntimeError: with what the compiler said.
    """
    script = build_script()
    torch_folder = Path(torch.__file__).parent
    compiler = shlex.join(script.find_compiler())
    options = [
        "-std=c++20 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi",
        "-Wno-unused-parameter",
        shlex.join(script.TORCH_FLAGS[1:]),
        f"-DUSE_CUDA -I{HERE} -isystem {torch_folder / 'include'}",
    ]
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    library = out / "cuda_on_cpu.so"
    lines = [
        "rule compile",
        f"  command = {compiler} {' '.join(options)} {flags} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared {flags} $in -o $out -L{torch_folder / 'lib'} -ltorch_cpu",
    ]
    objects = []
    for source in [
        *sorted((ROOT / "csrc/cuda").glob("*.cu")),
        HERE / "runtime.cpp",
        HERE / "shim.cpp",
    ]:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {library}: link {' '.join(objects)}")
    (out / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([script.find_ninja(), "-C", str(out)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:])
    return library


def install(library: Path) -> None:
    """Load the library and let every operator's CUDA kernels take CPU tensors by name."""
    from fastfusion.ops.operator import OPERATORS

    global installed
    torch.ops.load_library(str(library))
    installed = True

    def reason(*args: object) -> str | None:
        x = args[0]
        assert isinstance(x, torch.Tensor)
        return "its kernels compute in float32, got float64" if x.dtype == torch.float64 else None

    for operator in OPERATORS.values():
        if "cuda" in operator.backends:
            operator.backends["cuda"] = dataclasses.replace(
                operator.backends["cuda"], why_not=reason
            )


def pytest_configure(config: object) -> None:
    """Called by pytest where this module is named as a plugin."""
    folder = Path(os.environ.get("CUDA_ON_CPU_BUILD", ROOT / "build" / "cuda_on_cpu"))
    install(build(folder, os.environ.get("CUDA_ON_CPU_FLAGS", "")))
