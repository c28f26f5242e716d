"""In which precision the definitions compute."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

LOW = (torch.float16, torch.bfloat16)


@overload
def wide(x: Tensor) -> Tensor: ...
@overload
def wide(x: None) -> None: ...
@overload
def wide(x: Tensor | None) -> Tensor | None: ...
def wide(x: Tensor | None) -> Tensor | None:
    """The tensor in at least float32, which is what every backend accumulates in."""
    return x.float() if x is not None and x.dtype in LOW else x
