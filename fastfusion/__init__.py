"""fastfusion: custom kernels and fused models for hyperspectral image fusion in PyTorch.

Needs only torch and numpy at import; the compiled libraries, Triton, a GPU and the optional
packages are looked for when something asks for them (see :func:`info`).
"""

from fastfusion import data, losses, metrics, models, nn, ops
from fastfusion._version import __version__
from fastfusion.accelerating import accelerate
from fastfusion.environment import backends, info
from fastfusion.fusing import fuse
from fastfusion.ops.operator import backend

__all__ = [
    "__version__",
    "accelerate",
    "backend",
    "backends",
    "data",
    "fuse",
    "info",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
]
