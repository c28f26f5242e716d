"""What is installed, compiled and loadable here, and why a backend is not available."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from fastfusion import native
from fastfusion._version import __version__
from fastfusion.ops import choice
from fastfusion.ops.operator import OPERATORS

#: Optional packages and the extra that brings each.
OPTIONAL = {
    "triton": "",
    "scipy": "",
    "h5py": "io",
    "pillow": "io",
    "spectral": "io",
    "rasterio": "io",
    "zarr": "io",
    "tqdm": "io",
    "torchmetrics": "io",
    "safetensors": "train",
    "tensorboard": "train",
    "matplotlib": "plot",
}


#: The compiled library of a backend.
_LIBRARIES = {"cpp": native.CPU, "cuda": native.CUDA}


def _triton() -> str:
    if not any("triton" in operator.backends for operator in OPERATORS.values()):
        return "no operator has Triton kernels in this version"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return "available"
    return "no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for checks)"


def _cuda() -> str:
    missing = native.why_not(native.CUDA)
    if missing is not None:
        return missing
    return "available" if torch.cuda.is_available() else "no GPU"


def backends() -> dict[str, str]:
    """Each backend, and ``"available"`` or the reason why it is not.

    >>> backends()["reference"]
    'available'
    """
    return {
        "reference": "available",
        "cpp": native.why_not(native.CPU) or "available",
        "triton": _triton(),
        "cuda": _cuda(),
    }


def info() -> dict[str, Any]:
    """What is installed, compiled and loadable, as a dictionary (``fastfusion info`` prints it).

    >>> sorted(info())[:5]
    ['backends', 'cpu', 'fastfusion', 'gpu', 'gpu_choice']
    """
    return {
        "fastfusion": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "cpu": {
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": native.capability(),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backends": backends(),
        "operators": {
            name: [
                backend
                for backend in operator.backends
                if backend not in _LIBRARIES or native.holds(_LIBRARIES[backend], name)
            ]
            for name, operator in OPERATORS.items()
        },
        "gpu_choice": choice.described(),
        "packages": {name: _version(name) for name in OPTIONAL},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        extra = OPTIONAL[package]
        return "not installed" + (f" (pip install 'fastfusion[{extra}]')" if extra else "")
