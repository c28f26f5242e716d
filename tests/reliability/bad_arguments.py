"""A generated table of calls with one bad argument, for every public function.

Each `Public` is a call that works, and for each of its arguments the *kind* of it, from which the
bad values follow: wrong types, shapes, ranges, dtypes, devices, layouts and extremes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: So many elements that no machine holds them: a check that computes with them would be noticed.
HUGE = 1 << 40

Bad = tuple[str, Any]  # what is wrong, and the value
Kind = Callable[[Any], Iterator[Bad]]


class Thing:
    """Of no type that any argument may have."""

    def __repr__(self) -> str:
        return "Thing()"


@dataclasses.dataclass
class Public:
    """A public function, a call of it that works, and the kinds of its arguments.

    ``together`` are names that the message may give instead of the argument's own, where several
    have to fit together; a wrong *type* has to be told under its own name.
    """

    name: str
    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    kinds: dict[str, Kind]
    errors: tuple[type[Exception], ...] = ()  # documented beside TypeError and ValueError
    together: tuple[str, ...] = ()

    def cases(self) -> Iterator[tuple[str, str, Any]]:
        """Argument, what is wrong with it, the value."""
        good = self.good()
        for argument, kind in self.kinds.items():
            for what, value in kind(good.get(argument)):
                yield argument, what, value


def _types(*allowed: type, none: bool) -> Iterator[Bad]:
    values: list[Any] = [None, 3, 2.5, True, "words", b"bytes", [1.0], {"a": 1}, Thing(), 1j]
    values += [np.ones(3), torch.ones(3), float]
    for value in values:
        if (value is None and none) or (allowed and isinstance(value, allowed)):
            continue
        yield f"type {type(value).__name__}", value


def tensor(
    *,
    optional: bool = False,
    dtypes: bool = True,
    alone: bool = False,
    shapes: Sequence[tuple[int, ...]] | None = None,
    array: bool = False,
    fixed: Sequence[int] | None = None,
    ndims: Sequence[int] = (),
    huge: bool = True,
    values: bool = False,
    like: Sequence[int] = (),
) -> Kind:
    """A tensor beside others; ``alone`` where no other tensor's dtype and device bind it.

    ``fixed`` are the axes whose size something else decides (all by default), ``ndims`` more
    numbers of dimensions that are good, ``values``: they have to be finite and within a range;
    ``like``: the shape of a good one, for an argument that is left out in the good call.
    """

    def bad(good: Any) -> Iterator[Bad]:
        good = torch.rand(like) if good is None else good
        for what, value in _types(Tensor, *([np.ndarray] if array else []), none=optional):
            yield what, value
        size = tuple(good.shape)
        options: dict[str, Any] = {"dtype": good.dtype} if isinstance(good, Tensor) else {}

        def make(shape: Sequence[int]) -> Any:
            if isinstance(good, Tensor):
                return torch.zeros(shape, **options)
            return np.zeros(shape, good.dtype)

        for shape in shapes if shapes is not None else [(), size[1:], (*size, 1), (1, 1, *size)]:
            if len(shape) not in (len(size), *ndims):
                yield f"shape {shape}", make(shape)
        for axis in range(len(size)) if fixed is None else fixed:
            for change in (61, -1):
                length = size[axis] + change
                if length >= 0 and (change > 0 or length > 0):
                    wrong = [*size[:axis], length, *size[axis + 1 :]]
                    yield f"size {tuple(wrong)}", make(wrong)
        if huge and (fixed is None or fixed):
            axis = (range(len(size)) if fixed is None else fixed)[0]
            wrong = [*size[:axis], HUGE, *size[axis + 1 :]]
            value = make(()) if isinstance(good, Tensor) else np.zeros((), good.dtype)
            spread = value.expand(wrong) if isinstance(good, Tensor) else None
            yield (
                f"huge {tuple(wrong)}",
                spread if spread is not None else np.broadcast_to(value, wrong),
            )
        if dtypes:
            for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64):
                value = torch.zeros(size, dtype=dtype)
                yield f"dtype {dtype}", value if isinstance(good, Tensor) else value.numpy()
            if isinstance(good, Tensor):
                yield "dtype float8", torch.zeros(size).to(torch.float8_e4m3fn)
        if isinstance(good, Tensor) and not alone:
            for dtype in (torch.float64, torch.float16, torch.bfloat16):
                yield f"mixed with {dtype}", good.to(dtype)
            yield "on meta", good.to("meta")
        if isinstance(good, Tensor) and dtypes:
            yield "sparse", good.to_sparse()
        if values:
            for name, number in (("nan", float("nan")), ("inf", float("inf")), ("large", 1e9)):
                spoilt = good.copy() if isinstance(good, np.ndarray) else good.clone()
                spoilt[(0,) * len(size)] = number
                yield name, spoilt

    return bad


def integer(
    low: int | None, high: int | None = None, *, optional: bool = False, pair: bool = False
) -> Kind:
    """A whole number from ``low`` to ``high``; ``pair`` where two of them are good too."""

    def bad(good: Any) -> Iterator[Bad]:
        for what, value in _types(none=optional):
            if type(value) is not int and not (pair and isinstance(value, list)):
                yield what, value
        yield "a number as text", "3"
        yield "nan", float("nan")
        yield "not whole", 1.5
        for value in [*([] if low is None else [low - 1, low - 1000, -(2**63), -(2**70)])]:
            yield f"value {value}", value
        for value in [*([] if high is None else [high + 1, 2**31, 2**63, 2**70])]:
            yield f"value {value}", value
        if pair and low is not None:
            yield "half a pair", (low,)
            yield "three", (low, low, low)
            yield "pair with too small a part", (low, low - 1)
            yield "pair of texts", ("1", "1")
            yield "pair with None", (low, None)
            yield "pair of fractions", (low + 0.5, low)

    return bad


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
    optional: bool = False,
    infinite: bool = False,
) -> Kind:
    """A real number from ``low`` (or ``above`` it) to ``high``."""

    def bad(good: Any) -> Iterator[Bad]:
        for what, value in _types(none=optional):
            if type(value) not in (int, float):
                yield what, value
        yield "a number as text", "1.0"
        yield "nan", float("nan")
        if low is not None:
            yield "below", low - 0.5
            yield "far below", -1e300
            yield "-inf", float("-inf")
            if above:
                yield "the limit", low
        if high is not None:
            yield "over", high + 0.5
        if not infinite:
            yield "inf", float("inf")

    return bad


def flag() -> Kind:
    """True or False."""

    def bad(good: Any) -> Iterator[Bad]:
        yield from _types(bool, none=False)
        yield "0", 0
        yield "1", 1
        yield "a word", "true"

    return bad


def choice(*, optional: bool = False) -> Kind:
    """One of a few words."""

    def bad(good: Any) -> Iterator[Bad]:
        yield from _types(str, none=optional)
        for word in ("", "no such", f"{good} ", f"{good}".swapcase(), "a" * 10_000, "\0"):
            yield f"word {word[:20]!r}", word

    return bad


def path(*, missing: bool = True, optional: bool = False) -> Kind:
    """A file's name."""

    def bad(good: Any) -> Iterator[Bad]:
        yield from _types(str, none=optional)
        if missing:
            for word in (
                "/nowhere/at/all.npy",
                "",
                "a" * 5000,
                "/",
                "zero\0.npy",
                "/dev/null/x.npy",
            ):
                yield f"name {word[:20]!r}", word

    return bad


def sequence(*, optional: bool = False, items: Sequence[Bad] = ()) -> Kind:
    """A list whose bad contents are told by ``items``."""

    def bad(good: Any) -> Iterator[Bad]:
        yield from _types(list, tuple, none=optional)
        yield from items

    return bad


def some(*bads: Bad) -> Kind:
    """What is bad about an argument of a kind of its own."""
    return lambda good: iter(bads)


def any_type(*allowed: type, optional: bool = False) -> Kind:
    """Only its type is told."""
    return lambda good: _types(*allowed, none=optional)


def both(*kinds: Kind) -> Kind:
    """One after the other."""

    def bad(good: Any) -> Iterator[Bad]:
        for kind in kinds:
            yield from kind(good)

    return bad
