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

#: operator -> shape class -> architecture -> choice.
TABLE: dict[str, dict[str, dict[str, Choice]]] = {
    name: {"all": {ANY: Choice("cuda", _MEMORY)}}
    for name in ("haar_dwt2d", "haar_idwt2d", "haar_split2d")
}


def _everything(*args: Any) -> str:
    return "all"


#: The shape class of a call, for the operators that have more than one.
SHAPE_CLASSES: dict[str, Callable[..., str]] = {}


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
