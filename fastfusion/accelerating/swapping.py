"""Another ``forward`` for one module, by another class, and back; and whether it is the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Forward = Callable[..., Any]
#: Makes a layer's arguments for the check, from a function that draws a tensor of a shape.
Example = Callable[[Callable[..., Tensor]], tuple[Any, ...]]

# How far the swapped layer's output may be from the original's on a random input, relative L2.
# Both are float32 sums of up to 63*63 products; the solver's series in the original is itself
# wrong by 2.5e-5 where its phases are large.
_CLOSE = 1e-4


def swap(module: Any, forward: Forward, method: str = "forward") -> None:
    """Give a module another ``forward``; the module itself, its parameters and hooks stay.

    Of an object that is no module, another ``method``.
    """
    module.__class__ = _fast_class(type(module), forward, method)


def restore(module: Any) -> None:
    """Undo `swap`."""
    original = getattr(type(module), "accelerated_from", None)
    if original is not None:
        module.__class__ = original


def watched(module: nn.Module) -> bool:
    """Whether hooks see what goes in or comes out of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def original_forward(module: nn.Module) -> Forward:
    """What a swapped module's ``forward`` was."""
    return original_method(module, "forward")


def original_method(swapped: Any, method: str) -> Forward:
    """The same of any object's ``method``."""
    return getattr(getattr(type(swapped), "accelerated_from", type(swapped)), method)


def passed_on(self: nn.Module, input: Tensor) -> Tensor:
    """The ``forward`` of an activation that the layer before it has already applied."""
    return input


def difference(
    module: nn.Module, original: Forward, forward: Forward, example: Example
) -> str | None:
    """None where two forwards of a module give the same on a random input, else what differs."""
    like = next(iter([*module.parameters(), *module.buffers()]))
    if like.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    arguments = example(draw)
    modes = {part: part.training for part in module.modules()}
    module.eval()  # what training draws at random is no difference
    with torch.no_grad():
        try:
            expected, found = original(module, *arguments), forward(module, *arguments)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"it cannot be compared: {str(error).splitlines()[0]}"
        finally:
            for part, training in modes.items():
                part.training = training
    return apart(tree_leaves(expected), tree_leaves(found))


def apart(expected: list[Any], found: list[Any]) -> str | None:
    """None where two lists of tensors are the same, else what differs."""
    pairs = list(zip(expected, found, strict=False))
    if len(expected) != len(found) or any(
        not isinstance(truth, Tensor) or truth.shape != y.shape for truth, y in pairs
    ):
        return "its output has another shape than the operator's"
    distance = max(float((t - y).norm() / t.norm().clamp(min=1e-30)) for t, y in pairs)
    if not distance <= _CLOSE:
        return f"its output differs from the operator's by {distance:.1e}"
    return None


@torch.no_grad()
def gain(module: Any, original: Forward, forward: Forward, arguments: tuple[Any, ...]) -> float:
    """How many times faster one forward of a module is than another, the two taking turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(12):
        for function, seconds in zip((original, forward), times, strict=True):
            start = time.perf_counter()
            function(module, *arguments)
            seconds.append(time.perf_counter() - start)
    slow, fast = (statistics.median(seconds[2:]) for seconds in times)
    return slow / fast


_classes: dict[tuple[type, Forward, str], type] = {}


def _fast_class(original: type, forward: Forward, method: str) -> type:
    """A subclass with another ``method`` that copies and pickles as what it is."""
    key = (original, forward, method)
    if key not in _classes:
        members = {
            method: forward,
            "accelerated_from": original,
            "__reduce_ex__": lambda self, protocol: (_rebuild, key, self.__dict__.copy()),
        }
        _classes[key] = type(f"Fast{original.__name__}", (original,), members)
    return _classes[key]


def _rebuild(original: type, forward: Forward, method: str) -> Any:
    fast: Any = _fast_class(original, forward, method)
    return fast.__new__(fast)
