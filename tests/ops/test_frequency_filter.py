"""The frequency filter's compiled kernels where the shared matrix does not reach.

Those for CPUs, or, where pytest was given ``-p tests.cuda_on_cpu.library`` (test_cuda.py does so),
those for CUDA.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastfusion import ops
from fastfusion.ops.operator import OPERATORS
from tests.closeness import assert_close
from tests.cuda_on_cpu import library

BACKEND = "cuda" if library.installed else "cpp"
reason = None if BACKEND == "cuda" else OPERATORS["frequency_filter2d"].why_no_cpp()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"cpp: {reason}")


def draw(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values / math.sqrt(math.prod(shape[2:])) if len(shape) > 2 else values


def arguments(channels: int, filters: int, m: int) -> dict[str, Tensor]:
    drawn = {"mixing": draw(2, filters, channels, seed=1), "kernel": draw(2, filters, m, m, seed=2)}
    for seed, name in enumerate(("mixing_bias", "gain", "bias"), 3):
        drawn[name] = draw(2, filters, seed=seed)
    return drawn


# More strips, bands and groups of channels than one; filters so large that a group is of 8 or 4;
# large prime factors, which the CPU's transforms take up to 127 and leave to torch beyond.
@pytest.mark.parametrize(
    ("size", "filters", "m", "mode"),
    [
        ((1, 3, 9, 130), 18, 7, "zeros"),
        ((1, 17, 20, 8), 3, 1, "zeros"),
        ((2, 2, 12, 60), 9, 9, "zeros"),
        ((1, 2, 11, 70), 5, 21, "zeros"),
        ((1, 2, 7, 70), 2, 33, "zeros"),
        ((2, 3, 34, 122), 3, 5, "zeros"),
        ((1, 2, 131, 6), 2, 3, "zeros"),
        ((2, 18, 9, 11), 70, 5, "circular"),
        ((1, 3, 11, 150), 4, 5, "circular"),
        ((1, 2, 5, 4), 3, 9, "circular"),
    ],
)
def test_every_way_through_the_image(
    size: tuple[int, ...], filters: int, m: int, mode: str
) -> None:
    x, values = (
        torch.randn(size, generator=torch.Generator().manual_seed(0)),
        arguments(size[1], filters, m),
    )
    y = ops.frequency_filter2d(x, **values, padding_mode=mode, backend=BACKEND)
    exact = ops.frequency_filter2d(
        x.double(),
        **{name: value.double() for name, value in values.items()},
        padding_mode=mode,
        backend="reference",
    )
    assert_close(y, exact, 2e-6, "output")


@pytest.mark.parametrize("wanted", ["x", "mixing", "kernel", "mixing_bias", "gain", "bias"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_one_gradient_alone(mode: str, wanted: str) -> None:
    tensors = {"x": draw(2, 3, 6, 7, seed=0), **arguments(3, 4, 3)}
    exact = {name: value.double() for name, value in tensors.items()}
    found = []
    for values, backend in ((tensors, BACKEND), (exact, "reference")):
        values[wanted] = values[wanted].requires_grad_()
        y = ops.frequency_filter2d(**values, padding_mode=mode, backend=backend)
        seed = draw(*y.shape, seed=9).to(y.dtype)
        found += torch.autograd.grad(y, values[wanted], seed)
    assert_close(found[0], found[1], 1e-5, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_special_values_fill_their_image(mode: str, value: float) -> None:
    x = draw(2, 3, 9, 10, seed=0)
    x[0, 1, 4, 3] = value
    y = ops.frequency_filter2d(x, **arguments(3, 4, 3), padding_mode=mode, backend=BACKEND)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
