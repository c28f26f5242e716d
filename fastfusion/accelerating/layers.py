"""The layers that fastfusion has operators for, recognised by what they hold and compute."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastfusion import ops
from fastfusion.accelerating import convnext
from fastfusion.accelerating.activations import label
from fastfusion.accelerating.swapping import Example, Forward, difference, original_forward
from fastfusion.ops.depthwise import LARGEST_KERNEL


@dataclasses.dataclass(frozen=True)
class Found:
    """A layer of a known kind: its fast forward, or in the note the reason why there is none.

    A ``whole`` layer no longer calls the layers inside it.
    """

    kind: str
    note: str
    forward: Forward | None = None
    example: Example = lambda draw: ()
    whole: bool = True


# -- depthwise convolution -----------------------------------------------------------------------


def depthwise(module: nn.Module) -> Found | None:
    if not isinstance(module, nn.Conv2d) or not 1 < module.groups == module.in_channels:
        return None
    kind = "depthwise convolution"
    if is_parametrized(module):
        return Found(kind, "not covered: a parametrization, which has a class of its own")
    if not _plain(module):
        return Found(kind, f"not covered: {type(module).__name__} has a forward of its own")
    kernel, spread = module.kernel_size, module.dilation
    same = _same(module)
    reasons = [
        (module.out_channels != module.in_channels, f"{module.out_channels} output channels"),
        (module.stride != (1, 1), f"stride {module.stride}"),
        (any(k % 2 == 0 or k > LARGEST_KERNEL for k in kernel), f"kernel {kernel}"),
        (any(c < 0 for c in _cut(module)), f"padding {module.padding}"),
        (module.padding_mode != "zeros" and same != (0, 0), f"padding mode {module.padding_mode}"),
    ]
    against = [reason for wrong, reason in reasons if wrong]
    if against:
        return Found(kind, "not covered: " + ", ".join(against))
    note = f"{kernel[0]}x{kernel[1]}" + (f", dilation {spread}" if spread != (1, 1) else "")
    channels, rows, columns = module.in_channels, 12 + 2 * same[0], 13 + 2 * same[1]
    return Found(kind, note, _depthwise_forward, lambda draw: (draw(2, channels, rows, columns),))


def _plain(module: nn.Conv2d) -> bool:
    """Whether a subclass computes what ``nn.Conv2d`` does."""
    kind = type(module)
    return (kind.forward, kind._conv_forward) == (nn.Conv2d.forward, nn.Conv2d._conv_forward)


def _same(module: nn.Conv2d) -> tuple[int, ...]:
    """The padding that keeps the size."""
    return tuple(d * (k // 2) for d, k in zip(module.dilation, module.kernel_size, strict=True))


def _cut(module: nn.Conv2d) -> tuple[int, ...]:
    """By how much less the module pads: what is to be cut off at each edge."""
    if isinstance(module.padding, str):
        return (0, 0) if module.padding == "same" else _same(module)
    return tuple(s - p for s, p in zip(_same(module), module.padding, strict=True))


def _depthwise_forward(self: Any, input: Tensor, activation: str | None = None) -> Tensor:
    rows, columns = _cut(self)
    if input.dim() != 4 or 2 * rows >= input.shape[2] or 2 * columns >= input.shape[3]:
        y = original_forward(self)(self, input)  # one image without a batch, or the module's error
        return y if activation is None else _ACTIVATIONS[activation](y)
    y = ops.depthwise_conv2d(
        input, self.weight, self.bias, dilation=self.dilation, activation=activation
    )
    if rows == columns == 0:
        return y
    layout = (
        torch.channels_last
        if y.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    y = y[:, :, rows : y.shape[2] - rows, columns : y.shape[3] - columns]
    return y.contiguous(memory_format=layout)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


# Functions of their own, so that a swapped layer can be pickled.
def _depthwise_relu(self: Any, input: Tensor) -> Tensor:
    return _depthwise_forward(self, input, "relu")


def _depthwise_gelu(self: Any, input: Tensor) -> Tensor:
    return _depthwise_forward(self, input, "gelu")


def _depthwise_silu(self: Any, input: Tensor) -> Tensor:
    return _depthwise_forward(self, input, "silu")


_FUSED = {"relu": _depthwise_relu, "gelu": _depthwise_gelu, "silu": _depthwise_silu}


def fused_with(found: Found, activation: nn.Module) -> tuple[Forward, str] | None:
    """The forward of a layer that applies the activation behind it too, with its name."""
    name = label(activation)
    if found.forward is not _depthwise_forward or name is None:
        return None
    return _FUSED[name], name


# -- large-kernel attention ----------------------------------------------------------------------


def large_kernel_attention(module: nn.Module) -> Found | None:
    parts = _attention_parts(module)
    if parts is None:
        return None
    local, context, mix = parts
    kind = "large-kernel attention"
    fits = [depthwise(part) for part in (local, context)]
    channels = local.in_channels
    if any(fit is None or fit.forward is None for fit in fits) or mix.kernel_size != (1, 1):
        why = "its convolutions are not two depthwise ones and a 1x1"
    elif mix.groups != 1 or not channels == mix.in_channels == mix.out_channels:
        why = "its 1x1 convolution does not mix all channels"
    else:
        example: Example = lambda draw: (draw(2, channels, 24, 25),)  # noqa: E731
        forward = _attention_forward
        if hasattr(module, "conv_spatial") or not difference(
            module, type(module).forward, forward, example
        ):
            note = f"{local.kernel_size} and {context.kernel_size}"
            return Found(kind, note, forward, example)
        return None  # three convolutions that are something else
    return Found(kind, f"not covered: {why}") if hasattr(module, "conv_spatial") else None


def _attention_parts(module: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d] | None:
    """Local, context and mixing convolution: by VAN's names, or all that a module holds."""
    names = ("conv0", "conv_spatial", "conv1")
    parts = [getattr(module, name, None) for name in names]
    if any(part is None for part in parts):
        parts = list(module.children())
    if len(parts) != 3 or not all(isinstance(part, nn.Conv2d) for part in parts):
        return None
    return tuple(parts)  # type: ignore[return-value]


def _attention_forward(self: Any, x: Tensor) -> Tensor:
    parts = _attention_parts(self)
    assert parts is not None
    local, context, mix = parts
    return ops.large_kernel_attention(
        x,
        local.weight,
        local.bias,
        context.weight,
        context.bias,
        mix.weight.flatten(1),
        mix.bias,
        dilation=(context.dilation[0], context.dilation[1]),
    )


# -- latent operator -----------------------------------------------------------------------------


def spectral_block(module: nn.Module) -> Found | None:
    """The latent operator of LSM (Wu et al., ICML 2023) and LSO, as their authors wrote it."""
    names = ("weights", "latent", "modes_list", "encoder_attn", "decoder_attn", "patch_size")
    if not all(hasattr(module, name) for name in names):
        return None
    kind = "latent operator"
    latent, series = module.latent, module.weights
    patch: Any = module.patch_size
    if not (isinstance(latent, Tensor) and latent.dim() == 3 and isinstance(series, Tensor)):
        return Found(kind, "not covered: its prompts are no (heads, tokens, width) tensor")
    channels = latent.shape[0] * latent.shape[2]
    rows, columns = (patch, patch) if isinstance(patch, int) else patch

    def example(draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        return (draw(2, channels, 2 * rows, 3 * columns),)

    for forward in (_lsm_forward, _lso_forward):
        if difference(module, type(module).forward, forward, example) is None:
            return Found(kind, f"patches of {rows}x{columns}", forward, example)
    return Found(kind, "its output is neither LSM's nor LSO's")


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


# -- Haar ----------------------------------------------------------------------------------------


def haar_analysis(module: nn.Module) -> Found | None:
    """pytorch_wavelets' ``DWTForward``."""
    return _haar(
        module, "h0_col", "h1_row", ("J", "mode"), _analysis, lambda draw: (draw(2, 3, 8, 16),)
    )


def haar_synthesis(module: nn.Module) -> Found | None:
    """pytorch_wavelets' ``DWTInverse``."""
    return _haar(
        module,
        "g0_col",
        "g1_row",
        ("mode",),
        _synthesis,
        lambda draw: ((draw(2, 3, 4, 5), [draw(2, 3, 3, 8, 10), draw(2, 3, 3, 4, 5)]),),
    )


def _haar(
    module: nn.Module,
    first: str,
    last: str,
    settings: tuple[str, ...],
    forward: Forward,
    example: Example,
) -> Found | None:
    filters = [getattr(module, name, None) for name in (first, last)]
    if not all(isinstance(f, Tensor) for f in filters):
        return None
    if not all(hasattr(module, name) for name in settings):
        return None
    kind = "Haar transform"
    if any(f is None or f.numel() != 2 for f in filters):
        return Found(kind, "not covered: another wavelet than Haar's")
    levels = getattr(module, "J", 0)
    if isinstance(levels, int) and levels:
        sides = 2**levels
        example = lambda draw: (draw(2, 3, 2 * sides, 3 * sides),)  # noqa: E731
    return Found(kind, "of pytorch_wavelets", forward, example)


def _analysis(self: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    whole = 2**self.J
    if self.mode != "symmetric" and (x.shape[-2] % whole or x.shape[-1] % whole):
        return original_forward(self)(self, x)  # odd sides, which each mode extends in its way
    details = []
    for _ in range(self.J):
        x, *bands = ops.haar_dwt2d(x)
        details.append(torch.stack(bands, dim=2))
    return x, details


def _synthesis(self: Any, coeffs: tuple[Tensor, list[Tensor | None]]) -> Tensor:
    x, details = coeffs
    for bands in reversed(details):
        if bands is None:
            bands = x.new_zeros(*x.shape[:2], 3, *x.shape[2:])
        x = x[..., : bands.shape[-2], : bands.shape[-1]]
        x = ops.haar_idwt2d(x, *bands.unbind(2))
    return x


# -- ConvNeXt ------------------------------------------------------------------------------------


def convnext_block(module: nn.Module) -> Found | None:
    parts = convnext.parts(module)
    if parts is None:
        return None
    kind = "ConvNeXt block"
    problem = convnext.why_not(module, parts)
    if problem is not None:
        return Found(kind, f"not covered: {problem}")
    channels = parts["convolution"].in_channels
    example: Example = lambda draw: (draw(2, channels, 12, 13),)  # noqa: E731
    return Found(kind, f"{channels} channels, in inference", convnext.forward, example, whole=False)


RECOGNISERS: tuple[Callable[[nn.Module], Found | None], ...] = (
    depthwise,
    large_kernel_attention,
    spectral_block,
    haar_analysis,
    haar_synthesis,
    convnext_block,
)
