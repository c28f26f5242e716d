"""Other people's layers, swapped: same output, same parameters, and back again."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastfusion
from tests.closeness import assert_close


class LKA(nn.Module):
    """As VAN's authors wrote it."""

    def __init__(self, dim):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class SpectralBlock(nn.Module):
    """LSM's block, and with ``squash`` LSO's, with the names of their authors' code."""

    def __init__(self, width=16, basis=6, patch=(4, 4), tokens=3, squash=False):
        super().__init__()
        self.patch_size, self.squash, self.head = patch, squash, 8
        modes = torch.arange(1, basis + 1.0) if squash else torch.arange(basis) / basis
        self.modes_list = modes
        self.weights = nn.Parameter(torch.rand(width, 2 * basis) / width)
        self.latent = nn.Parameter(torch.rand(8, tokens, width // 8) / width)
        self.encoder_attn = nn.Conv2d(width, 2 * width, 1)
        self.decoder_attn = nn.Conv2d(width, width, 1)

    def attend(self, q, k, v):
        scores = torch.einsum("bhlc,bhsc->bhls", q, k)
        if self.squash:
            scores = scores / math.sqrt(q.shape[-1])
        return torch.einsum("bhls,bhsc->bhlc", scores.softmax(-1), v)

    def forward(self, x):
        b, c, h, w = x.shape
        (ph, pw), d = self.patch_size, c // self.head
        x = x.view(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1, c, ph, pw)
        n, length = len(x), ph * pw
        kv = self.encoder_attn(x).view(n, 2 * c, -1).permute(0, 2, 1)
        kv = kv.reshape(n, length, self.head, d, 2).permute(4, 0, 2, 1, 3)
        tokens = self.latent[None].expand(n, -1, -1, -1)
        z = self.attend(tokens, kv[0], kv[1]) + tokens
        z = z.permute(0, 1, 3, 2).reshape(n, c, -1)
        if self.squash:
            z = math.pi * z.sigmoid()
        phase = self.modes_list * z[..., None] * math.pi
        basis = torch.cat([phase.sin(), phase.cos()], dim=-1)
        z = torch.einsum("bilm,im->bil", basis, self.weights) + z
        z = z.view(n, self.head, d, -1).permute(0, 1, 3, 2)
        q = self.decoder_attn(x).view(n, c, -1).permute(0, 2, 1)
        q = q.reshape(n, length, self.head, d).permute(0, 2, 1, 3)
        y = self.attend(q, z, z).permute(0, 1, 3, 2).reshape(n, c, ph, pw) + x
        y = y.view(b, h // ph, w // pw, c, ph, pw).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(b, c, h, w)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 7, padding=3, groups=16),
        nn.GELU(),
        LKA(16),
        SpectralBlock(),
        SpectralBlock(squash=True),
        nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=16, bias=False),
    )


def test_a_model_is_swapped_and_restored():
    net, x = model(), torch.randn(2, 3, 16, 20)
    expected, state = net(x), net.state_dict()
    classes = [type(module) for module in net.modules()]
    report = fastfusion.accelerate(net, x)
    kinds = [row.kind for row in report.swapped]
    assert kinds.count("depthwise convolution") == 4  # two of them inside the attention
    assert kinds.count("large-kernel attention") == 1
    assert kinds.count("latent operator") == 2
    assert report.left == []
    assert report.gain > 0
    assert "layers swapped" in str(report)
    assert_close(net(x), expected, 1e-4, "swapped")
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True)
    )
    assert list(net.state_dict()) == list(state)
    assert fastfusion.accelerate(net).swapped == []  # a second time there is nothing to do
    report.restore()
    assert [type(module) for module in net.modules()] == classes
    assert torch.equal(net(x), expected)


def test_training_goes_on():
    net, x = model(), torch.randn(1, 3, 16, 20)
    plain = copy.deepcopy(net)
    fastfusion.accelerate(net)
    for m in (net, plain):
        m(x).square().mean().backward()
    scale = max(p.grad.norm().item() for p in plain.parameters())
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-3, name, scale=1e-2 * scale)


def test_copies_and_pickles():
    net, x = model(), torch.randn(1, 3, 16, 20)
    fastfusion.accelerate(net)
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)


def test_hooks_stay():
    net, seen = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)), []
    net[0].register_forward_hook(lambda *args: seen.append(1))
    fastfusion.accelerate(net)
    net(torch.randn(1, 4, 8, 8))
    assert seen == [1]


def test_compile_in_one_graph():
    net, x = nn.Sequential(*list(model())[1:4]), torch.randn(1, 16, 16, 20)
    expected = net(x)
    fastfusion.accelerate(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected, 1e-5, "compiled")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 2}, "stride"),
        ({"padding": 0}, "padding"),
        ({"kernel_size": 4, "padding": 1}, "kernel"),
        ({"padding_mode": "reflect"}, "padding mode"),
        ({"out_channels": 8}, "output channels"),
    ],
)
def test_what_is_not_covered_is_left_and_named(options, reason):
    layer = nn.Conv2d(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "kernel_size": 3,
            "padding": 1,
            "groups": 4,
            **options,
        }
    )
    report = fastfusion.accelerate(nn.Sequential(layer))
    assert report.swapped == []
    assert reason in report.left[0].note


def test_a_look_alike_is_left():
    class Other(LKA):
        def forward(self, x):
            return x + self.conv1(self.conv_spatial(self.conv0(x)))

    report = fastfusion.accelerate(Other(4))
    assert [row.kind for row in report.left] == ["large-kernel attention"]
    assert "differs" in report.left[0].note


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fastfusion.accelerate(3)
