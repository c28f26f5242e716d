"""Training: resumable to the bit, alike in one and two processes, and careful."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fastfusion import training
from fastfusion.data import Degradation, demo_scene, wald
from fastfusion.evaluation import broad_bands
from fastfusion.models import LSO, FusionModel
from fastfusion.models.base import read_checkpoint
from fastfusion.models.regression import regression
from fastfusion.training import (
    RECIPES,
    Recipe,
    Training,
    draw,
    model_for,
    read_recipe,
    samples_of,
    train,
    train_on_pair,
)

pytest.importorskip("safetensors")
pytest.importorskip("torchmetrics")

TINY = {"width": 8, "heads": 2, "tokens": 2, "basis": 3, "guide_width": 8, "guide_blocks": 1}


@pytest.fixture(scope="module")
def cube(tmp_path_factory) -> str:
    """A scene of 6 bands and 24x32 pixels, smooth enough that something can be learnt."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 6, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(0, 1)
    path = tmp_path_factory.mktemp("scenes") / "cube.npy"
    np.save(path, image[0].numpy())
    return str(path)


@pytest.fixture
def recipe(cube) -> Recipe:
    return Recipe(
        options=TINY,
        scenes=(cube,),
        validation=(f"{cube}@0:16,8:24",),
        epochs=4,
        steps=2,
        patch=8,
        batch=2,
        learning_rate=1e-3,
        flips=True,
    )


def weights(folder: Path, name="model.safetensors") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / name)[1]


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# -- recipes and patches ---------------------------------------------------------------------------


def test_the_papers_recipes():
    lso, cofusion = RECIPES["lso-cave"], RECIPES["cofusion-pavia"]
    assert (lso.epochs, lso.batch, lso.patch, lso.decay, lso.decay_every) == (
        1000,
        16,
        64,
        0.6,
        300,
    )
    assert (cofusion.epochs, cofusion.batch, cofusion.patch, cofusion.decay) == (300, 8, 128, 0.1)


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model": "CoFusion", "scenes": ["demo"], "batch": 3}))
    recipe = read_recipe(path, seed=5)
    assert (recipe.model, recipe.batch, recipe.seed) == ("CoFusion", 3, 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "FSRVL"}, ValueError, "model"),
        ({"batch": 0}, ValueError, "batch"),
        ({"batch": 2.5}, TypeError, "batch"),
        ({"patch": 30}, ValueError, "patch must be a multiple of the scale 4"),
        ({"psf": "round"}, ValueError, "psf: expected gaussian"),
        ({"psf": "gaussian:-1"}, ValueError, "psf: expected gaussian"),
        ({"ema": 1.0}, ValueError, "ema must be below 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"loss": "relative"}, ValueError, "loss: 'relative' is for"),
        ({"scenes": "demo"}, TypeError, "scenes: expected a list"),
        ({"colour": 1}, ValueError, "a recipe has no 'colour'"),
    ],
)
def test_a_bad_recipe(changes, error, message):
    with pytest.raises(error, match=message):
        read_recipe("lso-cave", **changes)


@pytest.mark.parametrize("name", ["lso", "missing"])
def test_an_unknown_recipe(name):
    with pytest.raises(ValueError, match=r"config: expected a \.json file or one of lso-cave"):
        read_recipe(name)


def test_patches_of_the_images_belong_together(recipe):
    (sample,) = samples_of(recipe, recipe.scenes)
    marked = sample._replace(
        lr_hsi=torch.arange(48.0).view(1, 6, 8),
        hr_msi=torch.arange(48.0).view(1, 6, 8).repeat_interleave(4, 1).repeat_interleave(4, 2),
    )
    patches = [*draw([marked], recipe, 3, 64, slice(0, 64))]
    for patch in patches:
        grown = patch.lr_hsi.repeat_interleave(4, 1).repeat_interleave(4, 2)
        assert torch.equal(patch.hr_msi, grown)
    assert {patch.lr_hsi.amin().item() for patch in patches} >= {0.0, 38.0}  # to the corners
    part = [*draw([marked], recipe, 3, 64, slice(10, 12))]
    assert all(torch.equal(a.lr_hsi, b.lr_hsi) for a, b in zip(part, patches[10:12], strict=True))


def test_recoloured_scenes(recipe):
    recipe = dataclasses.replace(recipe, seed=1)
    one, *others = samples_of(recipe, recipe.scenes, recoloured=2)
    (alone,) = samples_of(recipe, recipe.scenes)
    assert torch.equal(one.reference, alone.reference) and len(others) == 2
    degradation = Degradation.gaussian(4)
    for other in others:
        assert not torch.allclose(other.reference, one.reference, atol=0.01)
        assert other.reference.min() >= 0 and other.reference.max() <= 1
        torch.testing.assert_close(other.lr_hsi, degradation(other.reference))
    again = samples_of(recipe, recipe.scenes, recoloured=2)
    assert all(torch.equal(a.hr_msi, b.hr_msi) for a, b in zip(again, [one, *others], strict=True))


def test_units_make_what_the_network_sees_and_says_alike():
    errors = torch.randn(2, 6, 16, 16) * torch.tensor([0.01, 0.02])[:, None, None, None]
    scenes = [(torch.rand(6, 16, 16), torch.rand(2, 16, 16))] * 2
    model = LSO(6, 2, 4, **TINY, prior="regression")
    known = [(p, m, p + error) for (p, m), error in zip(scenes, errors, strict=True)]
    model.fit_units(known)
    prior = scenes[0][0] - model.hsi_mean
    seen = (model.hsi_axes @ prior.flatten(1))[:, ::16]
    torch.testing.assert_close(seen @ seen.T / 16, torch.eye(6), atol=0.01, rtol=0)
    covariance = model.error_axes @ model.error_axes.T
    assert 0.01**2 < covariance.trace() / 6 < 0.02**2


def test_cofusion_on_103_and_4_bands(scenes, tmp_path):
    np.save(tmp_path / "srf.npy", np.repeat(np.eye(4), [26, 26, 26, 25], axis=1))
    recipe = read_recipe(
        "cofusion-pavia",
        scenes=["pavia@0:32,0:48"],
        validation=["pavia@32:48,0:48"],
        srf=str(tmp_path / "srf.npy"),
        options={"width": 8, "depths": [1, 1, 1]},
        patch=16,
        batch=1,
        epochs=1,
        steps=1,
    )
    assert train(recipe, tmp_path / "out")["psnr"] > 0
    model = FusionModel.load(tmp_path / "out" / "model.safetensors")
    assert (model.hsi_bands, model.msi_bands) == (103, 4)


def test_the_closed_form_is_computed_once_as_a_prior(recipe):
    recipe = dataclasses.replace(recipe, options={**TINY, "prior": "regression"})
    (sample,) = samples_of(recipe, recipe.scenes)
    assert sample.prior is not None and sample.prior.shape == sample.reference.shape


@pytest.mark.parametrize(
    ("scene", "message"),
    [("tg1", "no reference"), ("cube.npy@1,2", "expected NAME@r0:r1,c0:c1")],
)
def test_a_scene_that_does_not_do(recipe, cube, scene, message, request):
    if scene == "tg1":
        request.getfixturevalue("scenes")
    scene = scene.replace("cube.npy", cube)
    with pytest.raises(ValueError, match=message):
        samples_of(recipe, [scene])


def test_scenes_that_do_not_fit_together(recipe, cube, tmp_path):
    other = tmp_path / "other.npy"
    np.save(other, np.random.default_rng(0).random((5, 16, 16), np.float32))
    with pytest.raises(ValueError, match="the same bands in all"):
        train(dataclasses.replace(recipe, scenes=(cube, str(other))), tmp_path / "out")
    with pytest.raises(ValueError, match="patch: expected at most the scenes' 24 x 32, got 64"):
        train(dataclasses.replace(recipe, patch=64), tmp_path / "out")
    with pytest.raises(ValueError, match="scenes: expected names"):
        train(dataclasses.replace(recipe, scenes=()), tmp_path / "out")


# -- training --------------------------------------------------------------------------------------


def test_training_learns_and_writes_what_it_says(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, epochs=6, steps=10, learning_rate=1e-2, clip=1.0, ema=0.9)
    best = train(recipe, tmp_path)
    with (tmp_path / "log.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 6 and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert best["psnr"] == max(float(row["psnr"]) for row in rows) > float(rows[0]["psnr"])
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == 10
    assert isinstance(FusionModel.load(tmp_path / "model.safetensors"), LSO)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "last.safetensors",
        "log.csv",
        "model.safetensors",
        "recipe.json",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "schedule": "cosine"},
        {"model": "CoFusion", "options": {"width": 8, "depths": (1, 1, 1)}, "loss": "cofusion"},
        {
            "bfloat16": True,
            "accumulate": 2,
            "loss": "relative",
            "options": {**TINY, "prior": "regression"},
        },
    ],
    ids=["lso", "cofusion", "bfloat16"],
)
def test_resumed_to_the_bit(recipe, tmp_path, changes):
    recipe = dataclasses.replace(recipe, **changes)
    train(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    samples = samples_of(recipe, recipe.scenes)
    first = Training(model_for(recipe, samples), recipe, samples, samples)
    (tmp_path / "parts").mkdir()

    def keep(one, best):
        one.trained.save(tmp_path / "parts" / "model.safetensors")
        one.save(tmp_path / "parts" / "last.safetensors")
        if one.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        first.run(lambda *_: None, keep)
    torch.rand(7)  # nothing may depend on the state of the generator
    train(recipe, tmp_path / "parts", resume=True)
    one, other = (weights(tmp_path / name, "last.safetensors") for name in ("whole", "parts"))
    assert any(name.startswith("optimizer.") for name in one)
    assert_equal(one, other)


def test_accumulated_batches_are_one_large_batch(recipe, tmp_path):
    train(dataclasses.replace(recipe, batch=4, epochs=1), tmp_path / "one")
    train(dataclasses.replace(recipe, batch=1, accumulate=4, epochs=1), tmp_path / "four")
    one, four = (weights(tmp_path / name) for name in ("one", "four"))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_are_one_with_the_doubled_batch(recipe, cube, tmp_path):
    # AdamW divides by the gradient's size, so that rounding of tiny gradients shows in the weights.
    recipe = dataclasses.replace(recipe, batch=2, epochs=2)
    train(dataclasses.replace(recipe, batch=4), tmp_path / "one")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(dataclasses.asdict(recipe)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "fastfusion", "train"]
    command += ["--config", str(path), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / name, "last.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_process_that_is_gone_is_told(recipe, tmp_path, monkeypatch):
    """tests/reliability/test_faults.py has one that is killed."""
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(training.dist, name, lambda *_: None)
    monkeypatch.setattr(training.dist, "get_rank", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    gone = "[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    told = "another process .* ended.* --resume goes on"
    for error in (RuntimeError(gone), torch.distributed.DistBackendError("NCCL error")):
        with pytest.raises(ConnectionError, match=told), training._processes("cpu"):
            raise error
    with pytest.raises(RuntimeError, match="nan"), training._processes("cpu"):
        raise RuntimeError("the loss became nan")


def test_early_stopping_and_time_limit(recipe, tmp_path):
    worse = dataclasses.replace(recipe, learning_rate=0.0, patience=2, epochs=9)
    train(worse, tmp_path / "patience")
    assert len((tmp_path / "patience/log.csv").read_text().splitlines()) == 1 + 3
    best = train(recipe, tmp_path / "time", minutes=1e-6)
    assert best["step"] == 1


# -- what goes wrong -------------------------------------------------------------------------------


def test_nan_keeps_the_last_good_state(recipe, cube, tmp_path):
    train(dataclasses.replace(recipe, epochs=2), tmp_path)
    before = (tmp_path / "last.safetensors").read_bytes()
    (sample,) = samples = samples_of(recipe, recipe.scenes)
    failing = Training(model_for(recipe, samples), recipe, samples, [])
    sample.reference[0, :, :] = torch.nan
    with pytest.raises(RuntimeError, match=r"the loss became nan .* at step 0"):
        failing.run(lambda *_: None, lambda *_: None)
    assert all(value.isfinite().all() for value in failing.model.state_dict().values())
    diverging = dataclasses.replace(recipe, epochs=2, learning_rate=1e30)
    with pytest.raises(RuntimeError, match=r"learning_rate lower than 1e\+30"):
        train(diverging, tmp_path / "diverging")
    assert not (tmp_path / "diverging" / "last.safetensors").exists()
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_killed_in_the_middle(recipe, tmp_path, monkeypatch):
    """At a moment that nobody chose, files are whole; resumed, the result is the same."""
    # Equal bits are promised for as many threads, and for the same setting of determinism, which
    # the other process does not share with the tests.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _kill_in_the_middle(recipe, tmp_path)
    finally:
        torch.set_num_threads(threads)


def _kill_in_the_middle(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(dataclasses.asdict(recipe)))
    train(read_recipe(path), tmp_path / "whole")
    script = (
        "import sys, os, signal, fastfusion.training as t\n"
        "def die(*_):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write = t.write_checkpoint\n"
        "def twice(path, metadata, tensors, calls=[]):\n"
        "    calls.append(1)\n"
        "    import fastfusion.data.atomic as a\n"
        "    if len(calls) == 3:\n"
        "        a._move_into_place = die\n"
        "    write(path, metadata, tensors)\n"
        "t.write_checkpoint = twice\n"
        "t.train(t.read_recipe(sys.argv[1]), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "killed")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert (
        json.loads(read_checkpoint(tmp_path / "killed/last.safetensors")[0]["progress"])["epoch"]
        == 2
    )
    train(read_recipe(path), tmp_path / "killed", resume=True)
    for name in ("model.safetensors", "last.safetensors"):
        assert_equal(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))


def test_a_folder_that_is_taken(recipe, tmp_path):
    train(dataclasses.replace(recipe, epochs=1), tmp_path)
    with pytest.raises(ValueError, match="holds a training already"):
        train(recipe, tmp_path)
    with pytest.raises(ValueError, match=r"of another recipe: .*epochs 1 instead of 4"):
        train(recipe, tmp_path, resume=True)


def test_checkpoints_that_do_not_do(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, epochs=1)
    train(recipe, tmp_path)
    last, model = tmp_path / "last.safetensors", tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="is the state of a training; name its model"):
        FusionModel.load(last)
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated"):
        train(recipe, tmp_path, resume=True)
    last.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(ValueError, match="damaged or changed"):
        train(recipe, tmp_path, resume=True)
    last.write_bytes(model.read_bytes())
    with pytest.raises(ValueError, match="no state of a training"):
        train(recipe, tmp_path, resume=True)


# -- on the scene itself ---------------------------------------------------------------------------


def demo_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cube = demo_scene()
    srf = broad_bands(cube)
    reference = torch.from_numpy(cube.data[None, :, :128, :128])
    return *wald(reference, Degradation.gaussian(4), srf), srf


def test_trained_on_the_pair_itself():
    """The model that did best on the part kept from training is the result."""
    lr_hsi, hr_msi, srf = demo_pair()
    sensors = {"srf": srf, "psf": Degradation.gaussian(4)}
    short = dataclasses.replace(training.SELF_TRAINING, epochs=3, steps=2)
    judged, seen = iter([60.0, 80.0, 70.0]), []

    def validated(one: Training) -> dict[str, float]:
        (sample,) = one.validation
        assert sample.reference.shape == (31, 8, 32) and sample.hr_msi.shape[1:] == (8, 32)
        seen.append({name: value.clone() for name, value in one.model.state_dict().items()})
        return {"psnr": next(judged)}

    with (
        mock.patch.object(training, "SELF_TRAINING", short),
        mock.patch.object(Training, "_validated", validated),
    ):
        trained = train_on_pair("LSO", lr_hsi, hr_msi, **sensors, **TINY)
    assert trained.model is not None and trained.stopped is None
    assert 20 < trained.gain < 60
    # The closed form errs less at full resolution, so that a correction's unit is smaller there.
    state, best = trained.model.state_dict(), seen[1]
    ratio = state.pop("error_axes").norm() / best["error_axes"].norm()
    assert 0.2 < ratio < 0.8
    torch.testing.assert_close(trained.model.error_axes, best.pop("error_axes") * ratio)
    assert_equal(state, best)
    torch.testing.assert_close(trained.prior, regression(lr_hsi, hr_msi, **sensors))


def test_no_gain_no_model():
    lr_hsi, hr_msi, srf = demo_pair()
    idle = dataclasses.replace(training.SELF_TRAINING, epochs=1, steps=1, learning_rate=0.0)
    with mock.patch.object(training, "SELF_TRAINING", idle):
        trained = train_on_pair("LSO", lr_hsi, hr_msi, srf=srf, **TINY)
    assert trained.model is None and trained.gain == 0
    assert trained.stopped == "training gained nothing over the closed form"
