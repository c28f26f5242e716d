"""Build, on demand, a module that binds inner C++ functions, for one instruction set."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def _build_script() -> ModuleType:
    """csrc/build.py, which knows the compiler and the instruction sets' options."""
    spec = importlib.util.spec_from_file_location("fastfusion_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runs_here(capability: str) -> bool:
    """Whether this processor has the instructions."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {
        "baseline": (),
        "avx2": ("avx2", "fma", "f16c"),
        "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    }[capability]
    return all(f" {flag}" in flags for flag in needed)


def load(source: Path, capability: str) -> ModuleType:
    """The module that ``source`` defines, compiled for ``capability``; skips where it cannot be."""
    pybind11 = pytest.importorskip("pybind11")
    script = _build_script()
    compiler = script.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    if capability not in script.CAPABILITIES or not _runs_here(capability):
        pytest.skip(f"this processor has no {capability}")
    command = [
        *compiler,
        *(flag for flag in script.FLAGS if flag not in ("-Wall", "-Wextra")),
        *(flag for flag in script.CAPABILITIES[capability] if not flag.startswith("-O")),
        "-O1",
        "-shared",
        f"-DFF_CAPABILITY={capability}",
        f"-I{CSRC / 'cpu'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        str(source),
    ]
    digest = hashlib.sha256(" ".join([sys.version, *command]).encode())
    included = re.findall(r'#include "(\w+\.cpp)"', source.read_text())
    kernels = [CSRC / "cpu" / name for name in included]
    for path in sorted([source, *kernels, *(CSRC / "cpu").glob("*.h")]):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"fastfusion-native-tests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    name = f"{source.stem}_native"
    target = cache / f"{name}_{digest.hexdigest()[:16]}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        unfinished.replace(target)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
