"""What PyTorch expects of an operator: opcheck, compile, export, vmap, autocast, FLOPs, choice."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from typing import ClassVar

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastfusion
from fastfusion import ops
from fastfusion.ops.operator import OPERATORS
from tests.closeness import assert_close
from tests.ops.cases import CASES, EVERY, Case

by_case = pytest.mark.parametrize("case", EVERY, ids=str)


class Capture(TorchDispatchMode):
    """Remember the arguments with which the ops of this library are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastfusion":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def record(case: Case, *, gradient: bool):
    """The op that a case calls, with its arguments; of the backward pass if wanted."""
    tensors = {n: t.detach().requires_grad_() for n, t in case.tensors().items()}
    with Capture() as capture:
        outputs = case.outputs(tensors, "auto")
        if gradient:
            sum(y.square().sum() for y in outputs).backward()
    name = case.operator + ("_backward" if gradient else "")
    return next(call for call in capture.calls if call[0]._opname == name)


def detached(args, *, grad: bool):
    return tuple(
        a.detach().clone().requires_grad_(grad) if isinstance(a, torch.Tensor) else a for a in args
    )


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@by_case
def test_opcheck(case, gradient):
    op, args = record(case, gradient=gradient)
    torch.library.opcheck(op, detached(args, grad=not gradient))


SMALL = [
    case
    for case in CASES
    if sum(math.prod(shape) for shape in case.shapes.values()) < 2500
    # Its value jumps where an entry becomes 0: the gradient is tested by hand in test_oracles.
    and case.operator != "coordinate_mixing"
]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_against_finite_differences(case, backend):
    tensors = case.tensors()
    inputs = [value.requires_grad_() for value in tensors.values()]

    def call(*values):
        return case.outputs(dict(zip(tensors, values, strict=True)), backend)

    torch.autograd.gradcheck(call, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def _resized(case: Case, rows: int, columns: int) -> Case:
    """The same call on images of another size, or on as many latents, bands or coordinates."""
    shapes = dict(case.shapes)
    call = case.call
    for name in case.images:
        if len(shapes[name]) == 4:
            shapes[name] = (*shapes[name][:2], rows, columns)
    if case.operator == "coordinate_mixing":
        shapes["candidates"] = (*shapes["candidates"][:2], rows)
    if case.operator == "haar_idwt2d":  # whose case crops to its own size

        def call(tensors, backend):
            return ops.haar_idwt2d(*tensors.values(), backend=backend)

    if "latents" in shapes:  # one row for each patch of 4 x 4
        batch, _, tokens, channels = case.shapes["latents"]
        shapes["latents"] = (batch, -(-rows // 4) * -(-columns // 4), tokens, channels)
    if case.operator == "local_map":  # whose samples must reach the last pixel
        samples = -(-rows // 4) + 2, -(-columns // 4) + 5
        shapes["coefficients"] = (*shapes["coefficients"][:3], *samples)
    return dataclasses.replace(case, shapes=shapes, call=call)


@by_case
def test_compile_in_one_graph_without_recompiling(case):
    """A new batch and image size, forward and backward, is neither a graph break nor a recompile.

    Sizes go from odd to even and to other remainders of a patch.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(tensors, call):
        result = call(tensors, "auto")
        return result if isinstance(result, tuple) else (result,)

    frames = []
    call = _resized(case, 1, 1).call  # one function: another would be another guard
    # No other size is one of these: equal sizes would be tied.
    for batch, rows, columns in ((11, 23, 29), (13, 38, 31), (17, 41, 46)):
        resized = _resized(case, rows, columns)
        tensors = {}
        for name, value in resized.tensors().items():
            batched = value.dim() > 2 and name in (*case.images, "latents", "coefficients")
            if batched or (name in ("state", "low_gate", "high_gate") and value.dim() == 2):
                value = torch.cat([value[:1]] * batch)
            tensors[name] = value.float().detach().requires_grad_()
        outputs = compiled(tensors, call)
        expected = resized.outputs(tensors, "auto")
        for y, truth in zip(outputs, expected, strict=True):
            assert_close(y, truth, 1e-6, "compiled output")
        sum(y.square().sum() for y in outputs).backward()
        assert all(value.grad is not None for value in tensors.values())
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@by_case
def test_export(case):
    class Module(torch.nn.Module):
        def forward(self, *values):
            return case.outputs(dict(zip(names, values, strict=True)), "auto")

    tensors = {name: value.float() for name, value in case.tensors().items()}
    names = list(tensors)
    program = torch.export.export(Module(), tuple(tensors.values()))
    for y, truth in zip(
        program.module()(*tensors.values()), case.outputs(tensors, "auto"), strict=True
    ):
        assert_close(y, truth, 1e-6, "exported output")


@by_case
def test_vmap_over_images_and_over_parameters(case):
    tensors = {name: value.float() for name, value in case.tensors().items()}
    names = list(tensors)
    for mapped in names:
        stacked = torch.stack([tensors[mapped], tensors[mapped].flip(0), 2 * tensors[mapped]])
        values = [stacked if name == mapped else tensors[name] for name in names]
        dims = tuple(0 if name == mapped else None for name in names)

        def call(*values):
            return case.outputs(dict(zip(names, values, strict=True)), "auto")

        together = torch.func.vmap(call, in_dims=dims)(*values)
        for row in range(3):
            alone = call(*(v[row] if d == 0 else v for v, d in zip(values, dims, strict=True)))
            for y, truth in zip(together, alone, strict=True):
                assert_close(y[row], truth, 1e-5, f"vmap over {mapped}")


@by_case
def test_per_sample_gradients(case):
    """vmap(grad(...)) with respect to a parameter or, where there is none, the image."""
    tensors = {name: value.float() for name, value in case.tensors().items()}
    image, parameter = case.images[0], list(tensors)[-1]
    samples = torch.stack([tensors[image], -tensors[image]])

    def loss(value, sample):
        outputs = case.outputs({**tensors, image: sample, parameter: value}, "auto")
        return sum(y.square().sum() for y in outputs)

    if parameter == image:
        found = torch.func.vmap(torch.func.grad(lambda s: loss(s, s)))(samples)
        alone = [torch.func.grad(lambda s: loss(s, s))(sample) for sample in samples]
    else:
        grad = torch.func.grad(loss)
        found = torch.func.vmap(grad, in_dims=(None, 0))(tensors[parameter], samples)
        alone = [grad(tensors[parameter], sample) for sample in samples]
    assert_close(found, torch.stack(alone), 1e-4, "per-sample gradients")


LOWER = (
    "latent_operator",
    "latent_encode",
    "latent_decode",
    "depthwise_conv2d",
    "large_kernel_attention",
    "multiscale_attention",
    "spectral_maxima",
    "spectral_mix",
)


@by_case
def test_autocast(case):
    """Mixed dtypes are good input under autocast, and only there."""
    tensors = {name: value.float() for name, value in case.tensors().items()}
    image = case.images[0]
    mixed = {**tensors, image: tensors[image].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.outputs({n: v.requires_grad_() for n, v in mixed.items()}, "auto")
    wide = {"float32"} if len(tensors) > 1 else {"bfloat16"}
    expected = {"bfloat16"} if case.operator in LOWER else wide
    assert {str(y.dtype).removeprefix("torch.") for y in outputs} == expected
    sum(y.float().square().sum() for y in outputs).backward()
    assert all(value.grad.dtype == value.dtype for value in mixed.values())
    if len(tensors) > 1:
        with pytest.raises(ValueError, match="must have the dtype of"):
            case.outputs(mixed, "auto")


@by_case
def test_flops_are_counted_forward_and_backward(case):
    tensors = {n: t.detach().requires_grad_() for n, t in case.tensors().items()}
    with FlopCounterMode(display=False) as counter:
        outputs = case.outputs(tensors, "auto")
        sum(y.square().sum() for y in outputs).backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts[f"fastfusion.{case.operator}"] > 0
    assert counts[f"fastfusion.{case.operator}_backward"] > 0


def test_flops_by_hand():
    x = torch.zeros(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv2d(x, torch.zeros(4, 1, 5, 5))
    assert counter.get_total_flops() == 2 * (2 * 4 * 8 * 8) * 25
    x, weight, bias = torch.zeros(1, 64, 256, 256), torch.zeros(64, 64), torch.zeros(64)
    series = torch.zeros(64, 24)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        ops.latent_operator(
            x.to("meta"),
            torch.zeros(8, 8, 8),
            *(t.to("meta") for t in (weight, bias, weight, bias, weight, bias, series, series)),
            patch_size=4,
        )
    pixels, patches = 256 * 256, 64 * 64
    projections, attention = 3 * 2 * pixels * 64 * 64, 8 * pixels * 8 * 64
    assert counter.get_total_flops() == projections + attention + 4 * patches * 8 * 64 * 24


@by_case
def test_meta_device(case):
    tensors = {name: value.float().to("meta") for name, value in case.tensors().items()}
    real = case.outputs({n: v.float() for n, v in case.tensors().items()}, "auto")
    for y, truth in zip(case.outputs(tensors, "auto"), real, strict=True):
        assert y.device.type == "meta"
        assert y.shape == truth.shape
        assert y.stride() == truth.stride()


@by_case
def test_layout_of_the_result(case):
    """channels_last in, channels_last out; anything else gives contiguous."""
    image = case.images[0]
    for dim_order in (torch.contiguous_format, torch.channels_last):
        tensors = {name: value.float() for name, value in case.tensors().items()}
        if tensors[image].dim() != 4:
            pytest.skip("no image")
        tensors[image] = tensors[image].contiguous(memory_format=dim_order)
        for y in case.outputs(tensors, "auto"):
            if y.dim() == 4 and case.operator not in ("latent_encode", "trigonometric_solve"):
                assert y.is_contiguous(memory_format=dim_order)


# -- the choice of the backend -----------------------------------------------------------------


@by_case
def test_reference_equals_auto(case):
    tensors = {name: value.float() for name, value in case.tensors().items()}
    for y, truth in zip(
        case.outputs(tensors, "auto"), case.outputs(tensors, "reference"), strict=True
    ):
        assert_close(y, truth, 5e-5, "auto against the reference")


def test_the_strongest_wish_wins(monkeypatch):
    operator, x = OPERATORS["haar_split2d"], torch.zeros(1, 1, 2, 2)
    reference = operator.backends["reference"]
    monkeypatch.setenv("FASTFUSION_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this"):
        operator.choose("auto", x)
    with fastfusion.backend("reference"):
        assert operator.choose("auto", x) is reference
        with pytest.raises(RuntimeError, match="'triton'"):
            operator.choose("triton", x)
    with pytest.raises(RuntimeError, match="backend 'cuda'"):
        ops.haar_split2d(x)
    assert ops.haar_split2d(x, backend="reference")[0].shape == x.shape


def test_a_gradient_keeps_the_backend_of_its_forward():
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    with fastfusion.backend("reference"):
        y = ops.haar_split2d(x)[0].sum()
    with fastfusion.backend("cuda"):  # would raise, were it asked
        y.backward()
    assert x.grad is not None


def test_wrong_names_of_backends(monkeypatch):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'cuda'"):
        ops.haar_split2d(x, backend="fast")
    with pytest.raises(TypeError, match="backend must be one of"):
        ops.haar_split2d(x, backend=3)
    with pytest.raises(ValueError, match="name must be one of"), fastfusion.backend("fast"):
        pass
    monkeypatch.setenv("FASTFUSION_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTFUSION_BACKEND must be one of"):
        ops.haar_split2d(x)


def test_falling_back_leaves_a_debug_log(caplog):
    with caplog.at_level(logging.DEBUG, logger="fastfusion"):
        ops.haar_split2d(torch.zeros(1, 1, 2, 2))
    assert any("not cuda" in message for message in caplog.messages)


def test_backends_and_info_say_why():
    found = fastfusion.backends()
    assert set(found) == {"reference", "cpp", "triton", "cuda"}
    assert found["reference"] == "available"
    assert all(found.values())
    assert fastfusion.info()["backends"] == found


# ------------------------------------------------------------------------------------------------
# The short way past the dispatcher
# ------------------------------------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass that hears of every function."""

    heard: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.heard.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_whoever_watches_sees_the_op():
    x = torch.randn(1, 2, 6, 6)
    op = "haar_split2d"

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.haar_split2d(x)
    assert any(op in event.name for event in profile.events())

    class Listening(TorchFunctionMode):
        heard = ""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.heard += str(function)
            return function(*args, **(kwargs or {}))

    with Listening() as mode:
        ops.haar_split2d(x)
    assert op in mode.heard
    ops.haar_split2d(x.as_subclass(Named))
    assert any(op in name for name in Named.heard)
    assert op in str(torch.jit.trace(lambda y: ops.haar_split2d(y)[0], x, check_trace=False).graph)


def test_tensors_that_only_the_dispatcher_can_read():
    z = torch.randn(1, 2, 6, 6, dtype=torch.complex64)
    x = z.conj().imag  # its sign is in a bit, not in memory
    assert x.is_neg()
    for found, wanted in zip(ops.haar_split2d(x), ops.haar_split2d(-z.imag), strict=True):
        assert torch.equal(found, wanted)


def test_the_short_way_is_taken_and_gives_the_same(monkeypatch):
    x = torch.randn(1, 2, 6, 6)
    operator = OPERATORS["haar_split2d"]
    wanted = operator.op(x, "auto")
    monkeypatch.setattr(operator, "op", None)
    for context in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
        with context:
            found = ops.haar_split2d(x)
            assert all(map(torch.equal, found, wanted))
            if not torch.is_grad_enabled():
                ops.haar_split2d(torch.nn.Parameter(x))
    with pytest.raises(TypeError):  # a gradient is wanted: not by the short way
        ops.haar_split2d(x.clone().requires_grad_())
