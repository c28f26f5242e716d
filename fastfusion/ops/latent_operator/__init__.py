"""LSO's latent operator: cross-attention to tokens, a trigonometric solver, and back.

The mathematics, the kernels and their costs: README.md in this folder.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastfusion.ops import checks
from fastfusion.ops.latent_operator import reference
from fastfusion.ops.operator import Operator, image_like

_IMAGE = "(B, C, H, W)"


def _count(size: int, patch: int) -> int:
    return -(-size // patch)


def _grid(x: Any, ph: int, pw: int) -> int:
    return _count(x[-2], ph) * _count(x[-1], pw)


def _padded_pixels(x: Any, ph: int, pw: int) -> int:
    return x[0] * _grid(x, ph, pw) * ph * pw


def _project_flops(x: Any, ph: int, pw: int) -> int:
    return 2 * _padded_pixels(x, ph, pw) * x[1] * x[1]


def _attend_flops(x: Any, tokens: int, ph: int, pw: int) -> int:
    # Two products of pixels with tokens, head by head: scores, and the weighted sum.
    return 4 * _padded_pixels(x, ph, pw) * tokens * x[1]


def _encode_flops(x: Any, prompts: Any, *rest: Any) -> int:
    ph, pw = rest[-2:]
    return 2 * _project_flops(x, ph, pw) + _attend_flops(x, prompts[1], ph, pw)


def _solve_flops(latents: Any, sine: Any, *rest: Any) -> int:
    batch, patches, tokens, channels = latents
    return 4 * batch * patches * tokens * channels * sine[1]


def _decode_flops(x: Any, latents: Any, *rest: Any) -> int:
    ph, pw = rest[-2:]
    return _project_flops(x, ph, pw) + _attend_flops(x, latents[2], ph, pw)


def _operator_flops(x: Any, prompts: Any, *rest: Any) -> int:
    sine, ph, pw = rest[6], rest[9], rest[10]
    latents = (x[0], _grid(x, ph, pw), prompts[1], x[1])
    return (
        _encode_flops(x, prompts, ph, pw)
        + _solve_flops(latents, sine)
        + _decode_flops(x, latents, ph, pw)
    )


encode = Operator(
    "latent_encode(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,"
    " Tensor value_weight, Tensor value_bias, SymInt patch_rows, SymInt patch_columns) -> Tensor",
    reference=reference.latent_encode,
    fake=lambda x, prompts, kw, kb, vw, vb, ph, pw: x.new_empty(
        x.shape[0], _grid(x.shape, ph, pw), prompts.shape[1], x.shape[1]
    ),
    flops=_encode_flops,
    backward_flops=lambda *args, wanted: 3 * _encode_flops(*args),
    batched=("x",),
    autocast="lower",
)
solve = Operator(
    "trigonometric_solve(Tensor latents, Tensor sine, Tensor cosine, Tensor? offset,"
    " float fundamental, bool squash) -> Tensor",
    reference=reference.trigonometric_solve,
    fake=lambda latents, *rest: latents.new_empty(latents.shape),
    flops=_solve_flops,
    backward_flops=lambda *args, wanted: 2 * _solve_flops(*args),
    batched=("latents",),
    autocast="float32",
)
decode = Operator(
    "latent_decode(Tensor x, Tensor latents, Tensor query_weight, Tensor query_bias,"
    " SymInt heads, SymInt patch_rows, SymInt patch_columns) -> Tensor",
    reference=reference.latent_decode,
    fake=lambda x, *rest: image_like(x),
    flops=_decode_flops,
    backward_flops=lambda *args, wanted: 3 * _decode_flops(*args),
    batched=("x", "latents"),
    autocast="lower",
)
operator = Operator(
    "latent_operator(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,"
    " Tensor value_weight, Tensor value_bias, Tensor query_weight, Tensor query_bias,"
    " Tensor sine, Tensor cosine, Tensor? offset, SymInt patch_rows, SymInt patch_columns,"
    " float fundamental, bool squash) -> Tensor",
    reference=reference.latent_operator,
    fake=lambda x, *rest: image_like(x),
    flops=_operator_flops,
    backward_flops=lambda *args, wanted: 3 * _operator_flops(*args),
    batched=("x",),
    autocast="lower",
)
for _operator in (encode, solve, decode, operator):
    _operator.add_cpp()
_KERNELS = "fastfusion.ops.latent_operator.kernels"


def _too_wide(channels: int, heads: int, tokens: int, basis: int = 1) -> str | None:
    from fastfusion.ops.latent_operator import kernels

    return kernels.why_not(channels, heads, tokens, basis)


encode.add_triton(
    _KERNELS, why_not=lambda x, prompts, *rest: _too_wide(x.shape[1], *prompts.shape[:2])
)
solve.add_triton(_KERNELS, why_not=lambda z, sine, *rest: _too_wide(1, 1, 1, sine.shape[1]))
decode.add_triton(
    _KERNELS,
    why_not=lambda x, z, qw, qb, heads, *rest: _too_wide(x.shape[1], heads, z.shape[2]),
)
operator.add_triton(
    _KERNELS,
    why_not=lambda x, prompts, *rest: _too_wide(
        x.shape[1], prompts.shape[0], prompts.shape[1], rest[6].shape[1]
    ),
)


def _too_large(channels: int, heads: int, tokens: int) -> str | None:
    """What does not fit into a block's shared memory, even with four pixels at a time."""
    if channels > 256:
        return f"its kernels take up to 256 channels, got {channels}"
    if channels // heads > 64:
        return f"its kernels take up to 64 channels a head, got {channels // heads}"
    return f"its kernels take up to 64 tokens, got {tokens}" if tokens > 64 else None


encode.add_cuda(why_not=lambda x, prompts, *rest: _too_large(x.shape[1], *prompts.shape[:2]))
solve.add_cuda()
decode.add_cuda(
    why_not=lambda x, z, qw, qb, heads, *rest: _too_large(x.shape[1], heads, z.shape[2])
)
operator.add_cuda(why_not=lambda x, prompts, *rest: _too_large(x.shape[1], *prompts.shape[:2]))


def _check_image(x: object) -> None:
    checks.tensor("x", x, dims=4, shape=_IMAGE)


def _check_projection(name: str, weight: Tensor, bias: Tensor, x: Tensor) -> None:
    channels = x.shape[1]
    checks.parameter(f"{name}_weight", weight, (channels, channels), shape="(C, C)", like=x)
    checks.parameter(f"{name}_bias", bias, (channels,), shape="(C,)", like=x)


def _check_prompts(prompts: Tensor, x: Tensor) -> None:
    checks.parameter("prompts", prompts, (None, None, None), shape="(heads, T, d)", like=x)
    heads, tokens, width = prompts.shape
    if heads * width != x.shape[1]:
        raise ValueError(
            f"prompts must have shape (heads, T, d) with heads*d = C = {x.shape[1]}, "
            f"got {tuple(prompts.shape)}"
        )
    if tokens < 1:
        raise ValueError(f"prompts must hold at least one token, got {tuple(prompts.shape)}")


def _check_solver(
    sine: Tensor, cosine: Tensor, offset: Tensor | None, like: Tensor, like_name: str
) -> None:
    channels = like.shape[1] if like_name == "x" else like.shape[3]
    checks.parameter("sine", sine, (channels, None), shape="(C, Q)", like=like, like_name=like_name)
    checks.parameter(
        "cosine", cosine, tuple(sine.shape), shape="that of sine", like=like, like_name=like_name
    )
    if offset is not None:
        checks.parameter(
            "offset", offset, (channels,), shape="(C,)", like=like, like_name=like_name
        )


def _patch(patch_size: object, x: Tensor) -> tuple[int, int]:
    if patch_size is None:
        # An image without pixels has no patches, whatever their size.
        return max(x.shape[2], 1), max(x.shape[3], 1)
    return checks.pair("patch_size", patch_size, low=1)


def latent_encode(
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    *,
    patch_size: int | tuple[int, int] | None,
    backend: str = "auto",
) -> Tensor:
    """Project each patch of an image onto latent tokens by cross-attention (LSO, CoordToLatent).

    With keys ``K = W_k x + b_k`` and values ``V = W_v x + b_v`` of the L pixels of a patch,
    token ``t`` of head ``h`` is ``softmax_L(prompts[h, t] . K[h] / sqrt(d)) V[h] + prompts[h, t]``.
    Channel ``h*d + j`` belongs to head ``h``. The image is padded with zeros at the bottom and
    right to whole patches; padded pixels take part (their key is ``b_k``).

    Args:
        x: ``(B, C, H, W)``. prompts: ``(heads, T, d)`` with ``heads*d == C``.
        key_weight, value_weight: ``(C, C)`` as (out, in). key_bias, value_bias: ``(C,)``.
        patch_size: an int, a pair (rows, columns), or None for the whole image as one patch.
        backend: see :func:`fastfusion.backend`.

    Returns:
        latents ``(B, P, T, C)`` in the dtype of ``x``; patches are counted row by row.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x, eye, zero = torch.ones(1, 2, 4, 6), torch.eye(2), torch.zeros(2)
    >>> latent_encode(x, torch.zeros(1, 3, 2), eye, zero, eye, zero, patch_size=2).shape
    torch.Size([1, 6, 3, 2])
    """
    _check_image(x)
    _check_prompts(prompts, x)
    _check_projection("key", key_weight, key_bias, x)
    _check_projection("value", value_weight, value_bias, x)
    ph, pw = _patch(patch_size, x)
    return encode(
        x, prompts, key_weight, key_bias, value_weight, value_bias, ph, pw, backend=backend
    )


def trigonometric_solve(
    latents: Tensor,
    sine: Tensor,
    cosine: Tensor,
    offset: Tensor | None = None,
    *,
    fundamental: float = math.pi,
    squash: bool = True,
    backend: str = "auto",
) -> Tensor:
    """LSO's solver: a trigonometric series of each latent value, channel by channel.

    If ``squash``, first ``z <- pi * sigmoid(z)``. Then ``z + offset_c + sum_{q=1..Q}
    (sine[c, q] sin(q*fundamental*z) + cosine[c, q] cos(q*fundamental*z))``. Always evaluated in at
    least float32.

    Args:
        latents: ``(B, P, T, C)``. sine, cosine: ``(C, Q)``. offset: ``(C,)`` or None.
        fundamental: the angular frequency of ``q = 1``, in radians per unit of ``z``.
        squash: map the latents into (0, pi) first.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, P, T, C)`` in the dtype of ``latents``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> z = torch.tensor([[[[0.5]]]])
    >>> s = trigonometric_solve(z, torch.ones(1, 1), torch.zeros(1, 1), squash=False)
    >>> round(s.item(), 4)  # 0.5 + sin(pi * 0.5)
    1.5
    """
    checks.tensor("latents", latents, dims=4, shape="(B, P, T, C)")
    _check_solver(sine, cosine, offset, latents, "latents")
    fundamental = checks.number("fundamental", fundamental)
    checks.flag("squash", squash)
    return solve(latents, sine, cosine, offset, fundamental, squash, backend=backend)


def latent_decode(
    x: Tensor,
    latents: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    *,
    patch_size: int | tuple[int, int] | None,
    heads: int = 8,
    backend: str = "auto",
) -> Tensor:
    """Bring latent tokens back to the pixels by cross-attention (LSO, LatentToCoord).

    With queries ``W_q x + b_q``, pixel ``l`` of head ``h`` becomes
    ``softmax_T((W_q x + b_q)[h, l] . latents[h, t] / sqrt(d)) latents[h] + x[h, l]``.

    Args:
        x: ``(B, C, H, W)``. latents: ``(B, P, T, C)`` of its ``P`` patches.
        query_weight: ``(C, C)`` as (out, in). query_bias: ``(C,)``.
        patch_size: that of the encoding.
        heads: that of the encoding's prompts (LSO has 8); divides ``C``.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)`` in the dtype and layout of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x, eye, zero = torch.ones(1, 2, 4, 6), torch.eye(2), torch.zeros(2)
    >>> y = latent_decode(x, torch.ones(1, 6, 3, 2), eye, zero, patch_size=2, heads=1)
    >>> torch.allclose(y, torch.full_like(y, 2))
    True
    """
    _check_image(x)
    _check_projection("query", query_weight, query_bias, x)
    checks.integer("heads", heads, low=1)
    if x.shape[1] % heads:
        raise ValueError(f"heads must divide the channels of x, {x.shape[1]}, got {heads}")
    ph, pw = _patch(patch_size, x)
    checks.parameter(
        "latents",
        latents,
        (x.shape[0], _grid(x.shape, ph, pw), None, x.shape[1]),
        shape="(B, P, T, C)",
        like=x,
    )
    if latents.shape[2] < 1:
        raise ValueError(f"latents must hold at least one token, got {tuple(latents.shape)}")
    return decode(x, latents, query_weight, query_bias, heads, ph, pw, backend=backend)


def latent_operator(
    x: Tensor,
    prompts: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    sine: Tensor,
    cosine: Tensor,
    offset: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int] | None,
    fundamental: float = math.pi,
    squash: bool = True,
    backend: str = "auto",
) -> Tensor:
    """LSO's hierarchical projection: encode, solve and decode, one patch at a time.

    Exactly ``latent_decode(trigonometric_solve(latent_encode(x)))``, see there for the steps and
    the shapes. It also covers the Latent Spectral Model (LSM, ICML 2023): ``squash=False``,
    ``fundamental=pi/Q``, the constant term as ``offset``, and ``sqrt(d)`` folded into the key and
    query weights and biases.

    Args:
        x: ``(B, C, H, W)``. prompts: ``(heads, T, d)`` with ``heads*d == C``.
        key_weight, value_weight, query_weight: ``(C, C)`` as (out, in).
        key_bias, value_bias, query_bias: ``(C,)``.
        sine, cosine: ``(C, Q)``. offset: ``(C,)`` or None.
        patch_size: an int, a pair (rows, columns), or None for the whole image as one patch.
        fundamental: the angular frequency of ``q = 1``, in radians per unit of ``z``.
        squash: map the latents into (0, pi) before the series.
        backend: see :func:`fastfusion.backend`.

    Returns:
        ``(B, C, H, W)`` in the dtype and layout of ``x``.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend asked for by name cannot run this.

    >>> import torch
    >>> x, eye, zero = torch.rand(1, 8, 6, 6), torch.eye(8), torch.zeros(8)
    >>> y = latent_operator(x, torch.rand(2, 3, 4), eye, zero, eye, zero, eye, zero,
    ...                     torch.rand(8, 5), torch.rand(8, 5), patch_size=4)
    >>> y.shape
    torch.Size([1, 8, 6, 6])
    """
    _check_image(x)
    _check_prompts(prompts, x)
    _check_projection("key", key_weight, key_bias, x)
    _check_projection("value", value_weight, value_bias, x)
    _check_projection("query", query_weight, query_bias, x)
    _check_solver(sine, cosine, offset, x, "x")
    ph, pw = _patch(patch_size, x)
    fundamental = checks.number("fundamental", fundamental)
    checks.flag("squash", squash)
    return operator(
        x,
        prompts,
        key_weight,
        key_bias,
        value_weight,
        value_bias,
        query_weight,
        query_bias,
        sine,
        cosine,
        offset,
        ph,
        pw,
        fundamental,
        squash,
        backend=backend,
    )


__all__ = ["latent_decode", "latent_encode", "latent_operator", "trigonometric_solve"]
