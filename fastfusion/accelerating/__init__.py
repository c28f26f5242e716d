"""`accelerate`: the fast layers inside other people's models, without touching their code."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import nn

from fastfusion.accelerating.activations import following_activations
from fastfusion.accelerating.held import fast_call, held_objects
from fastfusion.accelerating.layers import RECOGNISERS, Found, fused_with
from fastfusion.accelerating.swapping import difference, gain, passed_on, restore, swap

# How many times faster a layer must get on the example: two runs of the same differ by so much.
_WORTH = 1.05

__all__ = ["Acceleration", "Layer", "accelerate"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the model: its name in ``named_modules``, its kind, and what became of it."""

    name: str
    kind: str
    note: str


@dataclasses.dataclass
class Acceleration:
    """What `accelerate` did to a model.

    Attributes:
        swapped: the layers that now run on fastfusion's operators.
        left: the layers that look alike but were left, each with the reason.
        gain: how many times faster the model runs on the example, where one was given.
    """

    model: nn.Module
    swapped: list[Layer]
    left: list[Layer]
    gain: float | None = None

    def restore(self) -> None:
        """Give every swapped layer its own class back."""
        for module in self.model.modules():
            for _, held in held_objects(module):
                restore(held)
            restore(module)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.left)} left"]
        lines += [f"  swapped {row.name}: {row.kind}, {row.note}" for row in self.swapped]
        lines += [f"  left {row.name}: {row.kind}, {row.note}" for row in self.left]
        if self.gain is not None:
            lines.append(f"  {self.gain:.2f} times faster on the example")
        return "\n".join(lines)


def accelerate(model: nn.Module, example: Any = None) -> Acceleration:
    """Swap the layers of a model that fastfusion has operators for, in place.

    Recognised by structure, never by import: depthwise ``nn.Conv2d`` of stride 1 whose padding is
    at most the one that keeps the size, together with a ReLU, GELU or SiLU module that alone uses
    its output (where ``torch.fx`` can trace the model or, with an example, within an
    ``nn.Sequential``); VAN's large-kernel attention; the spectral
    blocks of LSM and LSO; pytorch_wavelets' transforms with the Haar wavelet, and ptwt's
    ``MatrixWavedec2`` and ``MatrixWaverec2`` where they are attributes of a module; in inference
    (``eval()``, without gradients) ConvNeXt's block. A layer is swapped only when it gives the same
    output on a random input. Parameters, buffers, hooks and the state_dict stay as they are.

    Args:
        model: any module.
        example: an input (a tensor or a tuple of arguments). With it a layer is swapped only where
            it gets faster (by 5 % at least) on what the model hands to it there, and the gain of
            the whole is measured; where that is none, everything is restored.

    Returns:
        What was swapped and what was left, with the reason; ``restore()`` undoes it.

    Raises:
        TypeError: ``model`` is no module.

    >>> model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
    >>> print(accelerate(model))
    1 layers swapped, 0 left
      swapped 0: depthwise convolution, 3x3, with relu of 1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Acceleration(model, [], [])
    arguments = None if example is None else example if isinstance(example, tuple) else (example,)
    followers = following_activations(model, arguments)
    seen = {} if arguments is None else _inputs(model, arguments)
    inside: tuple[str, ...] = ()  # what lies in a layer that was swapped whole is not run any more
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        _swap_held(report, name, module, seen)
        if not hasattr(type(module), "accelerated_from"):
            found = next((f for recognise in RECOGNISERS if (f := recognise(module))), None)
            if found is None:
                continue
            if found.forward is None:
                report.left.append(Layer(name, found.kind, found.note))
                continue
            follower = followers.get(name)
            activation = None if follower is None else model.get_submodule(follower)
            problem, note = _swap(module, found, activation, follower, seen.get(module))
            if problem is not None:
                report.left.append(Layer(name, found.kind, problem))
                continue
            report.swapped.append(Layer(name, found.kind, note))
            if not found.whole:
                continue
        inside += (f"{name}." if name else "",)
    if arguments is not None:
        report.gain = _whole_gain(model, arguments) if report.swapped else 1.0
        if report.gain < 1:
            reason = f"each layer gained, the whole model did not: {report.gain:.2f} times"
            report.left += [Layer(row.name, row.kind, reason) for row in report.swapped]
            report.restore()
            report.swapped, report.gain = [], 1.0
    return report


def _swap_held(
    report: Acceleration, name: str, module: nn.Module, seen: dict[Any, tuple[Any, ...]]
) -> None:
    """Swap what a module calls although it is no module."""
    for attribute, held in held_objects(module):
        kind = type(held)
        if hasattr(kind, "accelerated_from"):
            continue
        row = f"{name}.{attribute}" if name else attribute
        call, note = fast_call(held)
        if call is not None and held in seen:
            ratio = gain(held, kind.__call__, call, seen[held])
            if ratio < _WORTH:
                call, note = None, f"no faster on the example: {ratio:.2f} times"
        (report.left if call is None else report.swapped).append(Layer(row, "Haar transform", note))
        if call is not None:
            swap(held, call, "__call__")


def _swap(
    module: nn.Module,
    found: Found,
    activation: nn.Module | None,
    follower: str | None,
    inputs: tuple[Any, ...] | None,
) -> tuple[str | None, str]:
    """Swap a layer, with the activation behind it if that can be; why not, and a note."""
    original, forward, note = type(module).forward, found.forward, found.note
    fused = None if activation is None else fused_with(found, activation)
    assert forward is not None
    if fused is not None:
        alone, (forward, label) = original, fused
        note += f", with {label} of {follower}"

        def original(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return activation(alone(self, x))  # type: ignore[misc]

    problem = difference(module, original, forward, found.example)
    if problem is None and inputs is not None:
        ratio = gain(module, original, forward, inputs)
        if ratio < _WORTH:
            problem = f"no faster on the example: {ratio:.2f} times"
    if problem is not None:
        return problem, note
    swap(module, forward)
    if fused is not None and activation is not None:
        swap(activation, passed_on)
    return None, note


@torch.no_grad()
def _inputs(model: nn.Module, arguments: tuple[Any, ...]) -> dict[Any, tuple[Any, ...]]:
    """What each layer is called with on the example, where it has one positional call."""
    seen: dict[Any, tuple[Any, ...]] = {}
    kinds = {held: type(held) for module in model.modules() for _, held in held_objects(module)}
    handles = [
        module.register_forward_pre_hook(seen.__setitem__)
        for module in model.modules()
        if any(recognise(module) for recognise in RECOGNISERS)
    ]
    for held, kind in kinds.items():
        held.__class__ = _noting(kind, seen)
    try:
        model(*arguments)
    finally:
        for held, kind in kinds.items():
            held.__class__ = kind
        for handle in handles:
            handle.remove()
    return seen


def _noting(kind: type, seen: dict[Any, tuple[Any, ...]]) -> type:
    """A subclass that remembers what its objects are called with."""

    def call(self: Any, *arguments: Any) -> Any:
        seen[self] = arguments
        return kind.__call__(self, *arguments)

    return type(kind.__name__, (kind,), {"__call__": call})


@torch.no_grad()
def _whole_gain(model: nn.Module, arguments: tuple[Any, ...]) -> float:
    """How many times faster the swapped layers make the model, it and the original taking turns."""
    parts = [
        (part, type(part))
        for module in model.modules()
        for part in (module, *(held for _, held in held_objects(module)))
        if hasattr(type(part), "accelerated_from")
    ]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(7):
        for fast, seconds in zip((False, True), times, strict=True):
            for part, kind in parts:
                part.__class__ = kind if fast else kind.accelerated_from
            try:
                start = time.perf_counter()
                model(*arguments)
                seconds.append(time.perf_counter() - start)
            finally:
                for part, kind in parts:
                    part.__class__ = kind
    slow, quick = (statistics.median(seconds[2:]) for seconds in times)
    return slow / quick
