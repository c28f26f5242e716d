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

from csrc import build as script

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def _runs_here(capability: str) -> bool:
    """Whether this processor has the instructions."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {
        "baseline": (),
        "avx2": ("avx2", "fma", "f16c"),
        "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    }[capability]
    return all(f" {flag}" in flags for flag in needed)


def _command(source: Path, capability: str) -> list[str]:
    """How ``source`` is compiled for ``capability``, without the name of what comes out."""
    import pybind11

    return [
        *script.find_compiler(),
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


def _target(source: Path, command: list[str]) -> Path:
    """Where the module is kept: one place for each content of the sources it is made of."""
    digest = hashlib.sha256(" ".join([sys.version, *command]).encode())
    included = re.findall(r'#include "(\w+\.cpp)"', source.read_text())
    kernels = [CSRC / "cpu" / name for name in included]
    for path in sorted([source, *kernels, *(CSRC / "cpu").glob("*.h")]):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"fastfusion-native-tests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    return cache / f"{source.stem}_native_{digest.hexdigest()[:16]}.so"


def _compile(source: Path, capabilities: list[str]) -> None:
    """Compile for all of them at once: each takes one core for ten seconds and more."""
    compilers = []
    for capability in capabilities:
        command = _command(source, capability)
        target = _target(source, command)
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}")
            compiler = subprocess.Popen(
                [*command, "-o", str(unfinished)], stderr=subprocess.PIPE, text=True
            )
            compilers.append((compiler, unfinished, target))
    for compiler, unfinished, target in compilers:
        _, said = compiler.communicate()
        assert compiler.returncode == 0, said[-4000:]
        unfinished.replace(target)


def load(source: Path, capability: str) -> ModuleType:
    """The module that ``source`` defines, compiled for ``capability``; skips where it cannot be."""
    pytest.importorskip("pybind11")
    if script.find_compiler() is None:
        pytest.skip("no C++ compiler")
    if capability not in script.CAPABILITIES or not _runs_here(capability):
        pytest.skip(f"this processor has no {capability}")
    _compile(source, [name for name in script.CAPABILITIES if _runs_here(name)])
    target = _target(source, _command(source, capability))
    spec = importlib.util.spec_from_file_location(f"{source.stem}_native", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
