"""Checks of arguments. Each error names the argument, what was expected and what came.

Every check runs before anything is allocated. They are plain Python on shapes and dtypes, so
``torch.compile`` traces through them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

#: The largest size that a tensor can have.
LARGEST = 2**63 - 1
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


def dense(name: str, value: object, *, dims: int | Sequence[int] | None = None) -> None:
    """A dense tensor of real floating-point numbers, for callers that tell the shape themselves."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(value)}")
    if value.dtype not in DTYPES or value.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor, float32, float64, float16 or bfloat16, "
            f"got {_short(value.dtype)}, {value.layout}"
        )
    allowed = (dims,) if isinstance(dims, int) else dims
    if allowed is not None and value.dim() not in allowed:
        raise ValueError(
            f"{name}: expected {' or '.join(map(str, allowed))} dimensions, "
            f"got shape {tuple(value.shape)}"
        )


def response(name: str, value: object, bands: tuple[int, int]) -> None:
    """A spectral response ``(msi bands, hsi bands)``."""
    dense(name, value)
    assert isinstance(value, Tensor)
    if tuple(value.shape) != bands:
        raise ValueError(
            f"{name}: expected (msi bands, hsi bands) = {bands}, got {tuple(value.shape)}"
        )


def size(name: str, value: Tensor, expected: Sequence[int | None], *, shape: str) -> None:
    """Each size of ``value`` is as expected; None stands for any."""
    actual = value.shape
    if actual == tuple(expected):  # the quick way of most calls
        return
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


def image(name: str, value: object, channels: int, like: Tensor | None = None) -> None:
    """An image ``(B, C, H, W)`` for a layer of so many channels, of its weights' dtype."""
    tensor(name, value, dims=4, shape="(B, C, H, W)")
    assert isinstance(value, Tensor)
    size(name, value, (None, channels, None, None), shape="(B, C, H, W)")
    if like is not None:
        alike(name, value, "the layer's weights", like)


def integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """An integer (bool is none) from ``low`` to ``high``, both included, of at most 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if high is None and isinstance(value, int) and value > LARGEST:
        high = LARGEST
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


def positive(name: str, value: object) -> float:
    """A finite number above 0, given back as a float."""
    if not number(name, value) > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return float(value)  # type: ignore[arg-type]


def at_least(name: str, value: object, low: float, high: float | None = None) -> float:
    """A finite number from ``low`` (to ``high``), given back as a float."""
    if number(name, value) < low or (high is not None and float(value) > high):  # type: ignore[arg-type]
        limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {limits}, got {value}")
    return float(value)  # type: ignore[arg-type]


def placed(device: object, dtype: object) -> None:
    """The ``device=`` and ``dtype=`` of a layer's parameters."""
    if device is not None:
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            raise TypeError(f"device must be a torch.device, its name or None, got {_kind(device)}")
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be 'cpu', 'cuda' or the like, got {device!r}") from error
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {_kind(dtype)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be float32, float64, float16 or bfloat16, got {_short(dtype)}"
        )


def path(name: str, value: object) -> Path:
    """The name of a file or folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be the name of a file or folder, got {_kind(value)}")
    found = os.fspath(value)
    if not isinstance(found, str):
        raise TypeError(f"{name} must be the name of a file or folder as text, got {_kind(found)}")
    if not found or "\0" in found:
        raise ValueError(f"{name} must be the name of a file or folder, got {found!r}")
    return Path(found)


def of_type(name: str, value: object, kind: type, what: str) -> None:
    """An object of one class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {_kind(value)}")


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
