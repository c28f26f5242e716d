"""Optional libraries, asked for where they are needed and never at import."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or say what needs it and how to install it.

    Args:
        module: name to import, for example ``"h5py"`` or ``"matplotlib.pyplot"``.
        extra: the extra of this package that brings it, for example ``"io"``.
        purpose: what it is needed for, as the start of a sentence.

    Raises:
        ImportError: with the command that mends it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {name}, which cannot be imported ({error}): "
            f"pip install 'fastfusion[{extra}]'"
        ) from error
