"""What every model keeps, checks, saves and loads; and the networks as citizens of PyTorch."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import fastfusion
from fastfusion.models import LSO, CoFusion, FusionModel, base
from fastfusion.models.regression import regression
from tests.closeness import assert_close, relative_error

TINY = {
    "LSO": (LSO, {"width": 8, "tokens": 3, "basis": 4, "heads": 2, "guide_width": 8}),
    "CoFusion": (CoFusion, {"width": 8, "depths": (1, 1, 1)}),
}
by_model = pytest.mark.parametrize("name", TINY)


def tiny(name, **options):
    kind, defaults = TINY[name]
    return kind(5, 2, 4, **{**defaults, **options}).eval()


def pair(batch=1, rows=4, columns=5, bands=(5, 2), scale=4):
    lr_hsi = torch.rand(batch, bands[0], rows, columns)
    return lr_hsi, torch.rand(batch, bands[1], scale * rows, scale * columns)


class Plain(FusionModel):
    """The least that a model can be."""

    def __init__(self, hsi_bands, msi_bands, scale, *, note=None):
        super().__init__(hsi_bands, msi_bands, scale)
        self.note = note
        self.layer = nn.Conv2d(msi_bands, hsi_bands, 1)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, lr_hsi, hr_msi):
        self.check_inputs(lr_hsi, hr_msi)
        return self.layer(hr_msi)


# -- checkpoints -------------------------------------------------------------------------------


@by_model
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    model = tiny(name, prior="regression").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save(tmp_path / "model.safetensors")
    for kind in (type(model), FusionModel):
        loaded = kind.load(tmp_path / "model.safetensors")
        assert type(loaded) is type(model) and loaded.config == model.config
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        images = pair()
        prior = torch.rand(1, 5, 16, 20)
        assert torch.equal(loaded(*images, prior), model.eval()(*images, prior))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_loading_draws_no_random_numbers(tmp_path):
    tiny("LSO").save(tmp_path / "model")
    state = torch.get_rng_state()
    LSO.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_and_half_precision_are_kept(tmp_path):
    model = Plain(3, 2, 4, note="sunny").to(torch.bfloat16)
    model.seen += 4
    model.save(tmp_path / "model")
    loaded = Plain.load(tmp_path / "model")
    assert loaded.note == "sunny" and loaded.seen.item() == 7
    assert loaded.layer.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    # What was loaded does not hang on the file.
    before = loaded.layer.weight.clone()
    Path(tmp_path / "model").write_bytes(bytes(10_000))
    assert torch.equal(loaded.layer.weight, before)


def test_a_file_that_is_cut_or_changed_is_refused(tmp_path):
    path = tmp_path / "model"
    Plain(3, 2, 4).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model"):
            FusionModel.load(path)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="model"):
            FusionModel.load(path)


def forged(path, *, config=None, model=None, tensors=None):
    """Change a checkpoint so that its digest still holds."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    header["config"] = json.dumps({**json.loads(header["config"]), **(config or {})})
    header["model"] = model or header["model"]
    weights = {**safetensors.torch.load(data), **(tensors or {})}
    weights = {name: value for name, value in weights.items() if value is not None}
    header["sha256"] = base._digest(header, weights)
    path.write_bytes(safetensors.torch.save(weights, header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Unheard"}, "'Unheard', which is not known.*CoFusion.*LSO"),
        ({"model": "ResidualModel"}, "not known"),
        ({"config": {"wings": 2}}, "no option wings"),
        ({"config": {"hsi_bands": 31}}, "(?s)layer.*must be .31, 2, 1, 1. .*bands.*got"),
        ({"config": {"scale": "four"}}, "makes no model: scale must be an int, got str"),
        ({"tensors": {"layer.bias": None}}, "lacks weights: layer.bias"),
        ({"tensors": {"wing": torch.zeros(2)}}, "has unknown weights: wing"),
        ({"tensors": {"layer.bias": torch.zeros(4)}}, r"layer.bias must be \(3,\).*\(4,\)"),
        ({"tensors": {"layer.bias": torch.zeros(3).int()}}, "layer.bias must be.*int32"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    path = tmp_path / "model"
    Plain(3, 2, 4).save(path)
    forged(path)
    FusionModel.load(path)  # the forger is skilled
    forged(path, **change)
    with pytest.raises(ValueError, match=message):
        FusionModel.load(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model"
    tiny("LSO").save(path)
    with pytest.raises(ValueError, match="holds the model LSO, not CoFusion"):
        CoFusion.load(path)
    path.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="no checkpoint of fastfusion"):
        FusionModel.load(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match="no safetensors file"):
        FusionModel.load(path)
    with pytest.raises(FileNotFoundError):
        FusionModel.load(tmp_path / "none")


def test_the_configuration_must_have_all_that_is_needed():
    with pytest.raises(ValueError, match="lacks msi_bands, scale"):
        Plain._from_config({"hsi_bands": 3}, "file")


def test_a_failing_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model"
    Plain(3, 2, 4).save(path)
    whole = path.read_bytes()

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        Plain(3, 2, 4).save(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_configuration_that_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        Plain(3, 2, 4, note=torch.zeros(2)).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# -- the images --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr_hsi", "hr_msi", "error", "message"),
    [
        (torch.rand(1, 5, 4, 5).numpy(), None, TypeError, "lr_hsi must be a torch.Tensor"),
        (None, [1], TypeError, "hr_msi must be a torch.Tensor"),
        (torch.rand(5, 4, 5), None, ValueError, r"lr_hsi must have shape \(B, G, h, w\)"),
        (torch.rand(1, 2, 4, 5), None, ValueError, "lr_hsi must have 5 bands"),
        (torch.rand(1, 5, 0, 5), None, ValueError, "lr_hsi must hold at least one pixel"),
        (None, torch.rand(1, 5, 16, 20), ValueError, "hr_msi must have 2 bands"),
        (None, torch.rand(1, 2, 16, 16), ValueError, r"hr_msi .*4\*h.*\(1, 2, 16, 20\)"),
        (None, torch.rand(2, 2, 16, 20), ValueError, r"hr_msi .*got \(2, 2, 16, 20\)"),
        (torch.rand(1, 5, 4, 5).int(), None, ValueError, "lr_hsi must be float32"),
        (torch.rand(1, 5, 4, 5).double(), None, ValueError, "lr_hsi .*the model's weights"),
        (None, torch.rand(1, 2, 16, 20).double(), ValueError, "hr_msi .*dtype of lr_hsi"),
        (None, torch.rand(1, 2, 16, 20, device="meta"), ValueError, "hr_msi .*device of lr_hsi"),
    ],
)
@by_model
def test_images_that_do_not_fit(name, lr_hsi, hr_msi, error, message):
    images = pair()
    lr_hsi = images[0] if lr_hsi is None else lr_hsi
    hr_msi = images[1] if hr_msi is None else hr_msi
    with pytest.raises(error, match=message):
        tiny(name)(lr_hsi, hr_msi)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior": "nearest"}, ValueError, "prior must be one of 'bicubic', 'regression'"),
        ({"width": 0}, ValueError, "at least"),
        ({"width": 8.0}, TypeError, "must be an int"),
    ],
)
@by_model
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        tiny(name, **options)
    kind, _ = TINY[name]
    for sizes in ((0, 2, 4), (5, 0, 4), (5, 2, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            kind(*sizes)


# -- the prior ---------------------------------------------------------------------------------


@by_model
def test_a_fresh_model_with_the_regression_prior_gives_the_prior(name):
    model = tiny(name, prior="regression")
    images = pair()
    prior = torch.rand(1, 5, 16, 20)
    assert torch.equal(model(*images, prior), prior)
    assert torch.equal(model(*images), regression(*images))


@by_model
def test_the_prior_replaces_the_bicubic_image(name):
    model = tiny(name)
    images = pair()
    bicubic = F.interpolate(images[0], scale_factor=4, mode="bicubic")
    assert_close(model(*images, bicubic), model(*images), 1e-6, "bicubic given")
    assert relative_error(model(*images, 1 - bicubic), model(*images)) > 0.1
    with pytest.raises(ValueError, match=r"prior must have shape .*\(1, 5, 16, 20\)"):
        model(*images, bicubic[..., :8])


@by_model
def test_every_parameter_learns(name):
    model = tiny(name, width=16).train()  # narrower, a ReLU may leave a whole weight untouched
    model(*pair(batch=2, rows=8, columns=8)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # A bias of the keys is 0 in exact arithmetic. Where the sweep accepts an entry for every
        # channel, the first state has no say.
        if not key.endswith(("key_bias", "mixing.state")):
            assert parameter.grad.abs().sum() > 0, key


@by_model
def test_a_few_steps_reduce_the_loss(name):
    model = tiny(name, prior="regression").train()
    images, reference = pair(), torch.rand(1, 5, 16, 20)
    prior = reference + 0.01 * torch.randn_like(reference)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (model(*images, prior) - reference).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


# -- citizens of PyTorch -----------------------------------------------------------------------


@by_model
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 2), (5, 7)])
@pytest.mark.parametrize("scale", [1, 3])
def test_any_size(name, size, scale):
    model = TINY[name][0](5, 2, scale, **TINY[name][1]).eval()
    y = model(*pair(2, *size, scale=scale))
    assert y.shape == (2, 5, scale * size[0], scale * size[1])
    assert y.isfinite().all() and y.is_contiguous()


@by_model
def test_padding_changes_nothing_inside(name):
    # The pixels that lie beyond the image repeat its border: a constant image knows no border.
    model = tiny(name)
    lr_hsi, hr_msi = torch.full((1, 5, 4, 4), 0.3), torch.full((1, 2, 16, 16), 0.6)
    model.scale = 1
    padded = model(lr_hsi, hr_msi[..., :4, :4])
    for rows, columns in ((3, 3), (4, 1), (2, 4)):
        cropped = model(lr_hsi[..., :rows, :columns], hr_msi[..., :rows, :columns])
        assert_close(cropped, padded[..., :rows, :columns], 1e-6, "cropped")


@by_model
def test_views_and_layouts(name):
    model = tiny(name)
    lr_hsi, hr_msi = pair(2, 4, 6)
    expected = model(lr_hsi, hr_msi)
    layout = torch.channels_last
    y = model(lr_hsi.to(memory_format=layout), hr_msi.flip(3).clone().flip(3))
    assert_close(y, expected, 1e-6, "channels_last")
    y = model.to(memory_format=layout)(lr_hsi, hr_msi)
    assert_close(y, expected, 1e-6, "channels_last weights")


@by_model
def test_backends_agree(name):
    model, images = tiny(name), pair(rows=5)
    with fastfusion.backend("reference"):
        expected = model(*images)
    assert_close(model(*images), expected, 1e-5, "auto")
    with torch.inference_mode():
        assert_close(model(*images), expected, 1e-5, "inference mode")


@by_model
def test_autocast(name):
    model, images = tiny(name), pair()
    expected = model(*images)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*images)
        # The prior itself is not rounded.
        fresh = tiny(name, prior="regression")
        prior = torch.rand(1, 5, 16, 20)
        assert torch.equal(fresh(*images, prior), prior)
    assert y.dtype == torch.float32
    assert relative_error(y, expected) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(*images).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@by_model
def test_double(name):
    model, images = tiny(name), pair()
    y = model(*images)
    assert_close(y, model.double()(*(x.double() for x in images)), 1e-5, "float64")


@by_model
def test_compile_without_a_break_and_once_for_all_batches(name):
    model = tiny(name)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (6, 7, 9):  # no number of bands or rows, which the graph may fix
            images = pair(batch)
            assert_close(compiled(*images), model(*images), 1e-6, f"batch {batch}")
    assert counter.frame_count == 1


@by_model
def test_export_for_all_batches_and_sizes(name):
    model = tiny(name)
    batch, rows, columns = (torch.export.Dim(axis, min=2) for axis in ("batch", "h", "w"))
    shapes = {
        "lr_hsi": {0: batch, 2: rows, 3: columns},
        "hr_msi": {0: batch, 2: 4 * rows, 3: 4 * columns},
    }
    program = torch.export.export(model, pair(2, 6, 7), dynamic_shapes=shapes)
    images = pair(3, 5, 9)
    assert_close(program.module()(*images), model(*images), 1e-6, "exported")
