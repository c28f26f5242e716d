"""The layers: what they compute, what they keep, what they refuse."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn as tnn

from fastfusion import nn, ops
from tests.closeness import assert_close

LAYERS = {
    "LatentOperator2d": (lambda **k: nn.LatentOperator2d(8, heads=2, tokens=3, basis=4, **k), 8),
    "LatentOperator2d-offset": (
        lambda **k: nn.LatentOperator2d(8, heads=4, offset=True, patch_size=None, **k),
        8,
    ),
    "FrequencyFilter2d": (lambda **k: nn.FrequencyFilter2d(4, 6, 3, **k), 4),
    "FrequencyFilter2d-plain": (
        lambda **k: nn.FrequencyFilter2d(4, norm=False, tied=True, mixing_bias=True, **k),
        4,
    ),
    "FrequencyFilter2d-circular": (
        lambda **k: nn.FrequencyFilter2d(4, norm=False, padding_mode="circular", **k),
        4,
    ),
    "DepthwiseConv2d": (lambda **k: nn.DepthwiseConv2d(4, 4, 3, activation="gelu", **k), 4),
    "LargeKernelAttention": (lambda **k: nn.LargeKernelAttention(4, **k), 4),
    "MultiscaleAttention": (lambda **k: nn.MultiscaleAttention(4, **k), 4),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


@by_layer
def test_every_parameter_learns(name):
    make, channels = LAYERS[name]
    layer = make()
    x = torch.randn(2, channels, 9, 10, requires_grad=True)
    # Not the plain sum of squares: a batch norm would hold it constant.
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.abs().sum() > 0
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if key != "key_bias":  # 0 in exact arithmetic: it shifts all scores of a token alike
            assert parameter.grad.abs().sum() > 0, key


@by_layer
def test_dtype_and_device_of_the_constructor(name):
    make, channels = LAYERS[name]
    layer = make(dtype=torch.float64)
    assert layer(torch.randn(1, channels, 5, 6, dtype=torch.float64)).dtype == torch.float64
    meta = make(device="meta")
    assert all(p.device.type == "meta" for p in meta.parameters())


@by_layer
def test_copies_and_files_keep_the_layer(name):
    make, channels = LAYERS[name]
    layer, x = make().eval(), torch.randn(1, channels, 6, 7)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), expected)


@by_layer
def test_reset_parameters_draws_afresh(name):
    make, _ = LAYERS[name]
    layer = make()
    before = [p.clone() for p in layer.parameters() if p.dim() > 1]
    layer.reset_parameters()
    after = [p for p in layer.parameters() if p.dim() > 1]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed)


@by_layer
def test_repr_shows_the_configuration(name):
    make, channels = LAYERS[name]
    assert str(channels) in repr(make())


def test_latent_operator_starts_as_in_the_paper():
    layer = nn.LatentOperator2d(64)
    assert layer.prompts.shape == (8, 8, 8)
    for parameter in (layer.prompts, layer.sine, layer.cosine):
        assert parameter.min() >= 0
        assert parameter.max() < 1 / 64
    assert sum(p.numel() for p in layer.parameters()) == 64 * 8 + 3 * (64 * 64 + 64) + 2 * 64 * 24


def test_frequency_filter_normalizes_with_the_batch_and_then_with_what_it_learned():
    layer = nn.FrequencyFilter2d(3, 5, 3)
    x = torch.randn(4, 3, 8, 9)
    real, imag = ops.frequency_response2d(x, layer.mixing, layer.kernel)
    layer(x)
    for part, response in enumerate((real, imag)):
        mean, var = response.mean((0, 2, 3)), response.var((0, 2, 3))
        assert_close(layer.running_mean[part], 0.1 * mean, 1e-5, "running mean")
        assert_close(layer.running_var[part], 0.9 + 0.1 * var, 1e-5, "running variance")
    assert layer.num_batches_tracked == 1
    with torch.no_grad():
        layer.norm_weight.uniform_(0.5, 2)
        layer.norm_bias.normal_()
    layer.eval()
    norms = []
    for part, response in enumerate((real, imag)):
        norm = tnn.BatchNorm2d(5).eval()
        norm.running_mean.copy_(layer.running_mean[part])
        norm.running_var.copy_(layer.running_var[part])
        norm.weight.data.copy_(layer.norm_weight[part])
        norm.bias.data.copy_(layer.norm_bias[part])
        norms.append(norm(response))
    spectrum = torch.fft.ifft(torch.complex(*norms), dim=-2)
    assert_close(layer(x), torch.fft.irfft(spectrum, n=9), 1e-5, "evaluation")


def test_depthwise_is_a_drop_in():
    plain = tnn.Conv2d(6, 6, (3, 5), padding=(2, 2), dilation=(2, 1), groups=6, bias=False)
    ours = nn.DepthwiseConv2d(6, 6, (3, 5), 1, (2, 2), (2, 1), 6, False)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 9, 8)
    assert_close(ours(x), plain(x), 2e-6, "drop-in")
    assert isinstance(ours, tnn.Conv2d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 8}, "must be equal for a depthwise"),
        ({"groups": 2}, "must be equal for a depthwise"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"stride": 2}, "stride must be 1"),
        ({"padding": 0}, "padding must keep the size"),
        ({"padding_mode": "reflect"}, "padding_mode must be one of 'zeros'"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"dilation": 0}, "dilation must be at least 1"),
    ],
)
def test_depthwise_refuses_what_the_operator_does_not_cover(options, message):
    with pytest.raises(ValueError, match=message):
        nn.DepthwiseConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LatentOperator2d(10, heads=3), "heads must divide channels"),
        (lambda: nn.LatentOperator2d(8, tokens=0), "tokens must be at least 1"),
        (lambda: nn.LatentOperator2d(8, patch_size=0), "patch_size must be at least 1"),
        (lambda: nn.FrequencyFilter2d(4, kernel_size=4), "kernel_size must be odd"),
        (lambda: nn.FrequencyFilter2d(4, padding_mode="circular"), "norm must be False"),
        (lambda: nn.CoordinateMixing(4, k=0), "k must be at least 1"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_haar_layers_and_coordinate_mixing_call_their_operators():
    x = torch.randn(1, 2, 7, 6)
    bands = nn.HaarDWT2d()(x)
    assert_close(nn.HaarIDWT2d()(*bands, size=(7, 6)), x, 1e-6, "reconstruction")
    low, high = nn.HaarSplit2d()(x)
    assert_close(low + high, x, 1e-6, "sum")
    layer = nn.CoordinateMixing(2)
    assert layer.k == 1
    candidates = torch.randn(3, 2, 5)
    assert torch.equal(layer(candidates), ops.coordinate_mixing(candidates, torch.zeros(2), k=1))
    layer(candidates).sum().backward()
    assert layer.state.grad.shape == (2,)


def test_large_kernel_attention_has_vans_state_dict():
    keys = set(nn.LargeKernelAttention(4).state_dict())
    layers = ("conv0", "conv_spatial", "conv1")
    assert keys == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_init_matches_torch():
    bound = 1 / math.sqrt(64)
    weight = nn.LatentOperator2d(64).key_weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.98 * bound
