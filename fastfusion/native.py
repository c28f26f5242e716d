"""Find and load the compiled libraries, and remember why one could not be loaded.

Nothing here runs at import: a library is looked for when an operator first asks for it, so a
missing or broken one never stops ``import fastfusion``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent

# The library's name and the namespace in which it registers its kernels.
CPU = "cpu"
CUDA = "cuda"


def library_path(name: str) -> Path | None:
    """The compiled library ``_C_<name>``, or None where there is none.

    It lies inside the package, or in the folder that ``FASTFUSION_LIBRARY_DIR`` names, which is
    asked first.
    """
    named = os.environ.get("FASTFUSION_LIBRARY_DIR")
    folders = [Path(named), PACKAGE] if named else [PACKAGE]
    return next(
        (path for folder in folders for path in sorted(folder.glob(f"_C_{name}*.so"))), None
    )


@functools.cache
def why_not(name: str) -> str | None:
    """Load ``_C_<name>`` once; None when its kernels are there, else the reason."""
    if name == CUDA and torch.version.cuda is None:
        return "this build of torch has no CUDA"
    path = library_path(name)
    if path is None:
        return f"{_not_built(name)} (_C_{name} is not in {PACKAGE})"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded: {str(error).splitlines()[0]}"
    return None


def _not_built(name: str) -> str:
    note = PACKAGE / f"_C_{name}.why_not.txt"  # left by setup.py where a build was not possible
    if note.is_file():
        return note.read_text().strip()
    return "it was not built when fastfusion was installed"


def kernel(library: str, operator: str):
    """The compiled kernel of an operator; call only where :func:`why_not` gave None."""
    return getattr(getattr(torch.ops, f"fastfusion_{library}"), operator).default


def holds(library: str, operator: str) -> bool:
    """Whether the library can be loaded and holds a kernel for the operator."""
    return why_not(library) is None and hasattr(
        getattr(torch.ops, f"fastfusion_{library}"), operator
    )


def capability() -> str:
    """The instruction set that the CPU kernels use, as chosen at run time."""
    if why_not(CPU) is not None:
        return "none"
    return str(torch.ops.fastfusion_cpu.capability())


def requested_capability() -> str | None:
    """What ``FASTFUSION_CPU_CAPABILITY`` asks for, if anything."""
    return os.environ.get("FASTFUSION_CPU_CAPABILITY")
