"""FSRVL's blocks against its equations, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastfusion.nn import FeatureSynchronization, FrequencyRecalibration, InitialRepresentation
from tests.closeness import assert_close

IDENTITY = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)


def test_initial_representation_is_equations_5_and_6():
    block = InitialRepresentation(6, 3, 4, dtype=torch.float64)
    y, x = torch.rand(2, 6, 3, 5).double(), torch.rand(2, 3, 6, 10).double()
    hr, lr = block(y, x)

    def pixelwise(weight, image):
        return torch.einsum("dc,bchw->bdhw", weight.flatten(1), image)

    def act(image):
        return torch.where(image > 0, image, 0.01 * image)

    def shared(image):
        weight, bias = block.shared.weight, block.shared.bias
        return act(pixelwise(weight, image) + bias[:, None, None])

    first = act(F.conv2d(x, block.fine.weight, block.fine.bias, padding=1)) * act(
        F.conv2d(x, block.coarse.weight, block.coarse.bias, padding=2)
    )
    expected = pixelwise(block.hr_head.weight, torch.cat([first, shared(first)], 1)).softmax(1)
    assert_close(hr, expected, 1e-12, "H")
    first = act(pixelwise(block.spectral.weight, y) + block.spectral.bias[:, None, None])
    expected = pixelwise(block.lr_head.weight, torch.cat([first, shared(first)], 1)).softmax(1)
    assert_close(lr, expected, 1e-12, "H^")
    assert torch.allclose(hr.sum(1), torch.ones_like(hr[:, 0]))


def test_pixelwise_looks_through_the_central_weights():
    block = InitialRepresentation(6, 3, 4)
    x = torch.rand(1, 3, 5, 7)
    alone = [block.of_msi(x[:, :, i : i + 1, j : j + 1]) for i in range(5) for j in range(7)]
    expected = torch.cat(alone, -1).reshape(1, 4, 5, 7)
    assert torch.allclose(block.of_msi(x, pixelwise=True), expected, atol=1e-6)
    assert not torch.allclose(block.of_msi(x), expected, atol=1e-3)


def test_a_start_on_a_dark_pair_gives_every_unit_the_same_spread():
    block = InitialRepresentation(6, 3, 16)
    y, x = torch.rand(1, 6, 12, 12) / 50, torch.rand(1, 3, 12, 12) / 50
    block.start_on(y, x, torch.Generator().manual_seed(0))
    seen = {}
    for name in ("shared", "hr_head", "lr_head"):
        layer = getattr(block, name)
        layer.register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: seen.get(name, out)})
        )
    block(y, x)  # the MSI's stream comes first
    for name, response in seen.items():
        spread = response.std((0, 2, 3))
        assert torch.allclose(spread, torch.ones_like(spread), atol=1e-3), name
    off_centre = block.coarse.weight.clone()
    off_centre[:, :, 2, 2] = 0
    assert off_centre.count_nonzero() == 0


def test_equation_7_written_out():
    block = FeatureSynchronization(2)
    h = np.random.default_rng(0).random((2, 3, 4))
    rows, columns = 7, 9
    expected = np.empty((2, rows, columns))
    for i in range(rows):
        for j in range(columns):
            u, v = i / (rows - 1) * (3 - 1), j / (columns - 1) * (4 - 1)
            u1, v1 = min(math.floor(u), 1), min(math.floor(v), 2)
            du, dv = u - u1, v - v1
            expected[:, i, j] = (
                (1 - du) * (1 - dv) * h[:, u1, v1]
                + du * (1 - dv) * h[:, u1 + 1, v1]
                + dv * (1 - du) * h[:, u1, v1 + 1]
                + du * dv * h[:, u1 + 1, v1 + 1]
            )
    found = block(torch.from_numpy(h)[None], (rows, columns))
    assert_close(found[0], torch.from_numpy(expected), 1e-12, "H'")


@pytest.mark.parametrize("extend", [False, True])
def test_recalibration_is_equations_8_to_11(extend):
    block = FrequencyRecalibration(4, 3, 3, extend=extend, dtype=torch.float64)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    mixing = torch.randn(2, 4, 4).double()
    x = torch.rand(2, 4, 6, 7).double()
    canvas = np.zeros((2, 4, 12, 14)) if extend else np.zeros((2, 4, 6, 7))
    canvas[..., :6, :7] = x.numpy()
    spectrum = torch.from_numpy(np.fft.rfft2(canvas, norm="ortho"))
    parts = []
    for part, values in enumerate((spectrum.real, spectrum.imag)):
        mixed = torch.einsum("dc,bchw->bdhw", mixing[part], values)
        filtered = F.conv2d(mixed, block.kernel[part][:, None], padding=1, groups=4)
        variance, mean = torch.var_mean(filtered, (0, 2, 3), correction=0)
        normal = (filtered - mean[:, None, None]) / (variance + block.eps).sqrt()[:, None, None]
        weight, bias = block.norm_weight[part], block.norm_bias[part]
        parts.append(normal * weight[:, None, None] + bias[:, None, None])
    recalibrated = (parts[0] + 1j * parts[1]).detach().numpy()
    along_rows = np.fft.ifft(recalibrated, axis=-2, norm="ortho")
    image = np.fft.irfft(along_rows, n=canvas.shape[-1], axis=-1, norm="ortho")[..., :6, :7]
    expected = block.abundances(torch.from_numpy(image))
    assert_close(block(x, mixing), expected, 1e-10, "S")


@pytest.mark.parametrize("extend", [False, True])
def test_evaluation_uses_the_statistics_of_training(extend):
    block = FrequencyRecalibration(4, 3, 3, extend=extend, momentum=1.0, dtype=torch.float64)
    torch.nn.init.normal_(block.norm_weight)
    torch.nn.init.normal_(block.norm_bias)
    x = torch.rand(1, 4, 16, 16).double()
    trained = block(x, IDENTITY)
    count = x.shape[-2] * (x.shape[-1] // 2 + 1) * (4 if extend else 1)
    # Running variances are unbiased: a factor that goes to 1 with the number of frequencies.
    assert_close(block.eval()(x, IDENTITY), trained, 2 / count, "S")


def test_a_start_on_an_image_changes_nothing_in_it():
    block = FrequencyRecalibration(4, 3, dtype=torch.float64)
    x = torch.rand(1, 4, 10, 9).double()
    block.start_on(x, IDENTITY)
    assert_close(block.eval().recalibrate(x, IDENTITY), x, 1e-10, "in evaluation")
    assert_close(block.train().recalibrate(x, IDENTITY), x, 1e-10, "in training")


def test_filters_do_not_reach_around_the_edge():
    """On its own canvas an image's edge gets nothing of the opposite one's mirror image."""
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 3, 5] = 1
    mixing = torch.tensor([[[1.0]], [[0.0]]]).double()  # real parts alone: half of x, half mirrored
    mirrored = FrequencyRecalibration(1, 1, filter=False, extend=False).double()
    assert mirrored.recalibrate(x, mixing)[0, 0, 13, 11] == pytest.approx(0.5)
    alone = FrequencyRecalibration(1, 1, filter=False).double().recalibrate(x, mixing)
    assert alone[0, 0, 3, 5] == pytest.approx(0.5)
    assert_close(alone, x / 2, 1e-12, "without the mirrored half")


def test_ablations_hold_fewer_parameters():
    def names(block):
        return {name for name, _ in block.named_parameters()}

    assert names(FeatureSynchronization(4)) == {"mixing"}
    assert names(FeatureSynchronization(4, mix=False)) == set()
    without = names(FrequencyRecalibration(4, 3, filter=False))
    assert without == {"abundances.weight", "abundances.bias"}
    assert names(FrequencyRecalibration(4, 3)) - without == {"kernel", "norm_weight", "norm_bias"}


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        FrequencyRecalibration(4, 3, 4)
