"""fastfusion: custom kernels and fused models for hyperspectral image fusion in PyTorch.

Needs only torch and numpy at import; the compiled libraries, Triton, a GPU and the optional
packages are looked for when something asks for them (see :func:`info`).
"""

from fastfusion import ops
from fastfusion._version import __version__
from fastfusion.accelerating import accelerate
from fastfusion.environment import backends, info
from fastfusion.ops.operator import backend

__all__ = ["__version__", "accelerate", "backend", "backends", "info", "ops"]
