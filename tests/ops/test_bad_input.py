"""Every argument of every operator, wrong in every way: the error names it, nothing crashes."""

from __future__ import annotations

import math

import pytest
import torch

from fastfusion import ops

GOOD = {
    "haar_dwt2d": {"x": (1, 2, 4, 4)},
    "haar_idwt2d": dict.fromkeys(("ll", "lh", "hl", "hh"), (1, 2, 3, 3)),
    "haar_split2d": {"x": (1, 2, 4, 4)},
    "coordinate_mixing": {"candidates": (2, 3, 4), "state": (2, 3)},
    "depthwise_conv2d": {"x": (1, 2, 4, 4), "weight": (2, 1, 3, 3), "bias": (2,)},
    "large_kernel_attention": {
        "x": (1, 2, 4, 4),
        "local_weight": (2, 1, 5, 5),
        "local_bias": (2,),
        "context_weight": (2, 1, 7, 7),
        "context_bias": (2,),
        "mix_weight": (2, 2),
        "mix_bias": (2,),
    },
    "frequency_filter2d": {
        "x": (1, 3, 4, 4),
        "mixing": (2, 2, 3),
        "kernel": (2, 2, 3, 3),
        "mixing_bias": (2, 2),
        "gain": (2, 2),
        "bias": (2, 2),
    },
    "frequency_response2d": {
        "x": (1, 3, 4, 4),
        "mixing": (2, 2, 3),
        "kernel": (2, 2, 3, 3),
        "mixing_bias": (2, 2),
    },
    "latent_encode": {
        "x": (1, 4, 4, 4),
        "prompts": (2, 3, 2),
        "key_weight": (4, 4),
        "key_bias": (4,),
        "value_weight": (4, 4),
        "value_bias": (4,),
    },
    "trigonometric_solve": {
        "latents": (1, 2, 3, 4),
        "sine": (4, 5),
        "cosine": (4, 5),
        "offset": (4,),
    },
    "latent_decode": {
        "x": (1, 4, 4, 4),
        "latents": (1, 4, 3, 4),
        "query_weight": (4, 4),
        "query_bias": (4,),
    },
    "latent_operator": {
        "x": (1, 4, 4, 4),
        "prompts": (2, 3, 2),
        "key_weight": (4, 4),
        "key_bias": (4,),
        "value_weight": (4, 4),
        "value_bias": (4,),
        "query_weight": (4, 4),
        "query_bias": (4,),
        "sine": (4, 5),
        "cosine": (4, 5),
        "offset": (4,),
    },
}
OPTIONS = {
    "coordinate_mixing": {"k": 2},
    "latent_encode": {"patch_size": 2},
    "latent_decode": {"patch_size": 2, "heads": 2},
    "latent_operator": {"patch_size": 2},
}
NULLABLE = {"bias", "local_bias", "context_bias", "mix_bias", "mixing_bias", "gain", "offset"}


def call(operator, changes):
    values = {name: torch.randn(shape) for name, shape in GOOD[operator].items()}
    values |= OPTIONS.get(operator, {})
    values |= changes
    return getattr(ops, operator)(**values)


TENSORS = [(operator, name) for operator, shapes in GOOD.items() for name in shapes]


@pytest.mark.parametrize("operator", GOOD)
def test_the_good_call_is_good(operator):
    call(operator, {})


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_wrong_type(operator, name):
    bad = [3, "x", [[1.0]], torch.ones(2).numpy()]
    if name not in NULLABLE:
        bad.append(None)
    for value in bad:
        with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor of shape"):
            call(operator, {name: value})


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_wrong_dimensions(operator, name):
    shape = GOOD[operator][name]
    if name == "state":
        shape = (*shape, 1)
    for wrong in ((*shape, 1), shape[1:], ()):
        if operator == "coordinate_mixing" and name == "state" and len(wrong) in (1, 2):
            continue
        with pytest.raises(ValueError, match=rf"^{name} must have shape"):
            call(operator, {name: torch.zeros(wrong)})


# The sizes that nothing else fixes.
FREE = {
    *((operator, "x", axis) for operator in GOOD for axis in (0, 2, 3)),
    ("haar_dwt2d", "x", 1),
    ("haar_split2d", "x", 1),
    ("coordinate_mixing", "candidates", 2),
    ("latent_encode", "prompts", 1),
    ("latent_operator", "prompts", 1),
    *(("trigonometric_solve", "latents", axis) for axis in (0, 1, 2)),
    ("latent_decode", "latents", 2),
} - {("latent_decode", "x", axis) for axis in (0, 2, 3)}


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_wrong_sizes(operator, name):
    """A size that fits no other argument (and, of a kernel, even); the error names one of them."""
    shape = GOOD[operator][name]
    for axis in range(len(shape)):
        if (operator, name, axis) in FREE:
            continue
        wrong = list(shape)
        wrong[axis] += 61
        with pytest.raises(ValueError, match=r"^\w+ must "):
            call(operator, {name: torch.zeros(wrong)})


@pytest.mark.parametrize(("operator", "name"), TENSORS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float64])
def test_wrong_dtype(operator, name, dtype):
    if dtype == torch.float64 and len(GOOD[operator]) == 1:
        pytest.skip("float64 alone is good input")
    with pytest.raises(ValueError, match=r"^\w+ must (be float32|have the dtype)"):
        call(operator, {name: torch.zeros(GOOD[operator][name], dtype=dtype)})


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_wrong_device(operator, name):
    if len(GOOD[operator]) == 1:
        pytest.skip("there is no other tensor")
    with pytest.raises(ValueError, match=r"^\w+ must be on the device of"):
        call(operator, {name: torch.zeros(GOOD[operator][name], device="meta")})


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_sparse(operator, name):
    shape = GOOD[operator][name]
    with pytest.raises(ValueError, match=rf"^{name} must be a dense"):
        call(operator, {name: torch.zeros(shape).to_sparse()})


@pytest.mark.parametrize(
    ("operator", "name", "value", "error"),
    [
        ("coordinate_mixing", "k", 0, ValueError),
        ("coordinate_mixing", "k", 5, ValueError),
        ("coordinate_mixing", "k", -1, ValueError),
        ("coordinate_mixing", "k", 2.0, TypeError),
        ("coordinate_mixing", "k", True, TypeError),
        ("coordinate_mixing", "k", None, TypeError),
        ("haar_idwt2d", "size", (5,), ValueError),
        ("haar_idwt2d", "size", (4, 6), ValueError),
        ("haar_idwt2d", "size", (6, 7), ValueError),
        ("haar_idwt2d", "size", (-1, 6), ValueError),
        ("haar_idwt2d", "size", "66", TypeError),
        ("haar_idwt2d", "size", (6.0, 6), TypeError),
        ("depthwise_conv2d", "dilation", 0, ValueError),
        ("depthwise_conv2d", "dilation", (1, 2, 3), ValueError),
        ("depthwise_conv2d", "dilation", 1.5, TypeError),
        ("depthwise_conv2d", "dilation", None, TypeError),
        ("depthwise_conv2d", "activation", "tanh", ValueError),
        ("depthwise_conv2d", "activation", "none", ValueError),
        ("depthwise_conv2d", "activation", 1, TypeError),
        ("depthwise_conv2d", "weight", torch.zeros(2, 1, 2, 3), ValueError),
        ("depthwise_conv2d", "weight", torch.zeros(2, 1, 3, 65), ValueError),
        ("depthwise_conv2d", "weight", torch.zeros(2, 1, 3, 0), ValueError),
        ("large_kernel_attention", "context_weight", torch.zeros(2, 1, 4, 4), ValueError),
        ("large_kernel_attention", "dilation", -3, ValueError),
        ("frequency_filter2d", "kernel", torch.zeros(2, 2, 3, 5), ValueError),
        ("frequency_filter2d", "kernel", torch.zeros(2, 2, 4, 4), ValueError),
        ("frequency_filter2d", "padding_mode", "reflect", ValueError),
        ("frequency_filter2d", "padding_mode", None, ValueError),
        ("latent_encode", "patch_size", 0, ValueError),
        ("latent_encode", "patch_size", (2, 2, 2), ValueError),
        ("latent_encode", "patch_size", 2.0, TypeError),
        ("latent_encode", "prompts", torch.zeros(2, 0, 2), ValueError),
        ("latent_encode", "prompts", torch.zeros(3, 3, 2), ValueError),
        ("latent_decode", "heads", 3, ValueError),
        ("latent_decode", "heads", 0, ValueError),
        ("latent_decode", "heads", 2.0, TypeError),
        ("latent_decode", "latents", torch.zeros(1, 4, 0, 4), ValueError),
        ("latent_decode", "latents", torch.zeros(1, 5, 3, 4), ValueError),
        ("trigonometric_solve", "fundamental", "pi", TypeError),
        ("trigonometric_solve", "fundamental", math.nan, ValueError),
        ("trigonometric_solve", "fundamental", math.inf, ValueError),
        ("trigonometric_solve", "squash", 1, TypeError),
        ("latent_operator", "squash", None, TypeError),
    ],
)
def test_wrong_options(operator, name, value, error):
    with pytest.raises(error, match=rf"^{name} must "):
        call(operator, {name: value})


def test_multiscale_attention():
    x, good = torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3)
    for weights, biases, error, message in [
        (good, None, TypeError, "weights must be a list"),
        ([], None, ValueError, "weights must hold at least one"),
        ([good, 3], None, TypeError, r"weights\[1\] must be a torch.Tensor"),
        ([good, torch.zeros(2, 1, 4, 3)], None, ValueError, r"weights\[1\] must have odd"),
        ([torch.zeros(3, 1, 3, 3)], None, ValueError, r"weights\[0\] must have shape"),
        ([good], [torch.zeros(2), None], ValueError, "biases must be as many"),
        ([good], torch.zeros(2), TypeError, "biases must be a list"),
        ([good], [torch.zeros(3)], ValueError, r"biases\[0\] must have shape"),
    ]:
        with pytest.raises(error, match=message):
            ops.multiscale_attention(x, weights, biases)
