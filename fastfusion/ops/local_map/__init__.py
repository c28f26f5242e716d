"""Maps that change over an image, given on a coarse grid and applied on the fine one.

What `fastfusion.models.regression` does at full resolution. The mathematics, the kernel and its
costs: README.md in this folder. Not part of the public interface.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastfusion import native
from fastfusion.ops import checks
from fastfusion.ops.local_map import reference
from fastfusion.ops.operator import Operator, image_like


def _flops(coefficients: Any, guides: Any, detail: Any, *rest: Any) -> int:
    """A linear interpolation and a product a coefficient, and with detail a product a guide."""
    batch, targets, terms = coefficients[:3]
    pixels = batch * targets * guides[2] * guides[3]
    return pixels * (3 * terms + (4 if detail is not None else 2) * (terms - 1))


mapping = Operator(
    "local_map(Tensor coefficients, Tensor guides, Tensor? detail, Tensor? sharpness,"
    " SymInt scale, float first_row, float first_column) -> Tensor",
    reference=reference.local_map,
    fake=lambda coefficients, guides, *rest: image_like(
        guides, (guides.shape[0], coefficients.shape[1], *guides.shape[2:])
    ),
    flops=_flops,
    backward_flops=lambda *args, wanted: 2 * _flops(*args),
    batched=("coefficients", "guides", "detail"),
    autocast="widest",
)


def _why_not(*args: Any) -> str | None:
    if native.why_not(native.CPU) is not None:
        return native.why_not(native.CPU)
    if not native.holds(native.CPU, "local_map"):
        return "the compiled CPU library has no kernel for local_map"
    device = args[0].device
    return None if device.type == "cpu" else f"its kernel runs on CPU tensors, got {device}"


mapping.add_backend(
    "cpp",
    forward=lambda *args: native.kernel(native.CPU, "local_map")(*args),
    # No model is trained through it: the definition's is enough.
    backward=mapping._reference_backward,
    why_not=_why_not,
)


def local_map(
    coefficients: Tensor,
    guides: Tensor,
    detail: Tensor | None = None,
    sharpness: Tensor | None = None,
    *,
    scale: int,
    first: tuple[float, float],
    backend: str = "auto",
) -> Tensor:
    """Apply linear maps that are given every ``scale`` pixels and interpolated between.

    ``y_t = c_t0 + sum_i c_ti (guide_i + sharpness_t detail_i)``, the coefficients ``c``
    interpolated linearly along rows and columns.

    Args:
        coefficients: ``(B, G, 1 + g, h, w)``, offset first; sample ``(i, j)`` lies at pixel
            ``first + scale * (i, j)``.
        guides: ``(B, g, H, W)``. detail: the same or None; sharpness: ``(G,)``, with detail only.
        scale: pixels between samples. first: row and column of the first sample, at most 0; the
            last one lies at the last pixel or beyond.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, G, H, W)`` in the dtype of ``guides``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> coefficients = torch.zeros(1, 1, 2, 2, 2)
    >>> coefficients[0, 0, 1, :, 1] = 4  # the slope rises from 0 to 4
    >>> local_map(coefficients, torch.ones(1, 1, 1, 4), scale=4, first=(0, 0))
    tensor([[[[0., 1., 2., 3.]]]])
    """
    checks.tensor("guides", guides, dims=4, shape="(B, g, H, W)")
    batch, count, *size = guides.shape
    checks.parameter(
        "coefficients",
        coefficients,
        (batch, None, 1 + count, None, None),
        shape="(B, G, 1 + g, h, w)",
        like=guides,
        like_name="guides",
    )
    if (detail is None) != (sharpness is None):
        raise ValueError("detail and sharpness must be given together")
    if detail is not None and sharpness is not None:
        checks.parameter(
            "detail", detail, guides.shape, shape="(B, g, H, W)", like=guides, like_name="guides"
        )
        targets = (coefficients.shape[1],)
        checks.parameter(
            "sharpness", sharpness, targets, shape="(G,)", like=guides, like_name="guides"
        )
    checks.integer("scale", scale, low=1)
    for samples, pixels, start in zip(coefficients.shape[3:], size, first, strict=True):
        if samples == 0 or start > 0 or start + scale * (samples - 1) < pixels - 1:
            raise ValueError(
                f"first must be at most 0 and the samples must reach the last pixel, got {start} "
                f"and {samples} samples every {scale} pixels for {pixels} pixels"
            )
    row, column = map(float, first)
    return mapping(coefficients, guides, detail, sharpness, scale, row, column, backend=backend)


__all__ = ["local_map"]
