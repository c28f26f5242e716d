"""The local map: the definition against plain loops, the kernel against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastfusion.ops.local_map import local_map, mapping
from tests.closeness import assert_close, relative_error

# batch, targets, guides, samples, size, scale, first
ROWS = [
    (2, 3, 2, (3, 5), (8, 12), 4, (0, -1.5)),
    (1, 9, 3, (5, 5), (31, 29), 8, (-1, -2)),
    (1, 1, 1, (1, 1), (1, 1), 2, (0, 0)),
    (1, 2, 3, (2, 40), (1, 77), 2, (-0.5, 0)),
    (1, 4, 4, (7, 3), (6, 2), 1, (0, -0.25)),
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture
def kernel():
    if (reason := mapping.why_not("cpp", torch.empty(0))) is not None:
        pytest.skip(f"cpp: {reason}")


def draw(batch, targets, guides, samples, size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, targets, 1 + guides, *samples),
        (batch, guides, *size),
        (batch, guides, *size),
        (targets,),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_loops(coefficients: Tensor, guides: Tensor, detail: Tensor, sharpness: Tensor, scale, first):
    batch, targets, _, low_rows, low_columns = coefficients.shape
    y = guides.new_zeros(batch, targets, *guides.shape[2:])

    def samples(i: int, start: float, count: int) -> list[tuple[int, float]]:
        place = (i - start) / scale
        cell = min(math.floor(place), count - 1)
        return [(cell, 1 - (place - cell)), (min(cell + 1, count - 1), place - cell)]

    for b, t, i, j in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        for row, p in samples(i, first[0], low_rows):
            for column, q in samples(j, first[1], low_columns):
                c = coefficients[b, t, :, row, column] * p * q
                used = guides[b, :, i, j] + sharpness[t] * detail[b, :, i, j]
                y[b, t, i, j] += c[0] + (c[1:] * used).sum()
    return y


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], ROWS[4]], ids=str)
def test_reference_is_what_plain_loops_give(row):
    *shape, scale, first = row
    tensors = draw(*shape)
    found = local_map(*tensors, scale=scale, first=first, backend="reference")
    assert_close(found, by_loops(*tensors, scale, first), 1e-12, "loops")


@pytest.mark.parametrize("detailed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parity(kernel, row, dtype, detailed):
    *shape, scale, first = row
    tensors = [value.to(dtype) for value in draw(*shape)][: 4 if detailed else 2]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    options = {"scale": scale, "first": first}
    truth = local_map(*(value.double() for value in tensors), **options, backend="reference")
    found = local_map(*tensors, **options, backend="cpp")
    plain = local_map(*tensors, **options, backend="reference")
    assert found.dtype == dtype
    assert found.stride() == plain.stride()
    bound = {torch.float32: 2e-6, torch.float64: 1e-12}.get(
        dtype, 1.5 * relative_error(plain, truth)
    )
    assert_close(found, truth, bound, "local map")


def test_gradients_and_operator_rules():
    *shape, scale, first = ROWS[0]
    tensors = [value.requires_grad_() for value in draw(*shape)]
    assert torch.autograd.gradcheck(lambda *t: local_map(*t, scale=scale, first=first), tensors)
    op = torch.ops.fastfusion.local_map.default
    torch.library.opcheck(op, (*tensors, scale, *map(float, first), "auto"))


def test_threads_change_no_bit(kernel):
    *shape, scale, first = ROWS[1]
    tensors = [value.float() for value in draw(*shape)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(local_map(*tensors, scale=scale, first=first, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_bad_input_is_named():
    *shape, scale, first = ROWS[0]
    c, guides, detail, sharpness = draw(*shape)
    with pytest.raises(ValueError, match="coefficients"):
        local_map(c[:, :, 1:], guides, scale=scale, first=first)
    with pytest.raises(ValueError, match="detail and sharpness"):
        local_map(c, guides, detail, scale=scale, first=first)
    with pytest.raises(ValueError, match="sharpness"):
        local_map(c, guides, detail, sharpness[:1], scale=scale, first=first)
    with pytest.raises(ValueError, match="first"):
        local_map(c, guides, scale=scale, first=(0.5, 0))
    with pytest.raises(ValueError, match="first"):
        local_map(c[..., :2], guides, scale=scale, first=first)
    with pytest.raises(TypeError, match="scale"):
        local_map(c, guides, scale=4.0, first=first)
    with pytest.raises(TypeError, match="guides"):
        local_map(c, None, scale=scale, first=first)
