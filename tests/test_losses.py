"""Losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from fastfusion.losses import CoFusionLoss, RelativeLoss


def test_cofusion_loss_is_l1_and_a_tenth_of_what_ssim_lacks():
    fused, reference = torch.rand(2, 2, 5, 20, 16, dtype=torch.float64)
    similarity = structural_similarity_index_measure(fused, reference, sigma=1.5, data_range=1.0)
    l1 = torch.nn.functional.l1_loss(fused, reference)
    torch.testing.assert_close(CoFusionLoss()(fused, reference), l1 + 0.1 * (1 - similarity))
    torch.testing.assert_close(CoFusionLoss(weight=0)(fused, reference), l1)
    assert repr(CoFusionLoss()) == "CoFusionLoss(weight=0.1)"


def test_cofusion_loss_trains():
    reference = torch.rand(1, 3, 12, 12)
    fused = torch.rand(1, 3, 12, 12, requires_grad=True)
    loss = CoFusionLoss()
    small = torch.rand(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (small, torch.rand_like(small)))
    optimiser = torch.optim.Adam([fused], lr=0.05)
    first = loss(fused, reference).item()
    for _ in range(50):
        optimiser.zero_grad()
        loss(fused, reference).backward()
        optimiser.step()
    assert loss(fused, reference).item() < 0.2 * first


def test_relative_loss_is_one_where_nothing_was_gained():
    fused, reference = torch.rand(2, 2, 5, 20, 16, dtype=torch.float64)
    error = (fused - reference).square().mean((2, 3), keepdim=True).sqrt()
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(RelativeLoss()(fused, reference, error), one)
    with pytest.raises(ValueError, match=r"fused: expected shape \(2, 5, 20, 6\)"):
        RelativeLoss()(fused, reference[..., :6], error)
    with pytest.raises(ValueError, match=r"error: expected shape \(2, 5, 1, 1\)"):
        RelativeLoss()(fused, reference, error[0])


def test_bad_input():
    cube = torch.rand(1, 3, 12, 12)
    with pytest.raises(ValueError, match="reference: expected the shape"):
        CoFusionLoss()(cube, cube[..., :6])
    with pytest.raises(TypeError, match="fused: expected a tensor"):
        CoFusionLoss()([1.0], cube)
    with pytest.raises(ValueError, match=r"weight must .* got -1"):
        CoFusionLoss(weight=-1)
