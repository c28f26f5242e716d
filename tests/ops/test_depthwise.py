"""What is particular to the depthwise operators: large filters by the transform, images in tiles.

The tiles are those of the kernels for CPUs or, where pytest was given ``-p
tests.cuda_on_cpu.library`` (test_cuda.py does so), of those in CUDA.
"""

from __future__ import annotations

import pytest
import torch

from fastfusion import ops
from fastfusion.ops.depthwise import depthwise, reference, transform
from tests.closeness import assert_close
from tests.cuda_on_cpu import library

BACKEND = "cuda" if library.installed else "cpp"


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "expected"),
    [
        (256, 3, (1, 1), False),
        (256, 21, (1, 1), False),
        (256, 31, (1, 1), True),
        (256, 63, (1, 1), True),
        (256, 63, (4, 4), True),
        (8, 31, (1, 1), False),
        (1, 63, (1, 1), False),
    ],
)
def test_the_transform_is_for_large_filters_on_large_images(
    size: int, kernel: int, dilation: tuple[int, int], expected: bool
) -> None:
    x, weight = torch.empty(1, 1, size, size), torch.empty(1, 1, kernel, kernel)
    assert transform.is_faster(x, weight, dilation) is expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "kernel", "dilation"),
    [
        ((1, 5, 9, 7), (7, 3), (2, 3)),
        ((2, 17, 33, 30), (13, 5), (1, 2)),
        ((1, 1, 1, 1), (3, 3), (1, 1)),
        ((1, 2, 5, 70), (63, 63), (1, 1)),
    ],
)
def test_the_transform_at_sizes_that_are_not_its_own(
    size: tuple[int, ...],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    layout: torch.memory_format,
) -> None:
    x, grad = (torch.randn(size).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(size[1], 1, *kernel), torch.randn(size[1])
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = reference.depthwise_conv2d(*exact, *dilation, "none")
    y = transform.forward(x, weight, bias, dilation, "none")
    assert y.stride() == x.stride()
    assert_close(y, truth.detach(), 2e-6, "output")
    found = transform.backward(grad, x, weight, dilation, [True, True, True])
    expected = torch.autograd.grad(truth, exact, grad.double())
    for name, one, other in zip(("x", "weight", "bias"), found, expected, strict=True):
        assert_close(one, other, 1e-5, f"gradient of {name}")


def _large() -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(1, 2, 64, 64), torch.randn(2, 1, 45, 45)
    assert transform.is_faster(x, weight, (1, 1))
    return x, weight


def test_what_is_not_finite_stays_where_the_sums_put_it() -> None:
    x, weight = _large()
    x[0, 1, 5, 5] = float("inf")
    y = ops.depthwise_conv2d(x, weight)
    assert y[0, 0].isfinite().all()
    assert y[0, 1, 40:].isfinite().all() and not y[0, 1, :20, :20].isfinite().any()


def test_sums_that_only_the_transform_overflows() -> None:
    x, weight = _large()
    x, weight = x * 1e20, weight * 1e15
    truth = ops.depthwise_conv2d(x.double(), weight.double(), backend="reference")
    assert_close(ops.depthwise_conv2d(x, weight), truth, 2e-6, "output")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gelu_far_from_zero_is_that_of_the_definition(layout: torch.memory_format) -> None:
    if depthwise.why_no_cpp() is not None:
        pytest.skip(f"cpp: {depthwise.why_no_cpp()}")
    values = torch.tensor([-torch.inf, -1e30, -1e3, -20.0, 20.0, 1e30, torch.inf, torch.nan])
    x = values.repeat(1, 17, 3, 1).contiguous(memory_format=layout)
    one = torch.ones(17, 1, 1, 1)
    found = ops.depthwise_conv2d(x, one, activation="gelu", backend="cpp")
    # In float64: torch's float32 GELU of infinity is NaN on some processors.
    expected = ops.depthwise_conv2d(x.double(), one.double(), activation="gelu").float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12, equal_nan=True)


def test_threads_change_no_bit() -> None:
    if depthwise.why_no_cpp() is not None:
        pytest.skip(f"cpp: {depthwise.why_no_cpp()}")
    x, weight = _large()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops.depthwise_conv2d(x, weight, backend="cpp")
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        for a, b in zip(found[0], again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("size", "wide", "kernel", "dilation", "activation"),
    [
        ((2, 3, 35, 132), 132, 5, 1, "gelu"),  # more than one tile, each a block's only one
        ((1, 2, 66, 68), 68, 7, 1, None),
        ((1, 2, 50, 68), 68, 7, 3, "silu"),
        ((1, 2, 9, 65), 68, 5, 1, None),  # rows that end within a copy of four
        ((1, 264, 70, 68), 68, 5, 1, None),  # three tiles a block
    ],
)
def test_images_in_tiles(
    size: tuple[int, ...], wide: int, kernel: int, dilation: int, activation: str | None
) -> None:
    if BACKEND == "cpp" and depthwise.why_no_cpp() is not None:
        pytest.skip(f"cpp: {depthwise.why_no_cpp()}")
    x = torch.randn(*size[:-1], wide)
    x[..., size[-1] :] = float("nan")
    x = x[..., : size[-1]].requires_grad_()
    weight, bias = torch.randn(size[1], 1, kernel, kernel), torch.randn(size[1])
    grad = torch.randn(size)

    def run(of: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        y = ops.depthwise_conv2d(
            of,
            weight.to(of.dtype),
            bias.to(of.dtype),
            dilation=dilation,
            activation=activation,
            backend=backend,
        )
        return y.detach(), torch.autograd.grad(y, of, grad.to(of.dtype))[0]

    y, found = run(x, BACKEND)
    truth, expected = run(x.double(), "reference")
    assert_close(y, truth, 2e-6, "output")
    assert_close(found, expected, 1e-5, "gradient of x")
