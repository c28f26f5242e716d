"""The choice between the two GPU backends: CUDA C++ or Triton.

One table for all operators: by operator, shape class and architecture, the backend that "auto"
takes, and what that rests on. Nothing was measured yet: every entry is a prediction, with its
reason, and ``make gpu-check`` is what can confirm it. ``fastfusion info`` shows the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

#: For architectures that have no entry of their own.
ANY = "any"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The GPU backend for a class of calls, and what that rests on.

    ``basis`` is ``"predicted"``, or the machine and the command of a measurement.
    """

    backend: Literal["cuda", "triton"]
    reason: str
    basis: str = "predicted"

    def __str__(self) -> str:
        return f"{self.backend} ({self.basis}: {self.reason})"


_MEMORY = "both wait for memory; no Python lies on the way to the launch"
_LAUNCH = "both take three launches, which are all it costs; no Python lies on the way to these"
_WINDOW = "a window of 8 rows in registers: a load serves 8 sums, in Triton one"

#: operator -> shape class -> architecture -> choice.
TABLE: dict[str, dict[str, dict[str, Choice]]] = {
    name: {"all": {ANY: Choice("cuda", _MEMORY)}}
    for name in ("haar_dwt2d", "haar_idwt2d", "haar_split2d")
}
TABLE["spectral_maxima"] = {
    "all": {
        ANY: Choice("cuda", "neighbours by shuffles: a pixel is loaded once, in Triton 3 times")
    }
}
TABLE["spectral_mix"] = TABLE["spectral_maxima"]
TABLE["coordinate_mixing"] = {"all": {ANY: Choice("cuda", _LAUNCH)}}
TABLE["depthwise_conv2d"] = {
    "direct": {ANY: Choice("cuda", _WINDOW)},
    "band": {
        ANY: Choice("triton", "a row of taps is a matrix product there, several times the FMA rate")
    },
}
TABLE["large_kernel_attention"] = {"all": {ANY: Choice("cuda", _WINDOW)}}
TABLE["multiscale_attention"] = {"all": {ANY: Choice("cuda", _WINDOW)}}
TABLE["trigonometric_solve"] = {"all": {ANY: Choice("cuda", _MEMORY)}}
for _name in ("latent_encode", "latent_decode", "latent_operator"):
    TABLE[_name] = {
        "float32": {
            ANY: Choice("cuda", "head by head, half the products, none of them done three times")
        },
        "half": {ANY: Choice("triton", "one TF32 product on the matrix units, several times FMA")},
    }
for _name in ("frequency_filter2d", "frequency_response2d"):
    TABLE[_name] = {
        "all": {ANY: Choice("triton", "the mixing is most of the work, on the matrix units there")}
    }


def _everything(*args: Any) -> str:
    return "all"


def _depthwise(x: Tensor, weight: Tensor, *rest: Any) -> str:
    """Where the Triton kernel computes by matrix units ("band"), and where tap by tap."""
    pays_from = 13 if x.dtype == torch.float32 else 5
    planar = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return "band" if planar and min(weight.shape[-2:]) >= pays_from else "direct"


def _precision(x: Tensor, *rest: Any) -> str:
    return "float32" if x.dtype == torch.float32 else "half"


#: The shape class of a call, for the operators that have more than one.
SHAPE_CLASSES: dict[str, Callable[..., str]] = {
    "depthwise_conv2d": _depthwise,
    **dict.fromkeys(("latent_encode", "latent_decode", "latent_operator"), _precision),
}


def choose(operator: str, *args: Any) -> Choice:
    """The entry for a call of an operator with the arguments of its schema, tensors on a GPU."""
    shape_class = SHAPE_CLASSES.get(operator, _everything)(*args)
    choices = TABLE[operator][shape_class]
    major, minor = torch.cuda.get_device_capability(args[0].device)
    return choices.get(f"sm_{major}{minor}", choices[ANY])


def described() -> dict[str, str]:
    """The table, a line for each entry.

    >>> described()["haar_split2d"].startswith("cuda (predicted: ")
    True
    """
    lines = {}
    for operator, classes in TABLE.items():
        for shape_class, choices in classes.items():
            for architecture, choice in choices.items():
                places = [part for part in (shape_class, architecture) if part not in ("all", ANY)]
                lines[", ".join([operator, *places])] = str(choice)
    return lines
