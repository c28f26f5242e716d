"""ConvNeXt's block (Liu et al., CVPR 2022; V2: Woo et al., CVPR 2023) without its memory traffic.

Behind the 7x7 convolution the block is ``x + scale * (W2 gelu(W1 norm(y)))``. PyTorch copies the
bias into each product's output, goes over the wide result once more for the GELU, and twice over
the narrow one for the scale and the sum. Here, where only values are asked for, the products are
oneDNN's with bias and GELU inside, as ``torch.compile`` has them, scale and sum are one pass, and
so is V2's global response normalisation behind its norm, ``h * (1 + weight * response) + bias``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastfusion.accelerating.swapping import difference, original_forward, watched

# By the names of transformers, of the authors, of timm, of DINOv3 and of SAM 2.
_NAMES = {
    "convolution": ("dwconv", "conv_dw", "depthwise_conv"),
    "norm": ("layernorm", "norm", "layer_norm"),
    "first": ("pwconv1", "mlp.fc1", "pointwise_conv1"),
    "activation": ("act", "mlp.act", "activation_fn", "activation"),
    "response": ("grn", "mlp.grn"),
    "second": ("pwconv2", "mlp.fc2", "pointwise_conv2"),
    "scale": ("layer_scale_parameter", "gamma", "scale"),
}


def parts(module: nn.Module) -> dict[str, Any] | None:
    """The block's layers by their roles; None where the module is no such block."""
    found: dict[str, Any] = {}
    for role, names in _NAMES.items():
        for name in names:
            owner: Any = module
            for step in name.split("."):
                owner = getattr(owner, step, None)
            if owner is not None:
                found[role] = owner
                break
    kinds = {"convolution": nn.Conv2d, "first": nn.Linear, "second": nn.Linear}
    fits = (
        all(isinstance(found.get(role), kind) for role, kind in kinds.items())
        and isinstance(found.get("norm"), nn.Module)
        and isinstance(found.get("activation"), nn.Module)
        and isinstance(found.get("scale"), Tensor | None)
        and ("response" not in found or len(list(found["response"].parameters())) == 2)
    )
    return found if fits else None


def why_not(module: nn.Module, layers: dict[str, Any]) -> str | None:
    """What speaks against the fast block."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    points = torch.linspace(-4, 4, 33)
    if not torch.allclose(layers["activation"](points), F.gelu(points), atol=1e-6):
        return "another activation than the exact GELU"
    passed_by = [layers.get(role) for role in ("first", "activation", "response", "second")]
    passed_by += [getattr(module, "mlp", None)]
    if any(watched(layer) for layer in passed_by if layer is not None):
        return "hooks on its layers"
    # Of freshly made blocks the scale is 1e-6 or V2's response is 0, which would hide any mistake.
    probe = copy.deepcopy(module)
    if next(probe.parameters()).device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    for values in probe.parameters():
        fresh = torch.randn(values.shape, generator=generator)
        values.data.copy_(fresh / max(1, values[:1].numel()) ** 0.5)
    channels = layers["convolution"].in_channels
    return difference(
        probe, type(module).forward, forward, lambda draw: (draw(2, channels, 12, 13),)
    )


def forward(self: Any, x: Tensor) -> Tensor:
    """The block where only values are asked for; as its authors wrote it everywhere else."""
    layers = parts(self)
    if layers is None or not _values_only(self, x):
        return original_forward(self)(self, x)
    y, norm = layers["convolution"](x), layers["norm"]
    if getattr(norm, "data_format", None) == "channels_first":  # SAM 2's
        y = norm(y).permute(0, 2, 3, 1)
    else:
        y = norm(y.permute(0, 2, 3, 1))
    y = _linear(y, layers["first"], "gelu")
    if "response" in layers:
        y = _normalised(y, *layers["response"].parameters())
    y = _linear(y, layers["second"], "none")
    residual = x.permute(0, 2, 3, 1)
    scale = layers.get("scale")
    y = residual + y if scale is None else torch.addcmul(residual, y, scale)
    return y.permute(0, 3, 1, 2)


def _linear(x: Tensor, layer: nn.Linear, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, activation, [], "none")


def _normalised(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Global response normalisation (ConvNeXt V2, equations 1 to 3), channels in the last place."""
    norm = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)
    response = norm / (norm.mean(-1, keepdim=True) + 1e-6)
    return torch.addcmul(bias, h, 1 + weight * response)


def _values_only(module: nn.Module, x: Any) -> bool:
    """No gradient, no dropped paths, no compiler and no counter that looks at the single ops."""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not module.training
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
        )
    )
