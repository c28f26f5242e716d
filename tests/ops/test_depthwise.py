"""What is particular to the depthwise operators: large filters by the transform."""

from __future__ import annotations

import pytest
import torch

from fastfusion import ops
from fastfusion.ops.depthwise import depthwise, reference, transform
from tests.closeness import assert_close


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
