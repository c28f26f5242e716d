"""Losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from fastfusion import metrics
from fastfusion.losses import CoFusionLoss, PSNRLoss


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


def test_psnr_loss_is_psnr():
    fused, reference = torch.rand(2, 1, 5, 20, 16, dtype=torch.float64)
    in_db = -10 * PSNRLoss(floor=1e-30)(fused, reference) / torch.log(torch.tensor(10.0))
    torch.testing.assert_close(in_db, metrics.psnr(fused, reference), check_dtype=False)
    assert PSNRLoss()(fused, fused).isfinite()
    with pytest.raises(ValueError, match="fused: expected the shape of reference"):
        PSNRLoss()(fused, reference[..., :6])
    with pytest.raises(ValueError, match=r"floor: .* got 0"):
        PSNRLoss(floor=0)


def test_bad_input():
    cube = torch.rand(1, 3, 12, 12)
    with pytest.raises(ValueError, match="reference: expected the shape"):
        CoFusionLoss()(cube, cube[..., :6])
    with pytest.raises(TypeError, match="fused: expected a tensor"):
        CoFusionLoss()([1.0], cube)
    with pytest.raises(ValueError, match=r"weight: .* got -1"):
        CoFusionLoss(weight=-1)
