"""Other people's layers, swapped: same output, same parameters, and back again."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastfusion
from benchmarks.lsm import LSM, SpectralBlock
from fastfusion.accelerating import convnext
from tests.closeness import assert_close, relative_error


class LKA(nn.Module):
    """As VAN's authors wrote it."""

    def __init__(self, dim):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


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
    report = fastfusion.accelerate(net)
    kinds = [row.kind for row in report.swapped]
    assert kinds.count("depthwise convolution") == 2  # not those inside the attention
    assert kinds.count("large-kernel attention") == 1
    assert kinds.count("latent operator") == 2
    assert report.left == []
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


def test_a_latent_spectral_model():
    """Every scale of the whole model, forward and two training steps."""
    torch.manual_seed(0)
    net, x = LSM(width=16, scales=3, patch=4), torch.randn(2, 1, 32, 48)
    plain = copy.deepcopy(net)
    report = fastfusion.accelerate(net)
    assert [row.kind for row in report.swapped] == 3 * ["latent operator"]
    assert not report.left
    with torch.no_grad():
        net.eval(), plain.eval()
        assert_close(net(x), plain(x), 1e-4, "output")
        net.train(), plain.train()
    for model in (net, plain):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
    for (name, p), q in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        assert_close(p, q[1], 1e-3, name)


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
        ({"padding": 3}, "padding"),
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


class _Quiet(nn.Conv2d):
    """A subclass that computes nothing of its own, as transformers' EfficientNet has one."""


class _Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def test_subclasses_of_a_convolution():
    options = {"padding": 1, "groups": 4}
    net = nn.Sequential(_Quiet(4, 4, 3, **options), _Standardised(4, 4, 3, **options))
    net.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, **options)))
    x = torch.randn(2, 4, 9, 9)
    expected = net(x)
    report = fastfusion.accelerate(net)
    assert [row.name for row in report.swapped] == ["0"]
    assert "_Standardised has a forward of its own" in report.left[0].note
    assert "parametrization" in report.left[1].note
    assert_close(net(x), expected, 1e-5, "output")


def test_a_look_alike_is_left():
    class Other(LKA):
        def forward(self, x):
            return x + self.conv1(self.conv_spatial(self.conv0(x)))

    report = fastfusion.accelerate(Other(4))
    assert [row.kind for row in report.left] == ["large-kernel attention"]
    assert "differs" in report.left[0].note


def test_large_kernel_attention_by_other_names():
    class Attention(nn.Module):
        def __init__(self, dim=8):
            super().__init__()
            self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
            self.far = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
            self.mix = nn.Conv2d(dim, dim, 1)

        def forward(self, x):
            return self.mix(self.far(self.near(x))) * x

    net, x = Attention(), torch.randn(2, 8, 12, 13)
    expected = net(x)
    report = fastfusion.accelerate(net)
    assert [row.kind for row in report.swapped] == ["large-kernel attention"]
    assert_close(net(x), expected, 1e-5, "output")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected, 1e-5, "compiled")
    # The same three in a row, without the product, are two depthwise convolutions and no more.
    plain = nn.Sequential(*Attention().children())
    report = fastfusion.accelerate(plain)
    assert [row.kind for row in report.swapped] == 2 * ["depthwise convolution"]
    assert report.left == []


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fastfusion.accelerate(3)


# -- activations, paddings, wavelets --------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
    ],
)
def test_an_activation_is_computed_with_its_convolution(activation, name):
    model = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), activation, nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 8, 11, 12)
    expected, keys = model(x), list(model.state_dict())
    report = fastfusion.accelerate(model)
    assert [row.note for row in report.swapped] == [f"5x5, with {name} of 1"]
    assert_close(model(x), expected, 1e-5, "output")
    assert model[1](torch.tensor([-1.0])).item() == -1  # the activation itself now passes on
    again = pickle.loads(pickle.dumps(model))
    assert_close(again(x), expected, 1e-5, "pickled")
    assert list(model.state_dict()) == keys
    report.restore()
    assert type(model[1]) is type(activation)
    assert torch.equal(model(x), expected)


class _Branches(nn.Module):
    """Uses the convolution's output twice, and one activation behind two convolutions."""

    def __init__(self, twice):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2))
        self.activation, self.twice = nn.ReLU(), twice

    def forward(self, x):
        y = self.first(x)
        z = self.activation(y)
        return y + z if self.twice else self.activation(self.second(z))


@pytest.mark.parametrize("twice", [True, False])
def test_an_activation_with_other_users_stays(twice):
    model = _Branches(twice)
    x = torch.randn(1, 4, 9, 9)
    expected = model(x)
    report = fastfusion.accelerate(model)
    assert [row.note for row in report.swapped] == ["3x3", "3x3"]
    assert_close(model(x), expected, 1e-5, "output")


def test_an_activation_that_no_operator_has_stays():
    for activation in (nn.ReLU6(), nn.GELU(approximate="tanh"), nn.Sigmoid()):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), activation)
        x = torch.randn(1, 4, 9, 9)
        expected = model(x)
        assert [row.note for row in fastfusion.accelerate(model).swapped] == ["3x3"]
        assert_close(model(x), expected, 1e-5, type(activation).__name__)


def test_a_hooked_convolution_keeps_its_activation():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(1, 4, 9, 9)
    model(x)
    fastfusion.accelerate(model)
    model(x)
    assert_close(seen[1], seen[0], 1e-5, "what the hook sees")


@pytest.mark.parametrize("padding", [0, 1, (0, 2), "valid", "same"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_smaller_paddings(padding, channels_last):
    layer = nn.Conv2d(6, 6, (3, 5), padding=padding, groups=6)
    model = nn.Sequential(layer)
    x = torch.randn(2, 6, 9, 11)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = model(x)
    report = fastfusion.accelerate(model)
    assert len(report.swapped) == 1
    y = model(x)
    assert y.stride() == expected.stride()
    assert_close(y, expected, 1e-5, "output")


def test_one_image_without_a_batch_and_images_smaller_than_the_kernel():
    model = nn.Sequential(nn.Conv2d(4, 4, 5, groups=4))
    one = torch.randn(4, 9, 9)
    expected = model(one)
    fastfusion.accelerate(model)
    assert torch.equal(model(one), expected)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        model(torch.randn(1, 4, 3, 3))


def test_a_wider_padding_is_left_with_its_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=3, groups=4))
    report = fastfusion.accelerate(model)
    assert not report.swapped
    assert "padding (3, 3)" in report.left[0].note


@pytest.fixture
def wavelets(monkeypatch):
    """pytorch_wavelets, which asks at import for a module that setuptools no longer brings."""
    pytest.importorskip("pywt")
    if importlib.util.find_spec("pytorch_wavelets") is None:
        pytest.skip("pytorch_wavelets is not installed")
    if importlib.util.find_spec("pkg_resources") is None:
        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_stream = None  # used for its dual-tree filters only
        monkeypatch.setitem(sys.modules, "pkg_resources", stand_in)
    return importlib.import_module("pytorch_wavelets")


@pytest.mark.parametrize("mode", ["zero", "symmetric", "periodization"])
@pytest.mark.parametrize("size", [(16, 24), (15, 22)])
def test_haar_transforms_of_pytorch_wavelets(wavelets, mode, size):
    model = nn.ModuleDict(
        {
            "analysis": wavelets.DWTForward(J=2, wave="haar", mode=mode),
            "synthesis": wavelets.DWTInverse(wave="haar", mode=mode),
            "other": wavelets.DWTForward(J=1, wave="db2", mode=mode),
        }
    )
    x = torch.randn(2, 3, *size, requires_grad=True)
    low, details = model["analysis"](x)
    back = model["synthesis"]((low, details))
    report = fastfusion.accelerate(model)
    assert [row.name for row in report.swapped] == ["analysis", "synthesis"]
    assert "another wavelet" in report.left[0].note
    fast_low, fast_details = model["analysis"](x)
    fast_back = model["synthesis"]((fast_low, fast_details))
    assert_close(fast_low, low, 1e-6, "approximation")
    for y, truth in zip(fast_details, details, strict=True):
        assert_close(y, truth, 1e-6, "details")
    assert_close(fast_back, back, 1e-6, "inverse")
    if mode != "symmetric" or not any(n % 2 for n in size):
        # There its backward pass forgets that the mirrored edge is an input too.
        (gradient,) = torch.autograd.grad(back.square().sum(), x)
        (fast_gradient,) = torch.autograd.grad(fast_back.square().sum(), x)
        assert_close(fast_gradient, gradient, 1e-5, "gradient")
    report.restore()
    assert torch.equal(model["analysis"](x)[0], low)


class Wavelets(nn.Module):
    """ptwt's transforms by matrices, which are no modules, as attributes of one."""

    def __init__(self, wavelet="haar", level=2, separable=True, axes=(-2, -1)):
        super().__init__()
        ptwt = pytest.importorskip("ptwt")
        options = {"separable": separable, "axes": axes}
        self.analysis = ptwt.MatrixWavedec2(wavelet, level, **options)
        self.synthesis = ptwt.MatrixWaverec2(wavelet, **options)

    def forward(self, x):
        low, *details = self.analysis(x)
        return self.synthesis((low, *(tuple(2 * band for band in row) for row in details)))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("separable", [True, False])
def test_haar_transforms_of_ptwt(separable):
    net = Wavelets(separable=separable)
    x = torch.randn(2, 3, 8, 12, requires_grad=True)
    low, *details = net.analysis(x)
    back = net(x)
    (gradient,) = torch.autograd.grad(back.square().sum(), x)
    kinds = type(net.analysis), type(net.synthesis)
    report = fastfusion.accelerate(net)
    assert [row.name for row in report.swapped] == ["analysis", "synthesis"]
    assert {row.kind for row in report.swapped} == {"Haar transform"}
    assert fastfusion.accelerate(net).swapped == []
    fast_low, *fast_details = net.analysis(x)
    assert_close(fast_low, low, 1e-6, "approximation")
    for bands, truths in zip(fast_details, details, strict=True):
        assert bands._fields == truths._fields
        for band, truth in zip(bands, truths, strict=True):
            assert_close(band, truth, 1e-6, "details")
    y = net(x)
    assert_close(y, back, 1e-6, "inverse")
    (fast_gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert_close(fast_gradient, gradient, 1e-5, "gradient")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), y)
    assert torch.equal(net(x[0]), y[0])  # any dimensions before the last two
    odd = torch.randn(1, 2, 7, 12)  # which ptwt pads in its way
    assert_close(net(odd), Wavelets(separable=separable)(odd), 1e-6, "odd")
    report.restore()
    assert (type(net.analysis), type(net.synthesis)) == kinds
    assert_close(net(x), back, 1e-6, "restored")


@pytest.mark.filterwarnings("ignore:Sparse")
def test_other_transforms_of_ptwt_are_left():
    for options, reason in (({"wavelet": "db2"}, "another wavelet"), ({"axes": (-1, -2)}, "axes")):
        report = fastfusion.accelerate(nn.Sequential(Wavelets(**options)))
        assert not report.swapped
        assert [row.name for row in report.left] == ["0.analysis", "0.synthesis"]
        assert all(reason in row.note for row in report.left)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_transform_of_ptwt_is_swapped_where_it_gains(monkeypatch):
    ratios = iter([2.0, 0.5])
    asked = []
    monkeypatch.setattr(
        fastfusion.accelerating, "gain", lambda *found: asked.append(found[3]) or next(ratios)
    )
    monkeypatch.setattr(fastfusion.accelerating, "_whole_gain", lambda *arguments: 1.5)
    net, x = Wavelets(), torch.randn(1, 2, 8, 8)
    plain = type(net.synthesis)
    report = fastfusion.accelerate(net, x)
    assert [row.name for row in report.swapped] == ["analysis"]
    assert report.left[0].note == "no faster on the example: 0.50 times"
    assert asked[0][0] is x
    assert type(net.synthesis) is plain


# -- other people's models ------------------------------------------------------------------------


@functools.cache
def _import_torchvision():
    """Let a torchvision be imported whose library is of another build than PyTorch's.

    transformers takes it where it is there, timm needs it. Such a one describes operators at import
    that its library could not register; no model calls them, so it is enough to name them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
        _import_torchvision.library = library  # which holds only as long as it is held


def _third_party(name):
    _import_torchvision()
    transformers = pytest.importorskip("transformers")
    small = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_channels": 3}
    tiny = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    makers = {
        "ConvNeXt": lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**small)),
        "ConvNeXtV2": lambda: transformers.ConvNextV2Model(transformers.ConvNextV2Config(**small)),
        "MobileNetV2": lambda: transformers.MobileNetV2Model(
            transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=64)
        ),
        "MobileNetV1": lambda: transformers.MobileNetV1Model(
            transformers.MobileNetV1Config(depth_multiplier=0.25, image_size=64)
        ),
        "DINOv3ConvNext": lambda: transformers.DINOv3ConvNextModel(
            transformers.DINOv3ConvNextConfig(**{**small, "layer_scale_init_value": 0.5})
        ),
        "EfficientNet": lambda: transformers.EfficientNetModel(
            transformers.EfficientNetConfig(
                width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320
            )
        ),
        "MobileViT": lambda: transformers.MobileViTModel(
            transformers.MobileViTConfig(
                hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32]
            )
        ),
        "MobileViTV2": lambda: transformers.MobileViTV2Model(
            transformers.MobileViTV2Config(width_multiplier=0.25)
        ),
        "SegFormer": lambda: transformers.SegformerModel(
            transformers.SegformerConfig(**tiny, num_attention_heads=[1, 2, 4, 8])
        ),
        "GLPN": lambda: transformers.GLPNModel(
            transformers.GLPNConfig(**tiny, num_attention_heads=[1, 2, 4, 8])
        ),
        "PVTv2": lambda: transformers.PvtV2Model(
            transformers.PvtV2Config(**tiny, num_attention_heads=[1, 2, 4, 8], image_size=64)
        ),
        "CvT": lambda: transformers.CvtModel(
            transformers.CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3])
        ),
        "SwiftFormer": lambda: transformers.SwiftFormerModel(
            transformers.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32])
        ),
        "FocalNet": lambda: transformers.FocalNetModel(
            transformers.FocalNetConfig(image_size=64, embed_dim=8, **tiny)
        ),
        "PPLCNet": lambda: transformers.PPLCNetBackbone(transformers.PPLCNetConfig()),
        "HGNetV2": lambda: transformers.HGNetV2Backbone(transformers.HGNetV2Config()),
    }
    return makers[name]()


def _lively(model, x):
    """Let every layer be seen in the output, in eval mode.

    Of a fresh model it is often a constant: scales begin near 0, and batch norms, which do not know
    their input yet, let it fade from layer to layer.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.dim() == 4 else 0.05
            parameter.add_(spread * torch.randn_like(parameter))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
        first, second = (_features(model(image)) for image in (x, x.flip(-1)))
    assert relative_error(first, second) > 1e-4
    return model


def _features(output):
    if isinstance(output, torch.Tensor):
        return output
    last = getattr(output, "last_hidden_state", None)
    return output.feature_maps[-1] if last is None else last


@pytest.mark.parametrize("name", ["ConvNeXt", "ConvNeXtV2", "MobileNetV2", "MobileNetV1"])
def test_third_party_models(name):
    """Forward, three training steps, and the state_dict, against an untouched copy."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = _lively(_third_party(name), x)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        expected = plain(x).last_hidden_state
    report = fastfusion.accelerate(model)
    assert report.swapped, str(report)
    assert all(row.note for row in report.left)
    with torch.no_grad():
        assert_close(model(x).last_hidden_state, expected, 1e-5, "output")
    assert list(model.state_dict()) == list(plain.state_dict())
    # In float64, where three steps do not blow rounding up.
    state = {key: value.double() for key, value in plain.state_dict().items()}
    for trained in (model.double(), plain.double()):
        torch.manual_seed(1)
        optimiser = torch.optim.SGD(trained.parameters(), lr=1e-4)
        for _ in range(3):
            optimiser.zero_grad()
            trained(x.double()).last_hidden_state.square().mean().backward()
            optimiser.step()
    moved = False
    for (key, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        if a.is_floating_point():
            assert_close(a, b, 1e-9, key)
            moved |= relative_error(b, state[key]) > 1e-6
    assert moved
    model.float(), plain.float()
    report.restore()
    fresh = copy.deepcopy(plain)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state, fresh(x).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "swapped", "left"),
    [
        ("DINOv3ConvNext", 10, 0),
        ("EfficientNet", 6, 4),
        ("MobileViT", 3, 4),
        ("MobileViTV2", 5, 4),
        ("SegFormer", 4, 0),
        ("GLPN", 4, 0),
        ("PVTv2", 4, 0),
        ("CvT", 6, 12),
        ("SwiftFormer", 4, 0),
        ("FocalNet", 8, 0),
        ("PPLCNet", 9, 4),
        ("HGNetV2", 24, 3),
    ],
)
def test_more_third_party_models(name, swapped, left):
    """Every layer of a known kind is swapped or named; outputs and gradients stay."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = _lively(_third_party(name), x)
    plain = copy.deepcopy(model)
    report = fastfusion.accelerate(model)
    assert (len(report.swapped), len(report.left)) == (swapped, left), str(report)
    assert all(row.note == "not covered: stride (2, 2)" for row in report.left)
    # By name, as "auto" leaves images as small as these to PyTorch.
    kernels = "cpp" if fastfusion.backends()["cpp"] == "available" else "auto"
    with fastfusion.backend(kernels):
        with torch.no_grad():
            assert_close(_features(model(x)), _features(plain(x)), 1e-5, "output")
        outputs = [_features(net.double()(x.double())) for net in (model, plain)]
        assert_close(*outputs, 1e-10, "output in float64")
        for output in outputs:
            output.square().mean().backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert_close(p.grad, q.grad, 1e-8, key, scale=1e-6)
    report.restore()
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))


def test_activations_in_a_model_that_cannot_be_traced(monkeypatch):
    """FocalNet's filters and their GELUs are neighbours in an ``nn.Sequential``."""
    monkeypatch.setattr(fastfusion.accelerating, "gain", lambda *arguments: 2.0)
    monkeypatch.setattr(fastfusion.accelerating, "_whole_gain", lambda *arguments: 1.5)
    model, x = _third_party("FocalNet").eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        report = fastfusion.accelerate(model, x)
        assert len(report.swapped) == 8
        assert all(", with gelu of " in row.note for row in report.swapped)
        assert_close(model(x).last_hidden_state, expected, 1e-5, "output")
    assert not any(module._forward_hooks for module in model.modules())


def test_neighbours_that_somebody_else_calls_are_not_fused(monkeypatch):
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())

        def forward(self, x):
            if x.sum() > 1e9:  # no graph of it can be traced
                return x
            for layer in self.layers:
                x = x + layer(x)
            return x

    monkeypatch.setattr(fastfusion.accelerating, "gain", lambda *arguments: 2.0)
    net, x = Peeking(), torch.randn(1, 4, 9, 9)
    expected = net(x)
    monkeypatch.setattr(fastfusion.accelerating, "_whole_gain", lambda *arguments: 1.5)
    report = fastfusion.accelerate(net, x)
    assert [row.note for row in report.swapped] == ["3x3"]
    assert_close(net(x), expected, 1e-5, "output")


@pytest.mark.parametrize("name", ["ConvNeXt", "ConvNeXtV2", "MobileNetV2"])
def test_third_party_model_compiled_and_exported(name):
    model = _third_party(name).eval()
    fastfusion.accelerate(model)

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x, return_dict=False)[0]

    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = Features()(x)
        compiled = torch.compile(Features(), fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected, 1e-5, "compiled")
        exported = torch.export.export(Features(), (x,)).module()
        assert_close(exported(x), expected, 1e-5, "exported")


# -- ConvNeXt's block -----------------------------------------------------------------------------


class Response(nn.Module):
    """V2's global response normalisation."""

    def __init__(self, width):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(1, 1, 1, width)) for _ in range(2))

    def forward(self, x):
        norm = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * x * norm / (norm.mean(-1, keepdim=True) + 1e-6) + self.beta + x


class MemoryFuser(nn.Module):
    """SAM 2's block: ConvNeXt's with its norm before the permutation."""

    class Norm(nn.LayerNorm):
        data_format = "channels_first"

        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def __init__(self, width=8):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layer_norm = self.Norm(width)
        self.activation = nn.GELU()
        self.pointwise_conv1 = nn.Linear(width, 4 * width)
        self.pointwise_conv2 = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.layer_norm(self.depthwise_conv(x)).permute(0, 2, 3, 1)
        y = self.scale * self.pointwise_conv2(self.activation(self.pointwise_conv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Block(nn.Module):
    """ConvNeXt's block as its authors wrote it; V2's with ``response``."""

    def __init__(self, width=8, activation=None, response=False, scale=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = activation or nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), scale)) if scale else None
        if response:
            self.grn = Response(4 * width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        y = self.pwconv2(self.grn(y) if hasattr(self, "grn") else y)
        y = y if self.gamma is None else self.gamma * y
        return x + self.drop(y.permute(0, 3, 1, 2))


@pytest.fixture
def products(monkeypatch):
    """The activations of the fused products that were run."""
    seen, product = [], convnext._linear

    def noted(x, layer, activation):
        seen.append(activation)
        return product(x, layer, activation)

    monkeypatch.setattr(convnext, "_linear", noted)
    return seen


def test_a_convnext_block_in_inference(products):
    for options in ({"scale": 0.5}, {"scale": None}, {"response": True, "scale": 0.5}):
        net = nn.Sequential(Block(**options)).train()
        report = fastfusion.accelerate(net)
        assert [row.kind for row in report.swapped] == ["ConvNeXt block", "depthwise convolution"]
        assert net[0].training and net[0].drop.training
        net.eval()
        plain = copy.deepcopy(net)
        fastfusion.accelerate(plain).restore()
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 8, 9, 11).contiguous(memory_format=layout)
            products.clear()
            with torch.no_grad():
                y = net(x)
            assert products == ["gelu", "none"]
            with torch.no_grad():
                truth = plain[0].forward(x)
            assert_close(y, truth, 1e-5, "output")
            assert y.stride() == truth.stride()
        report.restore()
        assert type(net[0]) is Block


def test_a_block_whose_norm_comes_before_the_permutation(products):
    net, x = MemoryFuser().eval(), torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        expected = net(x)
        report = fastfusion.accelerate(net)
        assert [row.kind for row in report.swapped] == ["ConvNeXt block", "depthwise convolution"]
        products.clear()
        assert_close(net(x), expected, 1e-5, "output")
    assert products == ["gelu", "none"]


def test_a_convnext_block_is_left_alone_where_someone_looks(products):
    net = nn.Sequential(Block(scale=0.5)).eval()
    plain, x = copy.deepcopy(net), torch.randn(2, 8, 9, 11)
    fastfusion.accelerate(net)
    products.clear()
    for model in (net, plain):
        model(x).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-4, name)
    counted = []
    with torch.no_grad():
        for model in (net, plain):
            with FlopCounterMode(display=False) as counter:
                model(x)
            counted.append(counter.get_total_flops())
        with torch.autocast("cpu"):
            net(x)
        net.double()(x.double())
        net.float().train()(x)
    assert counted[0] == counted[1] > 0
    assert products == []


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Block(activation=nn.ReLU()), "another activation"),
        (Block(activation=nn.GELU(approximate="tanh")), "another activation"),
        (
            type("Twice", (Block,), {"forward": lambda self, x: 2 * Block.forward(self, x)})(),
            "diff",
        ),
        (
            # A difference that a fresh block's tiny scale would hide.
            type(
                "Other",
                (Block,),
                {"forward": lambda self, x: x + self.gamma[:, None, None] * self.dwconv(x)},
            )(),
            "differs",
        ),
    ],
)
def test_a_block_that_looks_like_convnexts_is_left(block, reason):
    report = fastfusion.accelerate(block)
    assert [row.kind for row in report.left] == ["ConvNeXt block"]
    assert reason in report.left[0].note
    assert [row.kind for row in report.swapped] == ["depthwise convolution"]


def test_a_convnext_block_with_hooks_inside_is_left():
    block, seen = Block(), []
    block.pwconv1.register_forward_hook(lambda *arguments: seen.append(1))
    report = fastfusion.accelerate(block)
    assert "hooks" in report.left[0].note
    with torch.no_grad():
        block.eval()(torch.randn(1, 8, 9, 9))
    assert seen == [1]


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    _import_torchvision()
    return importlib.import_module("timm")


@pytest.mark.parametrize(
    "name", ["convnext_femto_ols", "convnext_tiny", "convnextv2_tiny", "mobilenetv2_050"]
)
def test_models_of_timm(name, timm):
    torch.manual_seed(0)
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)} if "convnext" in name else {}
    model = timm.create_model(name, num_classes=10, **options)
    x = torch.randn(2, 3, 64, 64)
    model = _lively(model, x)
    plain = copy.deepcopy(model)
    report = fastfusion.accelerate(model)
    kinds = {row.kind for row in report.swapped}
    assert "depthwise convolution" in kinds
    assert ("ConvNeXt block" in kinds) == (name in ("convnext_tiny", "convnextv2_tiny"))
    with torch.no_grad():
        assert_close(model(x), plain(x), 1e-5, "output")
    assert list(model.state_dict()) == list(plain.state_dict())
    scale = max(p.abs().max().item() for p in plain.parameters())
    for net in (model, plain):
        optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(a, b, 1e-4, key, scale=scale)
    report.restore()
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))


def test_with_an_example_only_what_gets_faster_is_swapped(monkeypatch):
    """The clock decides, so here it is one of our own: the first layer gains, the second not."""
    ratios = iter([2.0, 0.5])
    monkeypatch.setattr(fastfusion.accelerating, "gain", lambda *arguments: next(ratios))
    monkeypatch.setattr(fastfusion.accelerating, "_whole_gain", lambda *arguments: 1.5)
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2)))
    report = fastfusion.accelerate(net, torch.randn(1, 4, 9, 9))
    assert [row.name for row in report.swapped] == ["0"]
    assert report.left[0].note == "no faster on the example: 0.50 times"
    assert report.gain == 1.5
    assert not net[0]._forward_pre_hooks


def test_with_an_example_a_model_that_gains_nothing_is_restored(monkeypatch):
    monkeypatch.setattr(fastfusion.accelerating, "gain", lambda *arguments: 2.0)
    monkeypatch.setattr(fastfusion.accelerating, "_whole_gain", lambda *arguments: 0.8)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    report = fastfusion.accelerate(net, torch.randn(1, 4, 9, 9))
    assert type(net[0]) is nn.Conv2d
    assert report.swapped == []
    assert report.left[0].note.endswith("the whole model did not: 0.80 times")


def test_the_gain_of_the_whole_is_measured_in_turns(monkeypatch):
    """By a clock of our own: what runs on PyTorch takes two ticks, what is swapped one."""
    net, clock = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)), [0.0]
    order = []

    def tick(module, inputs):
        fast = hasattr(type(module), "accelerated_from")
        order.append(fast)
        clock[0] += 1 if fast else 2

    fastfusion.accelerate(net)
    swapped = type(net[0])
    net[0].register_forward_pre_hook(tick)
    monkeypatch.setattr(fastfusion.accelerating.time, "perf_counter", lambda: clock[0])
    gain = fastfusion.accelerating._whole_gain(net, (torch.randn(1, 4, 9, 9),))
    assert gain == 2
    assert order == 7 * [False, True]
    assert type(net[0]) is swapped


def test_with_an_example_where_nothing_is_swapped_there_is_no_gain():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4))
    assert fastfusion.accelerate(net, torch.randn(1, 4, 9, 9)).gain == 1
