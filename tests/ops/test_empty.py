"""Empty inputs of the operators whose sizes are not those of one image (see also test_parity)."""

from __future__ import annotations

import torch

from fastfusion import ops


def test_haar_idwt2d_of_nothing():
    for shape in ((0, 2, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)):
        bands = [torch.zeros(shape, requires_grad=True) for _ in range(4)]
        y = ops.haar_idwt2d(*bands)
        assert y.shape == (shape[0], shape[1], 2 * shape[2], 2 * shape[3])
        y.sum().backward()
        assert bands[0].grad.shape == shape


def test_haar_idwt2d_of_an_image_with_one_row():
    y = ops.haar_idwt2d(*(torch.ones(1, 1, 1, 1) for _ in range(4)), size=(1, 1))
    assert y.flatten().tolist() == [2.0]


def test_coordinate_mixing_of_an_empty_batch():
    state = torch.zeros(4, requires_grad=True)
    y = ops.coordinate_mixing(torch.zeros(0, 4, 5), state, k=2)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert not state.grad.any()


def test_trigonometric_solve_of_nothing():
    sine = torch.ones(4, 3, requires_grad=True)
    for shape in ((0, 2, 3, 4), (1, 0, 3, 4)):
        y = ops.trigonometric_solve(torch.zeros(shape), sine, sine)
        assert y.shape == shape
        y.sum().backward()
    assert not sine.grad.any()


def test_trigonometric_solve_without_a_series_squashes_alone():
    z = torch.tensor([[[[0.0, 1.0]]]])
    y = ops.trigonometric_solve(z, torch.zeros(2, 0), torch.zeros(2, 0))
    assert torch.allclose(y, torch.pi * torch.sigmoid(z))
