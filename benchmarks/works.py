"""The pieces of work of the GPU's tables: an operator on tensors of a shape, forward or backward.

Bytes and FLOPs come from the operators themselves: the tensors that go in and out, and the
formulas that ``FlopCounterMode`` uses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfusion import ops
from fastfusion.ops.operator import OPERATORS, Operator

SMALL, LARGE = (1, 64, 256, 256), (8, 64, 512, 512)


class _Caught(Exception):
    """Carries the arguments of an op out of the public function that called it."""


class _Catch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastfusion":
            raise _Caught(args)
        return func(*args, **(kwargs or {}))


def op_arguments(call: Callable[[], Any]) -> list[Any]:
    """The arguments, without the backend, of the op that ``call`` would run."""
    try:
        with torch.no_grad(), _Catch():
            call()
    except _Caught as caught:
        return list(caught.args[0][:-1])
    raise AssertionError("no op of this library was called")


@dataclasses.dataclass(frozen=True)
class Work:
    """One line of the tables.

    ``shapes`` gives the tensors by name, ``call`` runs the public function on them.
    """

    operator: str
    label: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[dict[str, Tensor]], Any]
    channels_last: bool = False
    backward: bool = False

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        train = ", forward and backward" if self.backward else ""
        size = " x ".join(str(n) for n in next(iter(self.shapes.values())))
        return " ".join(filter(None, [self.operator, self.label])) + f", {size}{layout}{train}"

    @property
    def definition(self) -> Operator:
        return OPERATORS[self.operator]

    def arguments(self, device: str, dtype: torch.dtype) -> list[Any]:
        """The op's arguments, on fresh random tensors."""
        tensors = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, device=device, dtype=dtype)
            if name != "x" and len(shape) > 1:  # keeps responses near 1
                value /= math.sqrt(math.prod(shape[1:]))
            if self.channels_last and value.dim() == 4 and name == "x":
                value = value.contiguous(memory_format=torch.channels_last)
            tensors[name] = value
        return op_arguments(lambda: self.call(tensors))

    def costs(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes if each input is read once and each output written once, and FLOPs."""
        args = self.arguments("meta", dtype)
        outputs = self.definition.op(*args, "auto")
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        inputs = [value for value in args if isinstance(value, Tensor)]
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in args]
        moved = _bytes(inputs) + _bytes(outputs)
        flops = self.definition.flops(*shapes)
        if self.backward:  # reads the inputs and the outputs' gradients, writes the inputs'
            moved += 2 * _bytes(inputs) + _bytes(outputs)
            wanted = {self.definition.argument_names[i] for i in self.definition.tensors}
            flops += self.definition.backward_flops(*shapes, wanted=wanted)
        return moved, int(flops)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


def _depthwise(k: int, dilation: int, size: tuple[int, ...], **options: Any) -> Work:
    shapes = {"x": size, "weight": (size[1], 1, k, k), "bias": (size[1],)}
    return Work(
        "depthwise_conv2d",
        f"{k}x{k}" + (f" dilation {dilation}" if dilation > 1 else ""),
        shapes,
        lambda t: ops.depthwise_conv2d(t["x"], t["weight"], t["bias"], dilation=dilation),
        **options,
    )


def _large(size: tuple[int, ...], **options: Any) -> Work:
    channels = size[1]
    shapes = {
        "x": size,
        "local_weight": (channels, 1, 5, 5),
        "local_bias": (channels,),
        "context_weight": (channels, 1, 7, 7),
        "context_bias": (channels,),
        "mix_weight": (channels, channels),
        "mix_bias": (channels,),
    }
    return Work(
        "large_kernel_attention",
        "",
        shapes,
        lambda t: ops.large_kernel_attention(*t.values()),
        **options,
    )


def _multiscale(size: tuple[int, ...], **options: Any) -> Work:
    shapes = {"x": size, "small": (size[1], 1, 3, 3), "large": (size[1], 1, 5, 5)}
    return Work(
        "multiscale_attention",
        "3x3 5x5",
        shapes,
        lambda t: ops.multiscale_attention(t["x"], [t["small"], t["large"]], None),
        **options,
    )


def _frequency(mode: str, size: tuple[int, ...], **options: Any) -> Work:
    channels = size[1]
    shapes = {"x": size, "mixing": (2, channels, channels), "kernel": (2, channels, 7, 7)}
    shapes |= dict.fromkeys(("gain", "bias"), (2, channels))
    return Work(
        "frequency_filter2d",
        mode,
        shapes,
        lambda t: ops.frequency_filter2d(
            t["x"], t["mixing"], t["kernel"], gain=t["gain"], bias=t["bias"], padding_mode=mode
        ),
        **options,
    )


def _haar(name: str, size: tuple[int, ...], **options: Any) -> Work:
    return Work(name, "", {"x": size}, lambda t: getattr(ops, name)(t["x"]), **options)


def _mixing(size: tuple[int, ...], **options: Any) -> Work:
    return Work(
        "coordinate_mixing",
        "",
        {"candidates": size, "state": size[:2]},
        lambda t: ops.coordinate_mixing(t["candidates"], t["state"], k=size[2] // 4),
        **options,
    )


def _latent(label: str, size: tuple[int, ...], tokens: int, basis: int, patch: int | None,
            squash: bool, **options: Any) -> Work:  # fmt: skip
    channels = size[1]
    shapes: dict[str, tuple[int, ...]] = {"x": size, "prompts": (8, tokens, channels // 8)}
    for role in ("key", "value", "query"):
        shapes |= {f"{role}_weight": (channels, channels), f"{role}_bias": (channels,)}
    shapes |= dict.fromkeys(("sine", "cosine"), (channels, basis))
    return Work(
        "latent_operator",
        label,
        shapes,
        lambda t: ops.latent_operator(
            **t,
            patch_size=patch,
            squash=squash,
            fundamental=math.pi if squash else math.pi / basis,
        ),
        **options,
    )


#: In the order of their weight: what comes last is left out first when time is short.
WORKS = [
    _latent("LSO 4x4", SMALL, 8, 24, 4, True),
    _depthwise(7, 3, SMALL),
    _frequency("zeros", SMALL),
    _frequency("circular", SMALL),
    _large(SMALL),
    _multiscale(SMALL),
    _haar("haar_dwt2d", SMALL),
    _haar("haar_split2d", SMALL),
    _mixing((4, 128, 128)),
    _depthwise(3, 1, SMALL),
    _depthwise(7, 1, SMALL),
    _depthwise(7, 1, SMALL, channels_last=True),
    _depthwise(31, 1, SMALL),
    _latent("LSM 16x16", SMALL, 4, 12, 16, False),
    _latent("whole image", SMALL, 4, 12, None, False),
    _depthwise(7, 1, LARGE),
    _haar("haar_split2d", LARGE),
    _large(LARGE),
    _frequency("circular", LARGE),
    _latent("LSO 4x4", LARGE, 8, 24, 4, True),
    _latent("LSO 4x4", SMALL, 8, 24, 4, True, backward=True),
    _depthwise(7, 1, SMALL, backward=True),
    _large(SMALL, backward=True),
    _multiscale(SMALL, backward=True),
    _frequency("zeros", SMALL, backward=True),
    _frequency("circular", SMALL, backward=True),
]
