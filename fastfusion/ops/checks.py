"""Checks of arguments. Each error names the argument, what was expected and what came.

Every check runs before anything is allocated. They are plain Python on shapes and dtypes, so
``torch.compile`` traces through them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(name: str, value: object, *, dims: int | Sequence[int], shape: str) -> None:
    """``value`` is a dense floating-point tensor with one of the numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {_kind(value)}")
    if value.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float32, float64, float16 or bfloat16, got {_short(value.dtype)}"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    allowed = (dims,) if isinstance(dims, int) else tuple(dims)
    if value.dim() not in allowed:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def size(name: str, value: Tensor, expected: Sequence[int | None], *, shape: str) -> None:
    """Each size of ``value`` is as expected; None stands for any."""
    actual = value.shape
    if len(actual) != len(expected) or any(
        want is not None and have != want for have, want in zip(actual, expected, strict=True)
    ):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in expected) + ")"
        raise ValueError(f"{name} must have shape {shape} = {wanted}, got {tuple(actual)}")


def alike(name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    """Same device and dtype as the first tensor; under autocast the dtypes may differ."""
    if value.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name}, {first.device}, got {value.device}"
        )
    if value.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
        raise ValueError(
            f"{name} must have the dtype of {first_name}, {_short(first.dtype)}, "
            f"got {_short(value.dtype)}"
        )


def parameter(
    name: str,
    value: object,
    expected: Sequence[int | None],
    *,
    shape: str,
    like: Tensor,
    like_name: str = "x",
) -> None:
    """A tensor argument beside the input: its type, shape, dtype and device in one check."""
    tensor(name, value, dims=len(expected), shape=shape)
    assert isinstance(value, Tensor)
    size(name, value, expected, shape=shape)
    alike(name, value, like_name, like)


def integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """An integer (bool is none) from ``low`` to ``high``, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def pair(name: str, value: object, *, low: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least ``low``; given back as a pair (rows, columns)."""
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an int or a pair of ints, got {tuple(value)}")
        first, second = value
    else:
        first = second = value
    for part in (first, second):
        if isinstance(part, bool) or not isinstance(part, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int or a pair of ints, got {_kind(value)}")
        if part < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    return first, second


def number(name: str, value: object) -> float:
    """A finite real number, given back as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_kind(value)}")


def choice(name: str, value: object, options: Sequence[str | None]) -> None:
    """One of a few words."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be one of {_listed(options)}, got {_kind(value)}")
    if value not in options:
        raise ValueError(f"{name} must be one of {_listed(options)}, got {value!r}")


def _listed(options: Sequence[str | None]) -> str:
    return ", ".join(repr(option) for option in options)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__}"
