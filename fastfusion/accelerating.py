"""`accelerate`: the fast layers inside other people's models, without touching their code."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion import ops
from fastfusion.ops.depthwise import LARGEST_KERNEL

__all__ = ["Acceleration", "accelerate"]

Forward = Callable[[Any, Tensor], Tensor]

# How far the swapped layer's output may be from the original's on a random input, relative L2.
# Both are float32 sums of up to 63*63 products; the solver's series in the original is itself
# wrong by 2.5e-5 where its phases are large.
_CLOSE = 1e-4


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
            original = getattr(type(module), "accelerated_from", None)
            if original is not None:
                module.__class__ = original

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.left)} left"]
        lines += [f"  swapped {row.name}: {row.kind}, {row.note}" for row in self.swapped]
        lines += [f"  left {row.name}: {row.kind}, {row.note}" for row in self.left]
        if self.gain is not None:
            lines.append(f"  {self.gain:.2f} times faster on the example")
        return "\n".join(lines)


def accelerate(model: nn.Module, example: Any = None) -> Acceleration:
    """Swap the layers of a model that fastfusion has operators for, in place.

    Recognised by structure, never by import: depthwise ``nn.Conv2d`` of stride 1 that keep the
    size, VAN's large-kernel attention, and the spectral blocks of LSM and LSO. A layer is swapped
    only when it gives the same output on a random input. Parameters, buffers, hooks and the
    state_dict stay as they are.

    Args:
        model: any module.
        example: an input (a tensor or a tuple of arguments) on which to measure the gain.

    Returns:
        What was swapped and what was left, with the reason; ``restore()`` undoes it.

    Raises:
        TypeError: ``model`` is no module.

    >>> model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
    >>> print(accelerate(model))
    1 layers swapped, 0 left
      swapped 0: depthwise convolution, 3x3
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Acceleration(model, [], [])
    before = None if example is None else _seconds(model, example)
    for name, module in model.named_modules():
        if hasattr(type(module), "accelerated_from"):
            continue
        for recognise in (_depthwise, _large_kernel_attention, _spectral_block):
            found = recognise(module)
            if found is None:
                continue
            kind, note, forward, channels, sides = found
            if forward is not None:
                problem = _difference(module, forward, channels, sides)
                if problem is None:
                    module.__class__ = _fast_class(type(module), forward)
                    report.swapped.append(Layer(name, kind, note))
                    continue
                note = problem
            report.left.append(Layer(name, kind, note))
    if before is not None:
        report.gain = before / _seconds(model, example)
    return report


# -- recognising ---------------------------------------------------------------------------------

# The kind, a note or the reason against, the fast forward or None, and an input's channels and
# sides for the check.
_Found = tuple[str, str, Forward | None, int, Sequence[int]]


def _depthwise(module: nn.Module) -> _Found | None:
    if type(module) is not nn.Conv2d or not 1 < module.groups == module.in_channels:
        return None
    kind = "depthwise convolution"
    kernel, spread = module.kernel_size, module.dilation
    same = tuple(d * (k // 2) for d, k in zip(spread, kernel, strict=True))
    reasons = [
        (module.out_channels != module.in_channels, f"{module.out_channels} output channels"),
        (module.stride != (1, 1), f"stride {module.stride}"),
        (any(k % 2 == 0 or k > LARGEST_KERNEL for k in kernel), f"kernel {kernel}"),
        (module.padding not in ("same", same), f"padding {module.padding}"),
        (module.padding_mode != "zeros" and same != (0, 0), f"padding mode {module.padding_mode}"),
    ]
    against = [reason for wrong, reason in reasons if wrong]
    if against:
        return kind, "not covered: " + ", ".join(against), None, 0, ()
    note = f"{kernel[0]}x{kernel[1]}" + (f", dilation {spread}" if spread != (1, 1) else "")
    return kind, note, _depthwise_forward, module.in_channels, (12, 13)


def _depthwise_forward(self: Any, input: Tensor) -> Tensor:
    return ops.depthwise_conv2d(input, self.weight, self.bias, dilation=self.dilation)


def _large_kernel_attention(module: nn.Module) -> _Found | None:
    local, context, mix = (
        getattr(module, name, None) for name in ("conv0", "conv_spatial", "conv1")
    )
    if not (
        isinstance(local, nn.Conv2d)
        and isinstance(context, nn.Conv2d)
        and isinstance(mix, nn.Conv2d)
    ):
        return None
    kind = "large-kernel attention"
    fits = [_depthwise(part) if type(part) is nn.Conv2d else None for part in (local, context)]
    if any(fit is None or fit[2] is None for fit in fits) or mix.kernel_size != (1, 1):
        return (
            kind,
            "not covered: its convolutions are not two depthwise ones and a 1x1",
            None,
            0,
            (),
        )
    channels = local.in_channels
    if mix.groups != 1 or not channels == mix.in_channels == mix.out_channels:
        return kind, "not covered: its 1x1 convolution does not mix all channels", None, 0, ()
    return (
        kind,
        f"{local.kernel_size} and {context.kernel_size}",
        _attention_forward,
        channels,
        (24, 25),
    )


def _attention_forward(self: Any, x: Tensor) -> Tensor:
    return ops.large_kernel_attention(
        x,
        self.conv0.weight,
        self.conv0.bias,
        self.conv_spatial.weight,
        self.conv_spatial.bias,
        self.conv1.weight.flatten(1),
        self.conv1.bias,
        dilation=self.conv_spatial.dilation,
    )


def _spectral_block(module: nn.Module) -> _Found | None:
    """The latent operator of LSM (Wu et al., ICML 2023) and LSO, as their authors wrote it."""
    names = ("weights", "latent", "modes_list", "encoder_attn", "decoder_attn", "patch_size")
    if not all(hasattr(module, name) for name in names):
        return None
    kind = "latent operator"
    latent, series = module.latent, module.weights
    patch: Any = module.patch_size
    if not (isinstance(latent, Tensor) and latent.dim() == 3 and isinstance(series, Tensor)):
        return kind, "not covered: its prompts are no (heads, tokens, width) tensor", None, 0, ()
    channels = latent.shape[0] * latent.shape[2]
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    for forward in (_lsm_forward, _lso_forward):
        if _difference(module, forward, channels, (2 * rows, 3 * columns)) is None:
            return kind, f"patches of {rows}x{columns}", forward, channels, (2 * rows, 3 * columns)
    return kind, "its output is neither LSM's nor LSO's", None, 0, ()


def _lsm_forward(self: Any, x: Tensor) -> Tensor:
    return _latent(self, x, squash=False, scaled=False)


def _lso_forward(self: Any, x: Tensor) -> Tensor:
    return _latent(self, x, squash=True, scaled=True)


def _latent(self: Any, x: Tensor, *, squash: bool, scaled: bool) -> Tensor:
    channels, width = x.shape[1], self.latent.shape[2]
    both = self.encoder_attn.weight.flatten(1)
    query = self.decoder_attn.weight.flatten(1)
    key, key_bias, query_bias = both[0::2], self.encoder_attn.bias[0::2], self.decoder_attn.bias
    if not scaled:  # LSM does not divide its scores by sqrt(d)
        root = math.sqrt(width)
        key, key_bias, query, query_bias = (root * t for t in (key, key_bias, query, query_bias))
    sine, cosine = self.weights.tensor_split(2, dim=1)
    offset = None
    modes = self.modes_list.flatten()
    fundamental = math.pi * float(modes[1] - modes[0]) if len(modes) > 1 else math.pi
    if float(modes[0]) == 0:  # sin(0) = 0 and cos(0) = 1: the first pair is the constant term
        offset, sine, cosine = cosine[:, 0], sine[:, 1:], cosine[:, 1:]
    return ops.latent_operator(
        x,
        self.latent,
        key,
        key_bias,
        both[1::2],
        self.encoder_attn.bias[1::2],
        query.reshape(channels, channels),
        query_bias,
        sine,
        cosine,
        offset,
        patch_size=tuple(self.patch_size)
        if not isinstance(self.patch_size, int)
        else self.patch_size,
        fundamental=fundamental,
        squash=squash,
    )


# -- swapping ------------------------------------------------------------------------------------


def _difference(
    module: nn.Module, forward: Forward, channels: int, sides: Sequence[int]
) -> str | None:
    """None where the fast forward gives what the module gives on a random input."""
    parameter = next(module.parameters())
    if parameter.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *sides, generator=generator).to(parameter)
    with torch.no_grad():
        try:
            expected, found = type(module).forward(module, x), forward(module, x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"it cannot be compared: {str(error).splitlines()[0]}"
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return "its output has another shape than the operator's"
    distance = (expected - found).norm() / expected.norm().clamp(min=1e-30)
    if not distance <= _CLOSE:
        return f"its output differs from the operator's by {distance:.1e}"
    return None


_classes: dict[tuple[type, Forward], type] = {}


def _fast_class(original: type, forward: Forward) -> type:
    """A subclass with another ``forward`` that copies and pickles as what it is."""
    key = (original, forward)
    if key not in _classes:
        members = {
            "forward": forward,
            "accelerated_from": original,
            "__reduce_ex__": lambda self, protocol: (_rebuild, key, self.__dict__.copy()),
        }
        _classes[key] = type(f"Fast{original.__name__}", (original,), members)
    return _classes[key]


def _rebuild(original: type, forward: Forward) -> Any:
    fast: Any = _fast_class(original, forward)
    return fast.__new__(fast)


def _seconds(model: nn.Module, example: Any) -> float:
    arguments = example if isinstance(example, tuple) else (example,)
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            model(*arguments)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
