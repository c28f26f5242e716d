"""The Haar kernels where the shared matrix does not reach, and SpeCAM's first stage.

Of the kernels those in C++ are tested, and under TRITON_INTERPRET=1 those in Triton instead, with
``-p tests.cuda_on_cpu.library`` those in CUDA.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfusion import ops
from fastfusion.ops import haar
from fastfusion.ops.haar import spectral_maxima, spectral_mix
from fastfusion.ops.operator import OPERATORS, triton_installed
from tests.closeness import assert_close, relative_error
from tests.cuda_on_cpu import library

LAYOUTS = (torch.contiguous_format, torch.channels_last)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_ON_CPU = library.installed
KERNELS = "triton" if INTERPRETED else "cuda" if CUDA_ON_CPU else "cpp"
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16),
    *([torch.float64] if KERNELS == "cpp" else []),
)


@pytest.fixture(autouse=True)
def _compiled():
    reason = None if KERNELS != "cpp" else OPERATORS["haar_dwt2d"].why_no_cpp()
    if reason is not None:
        pytest.skip(f"cpp: {reason}")


# Rows of several vectors with and without a rest, rows longer than a piece, pixels of more channels
# than one, and an image that is stored past the caches.
@pytest.mark.parametrize(
    "size", [(1, 2, 5, 70), (2, 3, 3, 131), (1, 1, 3, 5001), (1, 2500, 2, 3), (1, 33, 259, 261)]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows(size, layout, dtype):
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    seeds = [torch.randn(size).to(dtype).contiguous(memory_format=layout) for _ in range(2)]
    h, w = (size[2] + 1) // 2, (size[3] + 1) // 2
    bands = [torch.randn(*size[:2], h, w).to(dtype) for _ in range(4)]
    bound = 1e-6 if dtype == torch.float32 else 4e-3

    def all_of(backend: str, dtype: torch.dtype) -> list[Tensor]:
        image = x.to(dtype).requires_grad_()
        inputs = [band.to(dtype).requires_grad_() for band in bands]
        split = ops.haar_split2d(image, backend=backend)
        coarse = ops.haar_dwt2d(image, backend=backend)
        full = ops.haar_idwt2d(*inputs, size=size[2:], backend=backend)
        grads = [seed.to(dtype) for seed in seeds]
        found = [
            *torch.autograd.grad(split, image, grads),
            *torch.autograd.grad(coarse, image, [band.to(dtype) for band in bands]),
            *torch.autograd.grad(full, inputs, grads[0]),
        ]
        return [*split, *coarse, full, *found]

    expected = all_of("reference", torch.float64)
    for index, (value, truth) in enumerate(zip(all_of("cpp", dtype), expected, strict=True)):
        assert_close(value, truth, bound, f"result {index}")


# -- SpeCAM's first stage ----------------------------------------------------------------------


def stage(size: tuple[int, ...], shift: float = 0.0, seed: int = 0) -> list[Tensor]:
    """An image and both filters, whose biases move all responses up or down."""
    generator = torch.Generator().manual_seed(seed)
    channels = size[1]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    filters = [draw(channels, 1, 3, 3) / 3, draw(channels) + shift]
    filters += [draw(channels, 1, 3, 3) / 3, draw(channels) + shift]
    return [draw(*size), *filters]


def gradients(tensors: list[Tensor], backend: str) -> list[Tensor]:
    inputs = [value.detach().requires_grad_() for value in tensors]
    maxima = spectral_maxima(*inputs, backend=backend)
    generator = torch.Generator().manual_seed(5)
    seed = torch.randn(maxima.shape, generator=generator).bfloat16().to(maxima.dtype)
    return [maxima, *torch.autograd.grad(maxima, inputs, seed)]


@pytest.mark.parametrize(
    "size",
    [(2, 3, 8, 8), (1, 5, 7, 9), (1, 1, 1, 1), (2, 4, 1, 6), (1, 20, 12, 71), (1, 2, 5, 1100)],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima(size, layout, dtype):
    for shift in (0.0, -3.0):  # far below, GELU falls: its maximum is that of the smallest
        tensors = [value.to(dtype) for value in stage(size, shift)]
        tensors[0] = tensors[0].contiguous(memory_format=layout)
        expected = gradients([value.double() for value in tensors], "reference")
        found = gradients(tensors, KERNELS)
        plain = gradients(tensors, "reference")
        for index, (value, truth) in enumerate(zip(found, expected, strict=True)):
            bound = {torch.float32: 1e-5 if index else 2e-6, torch.float64: 1e-12}.get(
                dtype, 1.5 * relative_error(plain[index], truth)
            )
            assert_close(value, truth, bound, f"result {index} at {shift}")


def test_maxima_are_those_of_their_parts():
    x, low_weight, low_bias, high_weight, high_bias = stage((2, 3, 9, 6))
    low, high = ops.haar_split2d(x, backend="reference")
    low = F.gelu(F.conv2d(low, low_weight, low_bias, padding=1, groups=3))
    high = F.gelu(F.conv2d(high, high_weight, high_bias, padding=1, groups=3))
    expected = torch.cat([low.amax((2, 3)), high.amax((2, 3))], dim=1)
    for backend, dtype, bound in (
        ("reference", torch.float64, 1e-12),
        (KERNELS, torch.float32, 1e-6),
    ):
        inputs = [t.to(dtype) for t in (x, low_weight, low_bias, high_weight, high_bias)]
        assert_close(spectral_maxima(*inputs, backend=backend), expected, bound, backend)


def test_equal_maxima_give_the_gradient_to_the_first():
    x = torch.zeros(1, 2, 6, 8)
    x[0, 0, 2:4, 4:6] = 1.0
    x[0, 0, 0:2, 6:8] = 1.0  # above, though further right
    weight = torch.zeros(2, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    found = gradients([x, weight, torch.zeros(2), weight, torch.zeros(2)], KERNELS)
    expected = gradients([x, weight, torch.zeros(2), weight, torch.zeros(2)], "reference")
    for value, truth in zip(found, expected, strict=True):
        assert_close(value, truth, 1e-6, "result")
        assert torch.equal(value != 0, truth != 0)
    assert found[1][0, 0, 0:2, 6:8].abs().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_special_values_in_the_image(value, layout):
    tensors = [t.float() for t in stage((1, 3, 7, 8))]
    tensors[0][0, 1, 3, 5] = value
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    found, expected = (
        spectral_maxima(*tensors, backend=KERNELS),
        spectral_maxima(*tensors, backend="reference"),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert not found.isfinite().all()


def test_maxima_without_biases_and_with_some_gradients_only():
    x, low, _, high, _ = (value.float() for value in stage((2, 4, 6, 6)))
    for wanted in ({0}, {1}, {2}, {0, 2}):
        results = []
        for backend in (KERNELS, "reference"):
            tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, low, high))]
            maxima = spectral_maxima(
                tensors[0], tensors[1], None, tensors[2], None, backend=backend
            )
            leaves = [tensors[i] for i in sorted(wanted)]
            results.append(torch.autograd.grad(maxima.sum(), leaves))
        for value, truth in zip(*results, strict=True):
            assert_close(value, truth, 1e-6, str(wanted))


@pytest.mark.skipif(KERNELS != "cpp", reason="no float64 on a GPU")
def test_maxima_pass_gradcheck():
    tensors = [value.requires_grad_() for value in stage((1, 2, 4, 5))]
    assert torch.autograd.gradcheck(lambda *t: spectral_maxima(*t, backend=KERNELS), tensors)


def test_threads_change_no_bit_of_the_maxima():
    tensors = [value.float() for value in stage((2, 5, 40, 1030))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(tensors, KERNELS)
        torch.set_num_threads(2)
        two = gradients(tensors, KERNELS)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def mixed(tensors: list[Tensor], backend: str) -> list[Tensor]:
    """The mixture and all gradients."""
    inputs = [value.detach().requires_grad_() for value in tensors]
    y = spectral_mix(*inputs, backend=backend)
    generator = torch.Generator().manual_seed(5)
    seed = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, seed)]


def gated(size: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    gates = torch.rand(2, *size[:2], generator=generator, dtype=torch.float64)
    return [*stage(size), *gates]


@pytest.mark.parametrize(
    "size",
    [(2, 3, 8, 8), (1, 5, 7, 9), (1, 1, 1, 1), (2, 4, 1, 6), (1, 20, 12, 71), (1, 2, 5, 1101)],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixture(size, layout, dtype):
    tensors = [value.to(dtype) for value in gated(size)]
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    expected = mixed([value.double() for value in tensors], "reference")
    plain, found = mixed(tensors, "reference"), mixed(tensors, KERNELS)
    for index, (value, truth) in enumerate(zip(found, expected, strict=True)):
        assert value.dtype == dtype
        bound = {torch.float32: 1e-5 if index else 2e-6, torch.float64: 1e-12}.get(
            dtype, 1.5 * relative_error(plain[index], truth)
        )
        assert_close(value, truth, bound, f"result {index}")


def test_mixture_of_any_strides():
    tensors = gated((2, 6, 9, 10))
    expected = spectral_mix(*tensors, backend="reference")
    wide = torch.full((2, 6, 9, 20), float("nan"), dtype=torch.float64)
    wide[..., ::2] = tensors[0]
    sliced = torch.full((2, 9, 10, 7), float("nan"), dtype=torch.float64)
    sliced[..., :6] = tensors[0].permute(0, 2, 3, 1)
    dtype, bound = (torch.float32, 2e-6) if KERNELS != "cpp" else (torch.float64, 1e-12)
    parameters = [value.to(dtype) for value in tensors[1:]]
    for x in (wide[..., ::2], sliced[..., :6].permute(0, 3, 1, 2), tensors[0].mT.clone().mT):
        found = spectral_mix(x.to(dtype), *parameters, backend=KERNELS)
        assert_close(found, expected, bound, "strides")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_place_in_the_mixture(value):
    tensors = [t.float() for t in gated((1, 3, 9, 8))]
    tensors[0][0, 1, 3, 5] = value
    expected = spectral_mix(*tensors, backend="reference")
    found = spectral_mix(*tensors, backend=KERNELS)
    good = expected.isfinite()
    assert not good.all()
    assert torch.equal(found.isfinite(), good)
    assert_close(found[good], expected[good], 1e-5, "finite part")


@pytest.mark.skipif(INTERPRETED, reason="no float64 in Triton")
def test_mixture_passes_gradcheck_and_opcheck():
    tensors = [value.requires_grad_() for value in gated((1, 2, 4, 5))]
    assert torch.autograd.gradcheck(lambda *t: spectral_mix(*t, backend="cpp"), tensors)
    torch.library.opcheck(torch.ops.fastfusion.spectral_mix.default, (*tensors, "auto"))


def test_mixture_without_biases_and_with_some_gradients_only():
    dtype, bound = (torch.float32, 1e-5) if KERNELS != "cpp" else (torch.float64, 1e-12)
    x, low, _, high, _, *gates = (value.to(dtype) for value in gated((2, 4, 6, 6)))
    for wanted in ({0}, {1}, {2}, {3}, {0, 2}):
        results = []
        for backend in (KERNELS, "reference"):
            leaves = [
                t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, low, high, *gates))
            ]
            a, b, c, *d = leaves
            y = spectral_mix(a, b, None, c, None, *d, backend=backend)
            results.append(torch.autograd.grad(y.sum(), [leaves[i] for i in sorted(wanted)]))
        for value, truth in zip(*results, strict=True):
            assert_close(value, truth, bound, str(wanted))


def test_where_the_stage_is_fused():
    on = SimpleNamespace
    gpu = torch.device("cuda")  # named, not used
    assert haar.fuses_spectral_stage(torch.zeros(1)) is (haar.mix.why_no_cpp() is None)
    assert haar.fuses_spectral_stage(on(device=gpu, dtype=torch.float16)) is triton_installed()
    assert not haar.fuses_spectral_stage(on(device=gpu, dtype=torch.float64))
    assert not haar.fuses_spectral_stage(torch.zeros(1, device="meta"))


def test_mixture_says_what_is_wrong():
    tensors = gated((2, 3, 4, 4))
    with pytest.raises(ValueError, match="low_gate"):
        spectral_mix(*tensors[:5], tensors[5][:1], tensors[6])
    with pytest.raises(ValueError, match="high_weight"):
        spectral_mix(*tensors[:3], tensors[3][:1], *tensors[4:])
