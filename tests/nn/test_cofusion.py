"""CoFusion's blocks against the paper's equations, written out plainly in float64."""

from __future__ import annotations

import pytest
import pywt
import torch
from torch.nn import functional as F

from fastfusion import nn
from fastfusion.ops import haar
from tests.closeness import assert_close, relative_error

BLOCKS = {
    "SpaCAM": lambda **k: nn.SpaCAM(8, **k),
    "SpeCAM": lambda **k: nn.SpeCAM(8, **k),
    "SSCFM": lambda **k: nn.SSCFM(8, **k),
    "MultiScaleGenerator": lambda **k: nn.MultiScaleGenerator(8, 8, (1, 2, 1), **k),
}
by_block = pytest.mark.parametrize("name", BLOCKS)


def image(rows=9, columns=6, channels=8, batch=2):
    return torch.randn(batch, channels, rows, columns, dtype=torch.float64)


def inputs(name, dtype=torch.float64):
    if name == "MultiScaleGenerator":  # its sizes halve twice
        return (image(8, 12).to(dtype),)
    return tuple(image().to(dtype) for _ in range(2 if name == "SSCFM" else 1))


def flat(y):
    """One tensor of whatever a block gives."""
    if isinstance(y, torch.Tensor):
        return y.flatten()
    return torch.cat([flat(part) for part in y])


def depthwise(layer, x):
    y = F.conv2d(
        x, layer.weight, layer.bias, padding="same", dilation=layer.dilation, groups=x.shape[1]
    )
    return F.gelu(y) if layer.activation == "gelu" else y


def pointwise(layers, x):
    first, last = (
        lambda y, layer=layer: F.conv2d(y, layer.weight[:, :, None, None], layer.bias)
        for layer in (layers[0], layers[2])
    )
    return last(F.gelu(first(x)))


@torch.no_grad()
def test_spacam():
    block, x = nn.SpaCAM(8, expansion=3).double(), image()
    pooled = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, stride=1)
    y = x
    for j, dilation in enumerate((1, 2, 4)):
        assert block.contexts[j].dilation == (dilation, dilation)
        gate = depthwise(block.contexts[j], pooled).softmax(dim=1)
        y = gate * depthwise(block.details[j], y) + y
        assert block.pointwise[j][0].out_features == 24
        y = y + pointwise(block.pointwise[j], y)
    assert_close(block(x), y, 1e-12, "SpaCAM")


def mixed(candidates, state, k):
    """Algorithm 1, stage 2, in plain loops."""
    result = []
    for matrix in candidates:
        saliency = matrix.abs().sum(0).tolist()
        kept = sorted(sorted(range(len(saliency)), key=lambda n: -saliency[n])[:k])
        z = state.tolist()
        for n in kept:
            z = [new if (new := matrix[c, n].item()) != 0 else old for c, old in enumerate(z)]
        result.append(z)
    return torch.tensor(result, dtype=torch.float64)


def test_pointwise_in_pieces(monkeypatch):
    monkeypatch.setattr("fastfusion.nn.cofusion.PIXELS_A_THREAD", 50)
    block, x = nn.SpaCAM(4, expansion=2), torch.randn(2, 4, 61, 47)  # no whole number of pieces
    expected = block(x)
    with torch.no_grad():
        assert_close(block(x), expected, 1e-6, "without a gradient")
        assert block(x[:0]).shape == (0, 4, 61, 47)


@torch.no_grad()
@pytest.mark.parametrize("rows", [8, 9])
def test_specam(rows):
    block, x = nn.SpeCAM(8, expansion=3, k=3).double(), image(rows)
    block.mixing.state.normal_()
    block.alpha.fill_(0.7)
    zero = [None] * 3
    approximation = pywt.dwt2(x.numpy(), "haar", mode="symmetric")[0]
    low = torch.from_numpy(pywt.idwt2((approximation, zero), "haar"))[..., :rows, :6]
    parts = [depthwise(block.low, low), depthwise(block.high, x - low)]
    maxima = torch.cat([part.flatten(2).max(-1).values for part in parts], dim=1)
    z_in = F.gelu(block.gather(maxima))
    first, second = block.expand(z_in)[:, :8], block.expand(z_in)[:, 8:]
    candidates = torch.einsum("bc,bn->bcn", first, second).relu()
    a = torch.sigmoid(block.gate(mixed(candidates, block.mixing.state, 3)))[..., None, None]
    alpha = 1 / (1 + torch.exp(torch.tensor(-0.7, dtype=torch.float64)))
    middle = depthwise(block.middle, parts[0] * a * alpha + parts[1] * a * (1 - alpha))
    expected = x + pointwise(block.pointwise, middle)
    assert_close(block(x), expected, 1e-12, "SpeCAM")


@pytest.mark.parametrize("fused", [True, False])
def test_specam_runs_its_first_stage_in_one_pass(monkeypatch, fused):
    if fused and haar.mix.why_no_cpp() is not None:
        pytest.skip(f"cpp: {haar.mix.why_no_cpp()}")
    block, x = nn.SpeCAM(8).double(), image(9).requires_grad_()
    y = block(x)
    expected = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    monkeypatch.setattr(haar, "fuses_spectral_stage", lambda x: fused)
    called = []
    monkeypatch.setattr(haar.mix, "op", lambda *a, op=haar.mix.op: called.append(1) or op(*a))
    found = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    assert bool(called) == fused
    for value, truth in zip(found, expected, strict=True):
        assert_close(value, truth, 1e-10, "gradient")


@torch.no_grad()
def test_sscfm():
    block, streams = nn.SSCFM(8).double().eval(), (image(), image())
    attended, vectors = [], []
    for x, norm, attention, excitation in zip(
        streams, block.norms, block.attentions, block.excitations, strict=True
    ):
        norm.weight.normal_()
        norm.bias.normal_()
        normed = (x - x.mean(1, keepdim=True)) / (
            x.var(1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        normed = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        responses = torch.stack([depthwise(scale, normed) for scale in attention.scales])
        assert [scale.kernel_size for scale in attention.scales] == [(3, 3), (5, 5)]
        attended.append((responses.softmax(0) * responses).sum(0))
        vectors.append(excitation[2](excitation[0](x.flatten(2).amax(-1)).relu()))
    flows = []
    for own, other in ((0, 1), (1, 0)):
        for group in range(4):
            part = slice(2 * group, 2 * group + 2)
            flows.append(attended[own][:, part] * vectors[other][:, part, None, None])
    residual = block.mix(torch.cat(flows, dim=1))
    for result, x, own in zip(block(*streams), streams, residual.split(8, dim=1), strict=True):
        assert_close(result, x + own, 1e-12, "SSCFM")


@torch.no_grad()
def test_generator():
    block, x = nn.MultiScaleGenerator(5, 8, (1, 2, 3)).double(), image(8, 12, 5)
    local, proxies = block(x)

    def resize(y, factor):
        return F.interpolate(y, scale_factor=factor, mode="bilinear", align_corners=False)

    first = block.stem(x)
    second = block.down[0](resize(first, 0.5))
    third = block.down[1](resize(second, 0.5))
    back = block.up[0](resize(third, 2))
    front = block.up[1](resize(back, 2))
    for result, expected in zip(
        local + proxies, (first, second, third, front, back, third), strict=True
    ):
        assert_close(result, expected, 1e-12, "features")
    # A convolution, then so many residual blocks.
    assert [len(encoder) for encoder in (*block.down, *block.up)] == [3, 4, 3, 2]


def test_dropout_of_a_tenth_in_training_only():
    torch.manual_seed(1)
    block, streams = nn.SSCFM(8), inputs("SSCFM", torch.float32)
    assert block.dropout.p == 0.1
    assert relative_error(flat(block(*streams)), flat(block(*streams))) > 1e-3
    block.eval()
    assert torch.equal(flat(block(*streams)), flat(block(*streams)))


@by_block
def test_gradients(name):
    block = BLOCKS[name]().double().eval()
    x = tuple(value.requires_grad_() for value in inputs(name))
    flat(block(*x)).square().sum().backward()
    for value in (*x, *block.parameters()):
        assert value.grad is not None and value.grad.isfinite().all()
    # Along one direction, against a difference quotient.
    direction = [torch.randn_like(value) for value in x]
    slope = sum((value.grad * step).sum() for value, step in zip(x, direction, strict=True))
    with torch.no_grad():
        ends = [
            flat(block(*(v + h * step for v, step in zip(x, direction, strict=True))))
            .square()
            .sum()
            for h in (-1e-6, 1e-6)
        ]
    assert ((ends[1] - ends[0]) / 2e-6).item() == pytest.approx(slope.item(), rel=1e-4)


@by_block
def test_layouts_dtypes_and_fresh_parameters(name):
    block = BLOCKS[name](dtype=torch.float64).eval()
    x = inputs(name)
    expected = block(*x)
    y = block(*(value.to(memory_format=torch.channels_last) for value in x))
    assert_close(flat(y), flat(expected), 1e-12, "channels_last")
    block.reset_parameters()
    assert relative_error(flat(block(*x)), flat(expected)) > 1e-3
    assert all(p.is_meta for p in BLOCKS[name](device="meta").parameters())
    block = block.float()
    x = tuple(value.float() for value in x)
    with torch.autocast("cpu", torch.bfloat16):
        y = flat(block(*x))
    assert relative_error(y, flat(block(*x))) < 0.02


def test_specam_sees_the_whole_image():
    # Its gate depends on the maxima: a bright corner changes every pixel.
    block, x = nn.SpeCAM(8).eval(), torch.rand(1, 8, 16, 16)
    bright = x.clone()
    bright[..., 0, 0] = 50
    assert (block(bright) - block(x))[..., 8:, 8:].abs().max() > 1e-4


@pytest.mark.parametrize("channels", [6, 2])
def test_sscfm_needs_four_groups(channels):
    with pytest.raises(ValueError, match="channels must be"):
        nn.SSCFM(channels)
