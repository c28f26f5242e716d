"""Training: recipes, patches drawn on the fly, and a loop that can be stopped and resumed anywhere.

All that is random in a step is drawn from the recipe's seed and the step's number, so that no state
of a generator has to be kept: a resumed training draws what an uninterrupted one would, and
processes that share the work draw the same batch and take their parts of it.

The folder of a training holds ``model.safetensors``, the best model so far (for
`fastfusion.fuse`), ``last.safetensors``, all that resuming needs, ``log.csv`` and ``recipe.json``.
Each is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastfusion import metrics, models
from fastfusion._optional import need
from fastfusion.data.atomic import atomic_path
from fastfusion.data.scenes import load_scene
from fastfusion.data.sensors import Degradation, apply_srf, read_srf, wald
from fastfusion.evaluation import Case, case_of, csv_table
from fastfusion.losses import CoFusionLoss, RelativeLoss
from fastfusion.models.base import ResidualModel, check_weights, read_checkpoint, write_checkpoint
from fastfusion.models.regression import RegressionModel, check_pair
from fastfusion.ops import checks

__all__ = [
    "RECIPES",
    "Recipe",
    "Sample",
    "SelfTrained",
    "Training",
    "read_recipe",
    "samples_of",
    "train",
    "train_on_pair",
]

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "l1": nn.L1Loss,
    "cofusion": CoFusionLoss,
    "relative": RelativeLoss,
}
SCHEDULES = ("step", "cosine")
#: Share of a training in which the learning rate of the cosine schedule rises.
RISE = 0.02


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What is trained on what, and how.

    Attributes:
        model: ``"LSO"`` or ``"CoFusion"``. options: of its constructor.
        scenes: to train on, names or files for `fastfusion.data.load_scene`; ``@r0:r1,c0:c1``
            after a name takes these rows and columns alone. validation: the same, never trained on.
        scale: see `fastfusion.models.FusionModel`.
        psf: blur and sampling that degrade the scenes: ``gaussian`` (LSO's: sigma half a
            low-resolution pixel), ``gaussian:SIGMA`` or ``block``.
        srf: file of the response that makes the MSI (see `fastfusion.data.read_srf`); by default
            the scene's own, or `fastfusion.evaluation.broad_bands`.
        loss: ``"l1"``, or ``"cofusion"`` or ``"relative"`` (of `fastfusion.losses`; relative to the
            errors of the closed form, with ``prior="regression"`` alone).
        epochs: at most. steps: of an epoch; 0 for as many as batches tile the scenes.
        patch: rows and columns of the patches, of the result. batch: patches of each process and
            step. accumulate: batches whose gradients are added up to one step.
        learning_rate, weight_decay: of AdamW. schedule: ``"step"`` (times ``decay`` after every
            ``decay_every`` epochs) or ``"cosine"`` (a short rise, then down to 0 when the steps or
            the time are over).
        flips: mirror and turn the patches at random. recoloured: copies of every scene with its
            spectra shifted, stretched and shaded at random, as other scenes to train on.
        clip: largest norm of the gradient, 0 for none. ema: decay of the moving average of the
            weights that is validated and kept, 0 for none. bfloat16: compute in it where it is
            safe (autocast).
        validate_every: epochs. patience: validations without a better one after which to stop, 0
            for never.
        seed: of all that is random.
    """

    model: str = "LSO"
    options: Mapping[str, Any] = field(default_factory=dict)
    scenes: Sequence[str] = ()
    validation: Sequence[str] = ()
    scale: int = 4
    psf: str = "gaussian"
    srf: str | None = None
    loss: str = "l1"
    epochs: int = 1000
    steps: int = 0
    patch: int = 64
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    schedule: str = "step"
    decay: float = 0.6
    decay_every: int = 300
    flips: bool = False
    recoloured: int = 0
    clip: float = 0.0
    ema: float = 0.0
    bfloat16: bool = False
    validate_every: int = 1
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.choice("model", self.model, ("LSO", "CoFusion"))
        checks.choice("loss", self.loss, tuple(LOSSES))
        checks.choice("schedule", self.schedule, SCHEDULES)
        for name in ("scenes", "validation"):
            names = getattr(self, name)
            if isinstance(names, str):
                raise TypeError(f"{name}: expected a list of names, got one text")
            if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
                raise TypeError(f"{name}: expected a list of names, got {names!r}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options: expected names and values, got {self.options!r}")
        at_least_1 = ("scale", "epochs", "patch", "batch", "accumulate", "decay_every")
        for name in (*at_least_1, "validate_every"):
            checks.integer(name, getattr(self, name), low=1)
        for name in ("steps", "recoloured", "patience", "seed"):
            checks.integer(name, getattr(self, name), low=0)
        for name in ("flips", "bfloat16"):
            checks.flag(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay", "decay", "clip", "ema"):
            if checks.number(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")
        if self.patch % self.scale:
            raise ValueError(
                f"patch must be a multiple of the scale {self.scale}, got {self.patch}"
            )
        if self.loss == "relative" and self.options.get("prior") != "regression":
            raise ValueError("loss: 'relative' is for options with prior 'regression'")
        if self.srf is not None:
            checks.path("srf", self.srf)
        checks.of_type("psf", self.psf, str, "the name of a blur")
        degradation_named(self.psf, self.scale)


def degradation_named(kind: str, scale: int) -> Degradation:
    """The blur and sampling that a recipe's ``psf`` names."""
    name, _, sigma = kind.partition(":")
    if name == "gaussian":
        with contextlib.suppress(ValueError):
            return Degradation.gaussian(scale, float(sigma) if sigma else None)
    if kind == "block":
        return Degradation.block(scale)
    raise ValueError(f"psf: expected gaussian, gaussian:SIGMA or block, got {kind!r}")


_CAVE_TRAINING = tuple(
    f"cave:{name}"
    for name in (
        "balloons",
        "chart_and_stuffed_toy",
        "cloth",
        "face",
        "fake_and_real_food",
        "feathers",
        "flowers",
        "glass_tiles",
    )
)
_CAVE_VALIDATION = ("cave:sponges", "cave:stuffed_toys")
_LSO_CAVE = Recipe(scenes=_CAVE_TRAINING, validation=_CAVE_VALIDATION)
# What is known of CoFusion's training: the habits of its author's other work.
_COFUSION = Recipe(
    model="CoFusion",
    loss="cofusion",
    epochs=300,
    patch=128,
    batch=8,
    learning_rate=4e-4,
    decay=0.1,
    decay_every=200,
)

#: The papers' recipes, and one that starts from the closed form; docs/training.md tells more.
RECIPES: dict[str, Recipe] = {
    "lso-cave": _LSO_CAVE,
    "cofusion-cave": dataclasses.replace(
        _COFUSION, scenes=_CAVE_TRAINING, validation=_CAVE_VALIDATION
    ),
    # A training that fits into the time that --minutes gives it.
    "lso-cave-regression": dataclasses.replace(
        _LSO_CAVE,
        options={"prior": "regression", "width": 32, "guide_width": 48, "guide_blocks": 3},
        loss="relative",
        steps=250,
        batch=8,
        learning_rate=1e-3,
        schedule="cosine",
        flips=True,
        recoloured=2,
        clip=1.0,
        ema=0.998,
    ),
    # 103 and 4 bands, as Pavia University; its scenes must be named.
    "cofusion-pavia": _COFUSION,
}


def read_recipe(name: str | os.PathLike[str], **changes: Any) -> Recipe:
    """A recipe by its name in `RECIPES`, or from a JSON file with the fields of `Recipe`.

    Args:
        name: of the recipe or the file.
        changes: fields that shall be others.

    Raises:
        TypeError, ValueError: a field is unknown or not as `Recipe` says; no recipe of that name.
        OSError: the file cannot be read.

    >>> read_recipe("lso-cave", batch=4).batch
    4
    """
    name = str(checks.path("name", name))
    if name in RECIPES:
        fields = _fields(RECIPES[name])
    elif not Path(name).suffix:
        raise ValueError(
            f"config: expected a .json file or one of {', '.join(RECIPES)}, got {name}"
        )
    else:
        try:
            fields = json.loads(Path(name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{name}: expected an object with a recipe's fields")
    if name not in RECIPES:
        with _told_of(name):
            return _recipe(fields, changes)
    return _recipe(fields, changes)


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Errors in the fields name the file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _recipe(fields: dict[str, Any], changes: Mapping[str, Any]) -> Recipe:
    fields = {**fields, **changes}
    known = [known.name for known in dataclasses.fields(Recipe)]
    for unknown in fields.keys() - set(known):
        raise ValueError(f"a recipe has no {unknown!r}; it has {', '.join(known)}")
    return Recipe(**fields)


def _fields(recipe: Recipe) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


# ------------------------------------------------------------------------------------------------
# Scenes and patches
# ------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A scene as it is trained on: ``(G, h, w)``, ``(g, H, W)``, and ``(G, H, W)`` twice.

    With a prior, ``error (G, 1, 1)`` is the root mean square of its error in each band of the whole
    scene, and whole scenes have the closed form that it is of.
    """

    lr_hsi: Tensor
    hr_msi: Tensor
    reference: Tensor
    prior: Tensor | None = None
    error: Tensor | None = None
    closed_form: RegressionModel | None = None


def samples_of(recipe: Recipe, names: Sequence[str], recoloured: int = 0) -> list[Sample]:
    """Read scenes once, degrade them, and compute their priors where the model takes the closed
    form; after each, so many recoloured ones.

    Raises:
        ValueError: a scene has no reference or is not known. OSError: it cannot be read.
    """
    cases = []
    generator = torch.Generator().manual_seed(_seed(recipe.seed))
    for name in names:
        case = _case(recipe, name)
        cases += [case, *(_recoloured(case, generator) for _ in range(recoloured))]
    samples = []
    for case in cases:
        assert case.reference is not None
        prior = error = fitted = None
        if recipe.options.get("prior") == "regression":
            pair = case.lr_hsi, case.hr_msi
            fitted = RegressionModel.fit(*pair, srf=case.srf, psf=case.degradation)
            prior = fitted.apply(*pair).clamp_(0, 1)
            error = error_of(prior, case.reference)
        samples.append(Sample(case.lr_hsi, case.hr_msi, case.reference, prior, error, fitted))
    return samples


def error_of(prior: Tensor, reference: Tensor) -> Tensor:
    """Root mean square in each band; at least 80 dB below 1, where there is nothing to gain."""
    return (reference - prior).square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-4)


def _case(recipe: Recipe, name: str) -> Case:
    found = re.fullmatch(r"(.+)@(\d+):(\d+),(\d+):(\d+)", name)
    if "@" in name and not found:
        raise ValueError(f"{name}: expected NAME@r0:r1,c0:c1")
    scene = load_scene(found[1] if found else name)
    if scene.reference is None:
        raise ValueError(f"{name} has no reference to train on")
    if found:
        top, bottom, left, right = map(int, found.groups()[1:])
        for kind in ("reference", "hr_msi"):
            cube = getattr(scene, kind)
            if cube is not None:
                part = dataclasses.replace(cube, data=cube.data[:, top:bottom, left:right])
                scene = dataclasses.replace(scene, **{kind: part})
    srf = None
    if recipe.srf is not None:
        assert scene.reference is not None
        srf = read_srf(recipe.srf, scene.reference.wavelengths).float()
    degradation = degradation_named(recipe.psf, recipe.scale)
    return case_of(scene, recipe.scale, srf=srf, degradation=degradation)


def _recoloured(case: Case, generator: torch.Generator) -> Case:
    """The same scene with other colours: its spectra shifted and stretched along the wavelengths,
    or turned about, and multiplied by a smooth curve.

    A network trained on few scenes learns which colours go with which spectra in these, and errs
    elsewhere. Where colours are made up, only what holds for all of them helps.
    """
    if case.srf is None or case.reference is None or case.degradation is None:
        raise ValueError(f"recoloured: {case.name} has an MSI that was acquired; expected 0")
    bands = len(case.reference)
    stretch, shift, turned = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    last = bands - 1
    stretch = 0.75 + 0.25 * stretch
    position = last * ((1 - stretch) * shift + stretch * torch.linspace(0, 1, bands).double())
    if turned < 0.35:
        position = position.flip(0)
    bends = 0.4 * torch.randn(1, 1, 6, generator=generator, dtype=torch.float64)
    shading = F.interpolate(bends, bands, mode="linear", align_corners=True)[0, 0].exp()
    mixing = (1 - (position[:, None] - torch.arange(bands)).abs()).clamp_min(0) * shading[:, None]
    reference = apply_srf(case.reference, mixing)
    reference /= reference.max().clamp_min(1)
    lr_hsi, hr_msi = wald(reference, case.degradation, case.srf)
    return dataclasses.replace(case, lr_hsi=lr_hsi, hr_msi=hr_msi, reference=reference)


def draw(
    samples: Sequence[Sample], recipe: Recipe, step: int, count: int, part: slice
) -> Iterator[Sample]:
    """The patches ``part`` of the ``count`` that a step takes, on the grid of the HSI's pixels.

    A patch is one of the whole degraded scene: beyond its edges the blur has seen its neighbours.
    """
    generator = torch.Generator().manual_seed(_seed(recipe.seed, step))
    # Scenes by their area, so that every pixel is drawn alike.
    areas = torch.tensor([float(sample.lr_hsi[0].numel()) for sample in samples])
    scenes = torch.multinomial(areas, count, replacement=True, generator=generator)
    where = torch.rand(count, 2, generator=generator)
    flips = torch.rand(count, 3, generator=generator) < (0.5 if recipe.flips else 0)
    for index in range(count)[part]:
        sample = samples[int(scenes[index])]
        side = recipe.patch // recipe.scale
        rows, columns = sample.lr_hsi.shape[1:]
        turns = flips[index].tolist()
        top = int(where[index, 0] * (rows - side + 1))
        left = int(where[index, 1] * (columns - side + 1))
        scale = recipe.scale
        lr_hsi, hr_msi, reference, prior = (
            None if image is None else _turned(_cut(image, top, left, side, finer), turns)
            for image, finer in zip(sample[:4], (1, scale, scale, scale), strict=True)
        )
        assert lr_hsi is not None and hr_msi is not None and reference is not None
        yield Sample(lr_hsi, hr_msi, reference, prior, sample.error)


def _cut(image: Tensor, top: int, left: int, side: int, times: int) -> Tensor:
    rows = slice(times * top, times * (top + side))
    columns = slice(times * left, times * (left + side))
    return image[:, rows, columns]


def _turned(image: Tensor, turns: Sequence[bool]) -> Tensor:
    down, across, transposed = turns
    image = image.flip([dim for dim, turn in ((1, down), (2, across)) if turn])
    return image.transpose(1, 2) if transposed else image


def _seed(*numbers: int) -> int:
    """One seed of several numbers, none of which shows in the other's stream."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def stacked(patches: Sequence[Sample], device: torch.device) -> Sample:
    """A batch: each with a first dimension more, but for the closed form."""

    def stack(images: Sequence[Tensor | None]) -> Any:
        there = [image for image in images if image is not None]
        return torch.stack(there).to(device) if there else None

    return Sample(*(stack(images) for images in list(zip(*patches, strict=True))[:5]))


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    minutes: float | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    tensorboard: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Train by a recipe; under ``torchrun``, in all its processes together.

    Args:
        recipe: what and how; see `RECIPES` and `read_recipe`.
        folder: for the model, the state, the log and the recipe; made where it is not there.
        minutes: time limit, of all sessions of this training together.
        resume: go on from ``last.safetensors`` in the folder, which the same recipe wrote; start
            where there is none yet. On a CPU with as many threads the result is, bit by bit, that
            of a training that was never stopped (without ``minutes``).
        device: ``"cpu"``, ``"cuda"``; under ``torchrun`` each process takes its own.
        tensorboard: log for TensorBoard too.
        progress: show a bar with losses, the validation's PSNR and the time left.

    Returns:
        the best row of the log: ``epoch``, ``step``, ``seconds``, ``learning_rate``, ``loss``,
        and with validation scenes ``psnr``, ``sam``, ``ergas``, their mean over the scenes.

    Raises:
        TypeError, ValueError: the recipe's scenes do not fit together or the model; the folder
            holds another training, or a damaged one.
        RuntimeError: the gradient is not finite any more; the folder keeps the last good state.
        ConnectionError: another process of the training ended; so it does here.
        OSError: a file cannot be read or written.
        ImportError: safetensors, tqdm, torchmetrics or tensorboard is not installed.
    """
    checks.of_type("recipe", recipe, Recipe, "a Recipe")
    if not recipe.scenes:
        raise ValueError("scenes: expected names of scenes to train on, got none")
    if minutes is not None:
        checks.positive("minutes", minutes)
    for flag, value in (("resume", resume), ("tensorboard", tensorboard), ("progress", progress)):
        checks.flag(flag, value)
    checks.placed(device, None)
    folder = checks.path("folder", folder)
    need("safetensors", extra="train", purpose="training")
    need("torchmetrics", extra="train", purpose="training")
    with _processes(device) as (rank, count, place):
        folder.mkdir(parents=True, exist_ok=True)
        last = folder / "last.safetensors"
        if last.exists() and not resume:
            raise ValueError(f"{folder} holds a training already: resume it or name another folder")
        samples = samples_of(recipe, recipe.scenes, recipe.recoloured)
        training = Training(
            model_for(recipe, samples).to(place),
            recipe,
            samples,
            samples_of(recipe, recipe.validation),
            minutes=minutes,
            rank=rank,
            processes=count,
        )
        if last.exists():
            training.load(last)
        with _Log(folder, recipe, rank == 0, tensorboard, progress) as log:
            training.run(log.show, log.keep)
        return training.best


def model_for(recipe: Recipe, samples: Sequence[Sample]) -> ResidualModel:
    """The recipe's model, drawn from its seed, for the samples' bands.

    Raises:
        TypeError, ValueError: the samples differ in their bands or are smaller than a patch; an
            option is not the model's.
    """
    bands = {(len(sample.lr_hsi), len(sample.hr_msi)) for sample in samples}
    if len(bands) != 1:
        raise ValueError(f"scenes: expected the same bands in all, got {sorted(bands)}")
    for sample in samples:
        rows, columns = sample.hr_msi.shape[1:]
        if min(rows, columns) < recipe.patch:
            raise ValueError(
                f"patch: expected at most the scenes' {rows} x {columns}, got {recipe.patch}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = getattr(models, recipe.model)(*bands.pop(), recipe.scale, **recipe.options)
    known = [(one.prior, one.hr_msi, one.reference) for one in samples if one.prior is not None]
    if known:
        model.fit_units(known)
    return model


class Training:
    """A training that goes on: model, optimiser, moving average, and how far it is.

    Args:
        model: to train, in place; on the device to train on.
        recipe: see `Recipe`. samples, validation: see `samples_of`.
        minutes: time limit.
        rank, processes: which process this is, of how many; torch's process group is there where
            they are several.
    """

    def __init__(
        self,
        model: ResidualModel,
        recipe: Recipe,
        samples: Sequence[Sample],
        validation: Sequence[Sample],
        *,
        minutes: float | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.samples, self.validation = samples, validation
        self.limit = math.inf if minutes is None else 60 * minutes
        self.rank, self.processes = rank, processes
        self.device = next(model.parameters()).device
        self.loss = LOSSES[recipe.loss]()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.average = (
            AveragedModel(model, avg_fn=partial(_averaged, recipe.ema)) if recipe.ema else None
        )
        self.parallel: nn.Module = DistributedDataParallel(model) if processes > 1 else model
        self.count = recipe.batch * recipe.accumulate * processes  # patches of a step
        pixels = sum(sample.reference[0].numel() for sample in samples)
        self.steps = recipe.steps or max(1, round(pixels / (self.count * recipe.patch**2)))
        self.epoch, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []

    @property
    def best(self) -> dict[str, Any]:
        """The row of the history with the highest PSNR, or the last one without validation."""
        return max(self.history, key=lambda row: row.get("psnr", row["epoch"]), default={})

    @property
    def trained(self) -> ResidualModel:
        """What is validated and kept: the moving average where there is one."""
        if self.average is None:
            return self.model
        assert isinstance(self.average.module, ResidualModel)
        return self.average.module

    # -- running -------------------------------------------------------------------------------

    def run(
        self,
        show: Callable[[float, dict[str, float]], None],
        keep: Callable[[Training, bool], None],
    ) -> None:
        """Train until an end is reached.

        Args:
            show: called at each step with the share of the training that is done, and figures.
            keep: called when there is a new row in the history, with whether it is the best.
        """
        begun = time.monotonic() - self.seconds
        while not self._ends():
            losses = []
            for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
                losses.append(self._step(step))
                self.seconds = self._agreed(time.monotonic() - begun)
                show(self.done(step + 1), {"loss": sum(losses) / len(losses)})
                if self.seconds >= self.limit:
                    break
            self.epoch += 1
            if self.epoch % self.recipe.validate_every and not self._ends():
                continue
            row = {
                "epoch": self.epoch,
                "step": step + 1,
                "seconds": round(self.seconds, 1),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "loss": sum(losses) / len(losses),
                **self._validated(),
            }
            self.history.append(row)
            keep(self, self.best is row)

    def _ends(self) -> bool:
        since_best = len(self.history) - 1 - self.history.index(self.best) if self.history else 0
        return (
            self.epoch >= self.recipe.epochs
            or self.seconds >= self.limit
            or 0 < self.recipe.patience <= since_best
        )

    def done(self, step: int) -> float:
        """Share of the training that is done before a step."""
        return min(1.0, max(step / (self.steps * self.recipe.epochs), self.seconds / self.limit))

    def _learning_rate(self, step: int) -> float:
        recipe = self.recipe
        if recipe.schedule == "step":
            return recipe.learning_rate * recipe.decay ** (self.epoch // recipe.decay_every)
        done = self.done(step)
        return recipe.learning_rate * min(1, done / RISE, (1 + math.cos(math.pi * done)) / 2)

    def _step(self, step: int) -> float:
        """One step of the optimiser; its mean loss."""
        recipe, total = self.recipe, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(_seed(recipe.seed, step, self.rank))  # of the model's dropout
        self.parallel.train()
        for micro in range(recipe.accumulate):
            start = (self.rank * recipe.accumulate + micro) * recipe.batch
            part = slice(start, start + recipe.batch)
            batch = stacked([*draw(self.samples, recipe, step, self.count, part)], self.device)
            last = micro == recipe.accumulate - 1
            with contextlib.ExitStack() as stack:
                if not last and isinstance(self.parallel, DistributedDataParallel):
                    stack.enter_context(self.parallel.no_sync())
                with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bfloat16):
                    fused = self.parallel(batch.lr_hsi, batch.hr_msi, batch.prior)
                loss = self._loss(fused.float(), batch) / recipe.accumulate
                loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip or math.inf)
        total = self._mean(total)
        # Both are the same in all processes, so that all of them stop. The gradient does not tell
        # by itself: that of an absolute value is finite at NaN.
        if not (math.isfinite(total) and torch.isfinite(norm)):
            raise RuntimeError(
                f"the loss became {total:g} and its gradient {norm.item():g} at step {step}; the "
                f"last good state is kept. Try a learning_rate lower than "
                f"{recipe.learning_rate:g}, or clip=1"
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return total

    def _loss(self, fused: Tensor, batch: Sample) -> Tensor:
        if self.recipe.loss == "relative":
            return self.loss(fused, batch.reference, batch.error)
        return self.loss(fused, batch.reference)

    @torch.no_grad()
    def _validated(self) -> dict[str, float]:
        """Means over the validation scenes, whole, as `fastfusion.fuse` gives them."""
        if not self.validation:
            return {}
        model = self.trained.eval()
        figures = []
        for sample in self.validation:
            one = stacked([sample], self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
                fused = model(one.lr_hsi, one.hr_msi, one.prior)
            fused = fused.float()
            if sample.closed_form is not None:  # as `fuse` does
                fused = sample.closed_form.refine(fused[0], one.lr_hsi[0], one.hr_msi[0])[None]
            pair = fused.clamp(0, 1), one.reference
            ergas = metrics.ergas(*pair, ratio=self.recipe.scale)
            figures.append(torch.stack([metrics.psnr(*pair), metrics.sam(*pair), ergas]))
        mean = torch.stack(figures).mean(0)
        # Rounding may differ from process to process; what ends a training must not.
        if self.processes > 1:
            dist.broadcast(mean, 0)
        return dict(zip(("psnr", "sam", "ergas"), mean.tolist(), strict=True))

    def _mean(self, value: float) -> float:
        """Over the processes."""
        if self.processes == 1:
            return value
        mean = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(mean)
        return mean.item() / self.processes

    def _agreed(self, seconds: float) -> float:
        """The time of the first process, where a time limit makes it matter."""
        if self.processes == 1 or math.isinf(self.limit):
            return seconds
        time_of_first = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.broadcast(time_of_first, 0)
        return time_of_first.item()

    # -- state ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that resuming needs to one safetensors file, whole or not at all."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"ema.{name}": v for name, v in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        progress = {"epoch": self.epoch, "seconds": self.seconds, "history": self.history}
        metadata = {
            "model": type(self.model).__name__,
            "config": json.dumps(self.model.config),
            "recipe": json.dumps(_fields(self.recipe)),
            "progress": json.dumps(progress),
        }
        write_checkpoint(path, metadata, tensors)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another recipe. OSError: it cannot be read.
        """
        metadata, tensors = read_checkpoint(Path(path))
        if "recipe" not in metadata or "progress" not in metadata:
            raise ValueError(f"{path} is no state of a training, but a model")
        theirs, ours = json.loads(metadata["recipe"]), _fields(self.recipe)
        if differing := [name for name in ours if ours[name] != theirs.get(name)]:
            said = ", ".join(f"{n} {theirs.get(n)!r} instead of {ours[n]!r}" for n in differing)
            raise ValueError(f"{path} is of another recipe: {said}")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        check_weights(self.model, parts["model"], f"{path}")
        self.model.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.load_state_dict(parts["ema"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, rest = name.partition(".")
            state.setdefault(int(index), {})[rest] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        progress = json.loads(metadata["progress"])
        self.epoch, self.seconds = progress["epoch"], progress["seconds"]
        self.history = progress["history"]


def _averaged(decay: float, average: Tensor, weights: Tensor, count: Tensor | int) -> Tensor:
    """The moving average after one more step; it forgets the first steps sooner."""
    return average.lerp(weights, 1 - min(decay, (1 + int(count)) / (10 + int(count))))


class _Log:
    """What a training shows and writes while it runs; nothing where it is not the first process."""

    def __init__(
        self, folder: Path, recipe: Recipe, first: bool, tensorboard: bool, progress: bool
    ) -> None:
        self.folder, self.recipe, self.first = folder, recipe, first
        self.tensorboard, self.progress = first and tensorboard, first and progress
        self.board: Any = None

    def __enter__(self) -> _Log:
        self.stack = contextlib.ExitStack()
        self.show = self.stack.enter_context(_bar(self.recipe.model, self.progress))
        if self.tensorboard:
            board = need("torch.utils.tensorboard", extra="train", purpose="--tensorboard")
            self.board = board.SummaryWriter(self.folder / "tensorboard")
            self.stack.callback(self.board.close)
        if self.first:
            text = json.dumps(_fields(self.recipe), indent=2, ensure_ascii=False)
            _write_text(self.folder / "recipe.json", text + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def keep(self, training: Training, best: bool) -> None:
        if not self.first:
            return
        # The state last: what it says was written is there, and what comes after it comes again.
        if best:
            training.trained.save(self.folder / "model.safetensors")
        training.save(self.folder / "last.safetensors")
        _write_text(self.folder / "log.csv", csv_table(training.history))
        row = training.history[-1]
        self.show(training.done(row["step"]), {k: row[k] for k in ("psnr",) if k in row})
        if self.board is not None:
            for name in row.keys() - {"epoch", "step", "seconds"}:
                self.board.add_scalar(name, row[name], row["step"])


@contextlib.contextmanager
def _bar(name: str, wanted: bool) -> Iterator[Callable[[float, Mapping[str, float]], None]]:
    """A bar with the share that is done, the time left and the latest figures."""
    if not wanted:
        yield lambda done, figures: None
        return
    tqdm = need("tqdm.auto", extra="train", purpose="a progress bar").tqdm
    form = "{desc} {percentage:3.1f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    latest: dict[str, str] = {}
    with tqdm(total=1.0, desc=name, bar_format=form) as bar:

        def show(done: float, figures: Mapping[str, float]) -> None:
            latest.update({name: f"{value:.4g}" for name, value in figures.items()})
            bar.set_postfix(latest, refresh=False)
            bar.update(done - bar.n)

        yield show


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _processes(device: str | torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device, with torch's process group where there are several."""
    place, count = torch.device(device), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield 0, 1, place
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield dist.get_rank(), count, place
    except RuntimeError as error:
        # Gloo has no type of error of its own; its messages name its source files.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(
                "another process of this training ended, or cannot be reached any more; the last "
                f"good state is kept, and --resume goes on from it ({backend}: {error})"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# On the scene itself
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelfTrained:
    """What `train_on_pair` gives: a model for the pair, and what it gained.

    Attributes:
        model: in evaluation mode; None where training gained nothing over the prior.
        closed_form: of the pair.
        prior: of the pair at full resolution, ``(1, G, H, W)``.
        gain: in dB over the prior, on a part of the HSI that was kept from training.
        stopped: why there is no model, or None.
    """

    model: ResidualModel | None
    closed_form: RegressionModel
    prior: Tensor
    gain: float
    stopped: str | None = None


#: How a network is trained on one pair: it must fit into minutes.
SELF_TRAINING = Recipe(
    options={"prior": "regression"},
    epochs=200,
    steps=25,
    patch=32,
    batch=8,
    loss="relative",
    learning_rate=1e-3,
    schedule="cosine",
    clip=1.0,
    patience=20,
)
#: Options of the models for it, where the user names no others.
SMALL: dict[str, dict[str, Any]] = {
    "LSO": {"width": 32, "guide_width": 32, "guide_blocks": 2},
    "CoFusion": {"width": 32, "depths": (1, 1, 1)},
}
#: Share of the HSI, at one end of its longer side, that such a training is judged by.
HELD_OUT = 0.25


def train_on_pair(
    kind: str,
    lr_hsi: Tensor,
    hr_msi: Tensor,
    *,
    srf: Tensor | None = None,
    psf: Tensor | Degradation | None = None,
    minutes: float = 5.0,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> SelfTrained:
    """Train a network on the pair that it shall fuse, without any reference.

    The pair is degraded once more by its own sensors, and the network learns to correct the closed
    form (`fastfusion.models.regression`) of that pair towards the HSI. It starts at the closed form
    and is judged on a quarter of the HSI that it is not trained on; where it gains nothing there,
    there is no model, and the closed form is the result.

    Args:
        kind: ``"LSO"`` or ``"CoFusion"``.
        lr_hsi: ``(1, G, h, w)``, in [0, 1]. hr_msi: ``(1, g, H, W)``.
        srf, psf: as in `regression`; estimated where None.
        minutes: time limit. seed: of all that is random.
        progress: show a bar with the gain and the time left.
        options: of the model; small ones by default.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the loss is not finite any more.
    """
    checks.choice("kind", kind, tuple(SMALL))
    checks.positive("minutes", minutes)
    checks.integer("seed", seed, low=0)
    checks.flag("progress", progress)
    for name, image in (("lr_hsi", lr_hsi), ("hr_msi", hr_msi)):
        checks.dense(name, image, dims=4)
        if image.shape[0] != 1:
            raise ValueError(f"{name}: expected a batch of one image, got {tuple(image.shape)}")
    check_pair(lr_hsi, hr_msi)
    scale = hr_msi.shape[-1] // lr_hsi.shape[-1]
    options = {**SMALL[kind], **options}
    with torch.device("meta"):  # wrong options cost no time
        getattr(models, kind)(
            lr_hsi.shape[1], hr_msi.shape[1], scale, prior="regression", **options
        )
    fitted = RegressionModel.fit(lr_hsi[0], hr_msi[0], srf=srf, psf=psf)
    prior = fitted.apply(lr_hsi[0], hr_msi[0]).clamp_(0, 1)[None]

    rows, columns = (side // scale for side in lr_hsi.shape[-2:])  # of the pair degraded once more
    cut = round((1 - HELD_OUT) * max(rows, columns))
    patch = min(SELF_TRAINING.patch // scale, cut, rows, columns)
    if patch * scale < 8 or cut == max(rows, columns):
        size = " x ".join(map(str, lr_hsi.shape[-2:]))
        return SelfTrained(
            None, fitted, prior, 0.0, f"an HSI of {size} pixels is too small to learn from"
        )
    target = lr_hsi[0, :, : rows * scale, : columns * scale]
    low_msi = fitted.degradation(hr_msi)[0, :, : rows * scale, : columns * scale]
    low_hsi = fitted.degradation(target)
    response = fitted.srf.to(lr_hsi)
    coarse = RegressionModel.fit(low_hsi, low_msi, srf=response, psf=fitted.degradation)
    low_prior = coarse.apply(low_hsi, low_msi).clamp_(0, 1)
    pair = Sample(low_hsi, low_msi, target, low_prior, error_of(low_prior, target))
    training, judging = _divided(pair, scale, cut, dim=1 if rows >= columns else 2)

    recipe = dataclasses.replace(
        SELF_TRAINING,
        model=kind,
        scale=scale,
        patch=patch * scale,
        seed=seed,
        options={**options, **SELF_TRAINING.options},
    )
    model = model_for(recipe, [training]).to(lr_hsi.device)
    trainer = Training(model, recipe, [training], [judging], minutes=minutes)
    assert judging.prior is not None
    start = metrics.psnr(judging.prior[None], judging.reference[None]).item()
    best: ResidualModel | None = None
    best_gain = 0.0
    with _bar(kind, progress) as show:

        def keep(trainer: Training, is_best: bool) -> None:
            nonlocal best, best_gain
            gain = trainer.history[-1]["psnr"] - start
            show(trainer.done(trainer.history[-1]["step"]), {"gain": max(gain, best_gain)})
            if gain > best_gain:
                best, best_gain = copy.deepcopy(trainer.trained), gain

        trainer.run(show, keep)
    if best is None:
        return SelfTrained(None, fitted, prior, 0.0, "training gained nothing over the closed form")
    # It says its correction in units of the closed form's errors, which may be smaller here.
    here, there = _missing(fitted, lr_hsi[0], hr_msi[0]), _missing(coarse, low_hsi, low_msi)
    if here < there:
        best.error_axes.mul_(here / there)
    return SelfTrained(best.eval(), fitted, prior, best_gain)


def _missing(closed_form: RegressionModel, lr_hsi: Tensor, hr_msi: Tensor) -> float:
    """What the maps leave of the HSI, root mean square: its errors can be seen there alone."""
    before_refining = dataclasses.replace(closed_form, iterations=0).apply(lr_hsi, hr_msi)
    return (lr_hsi - closed_form.degradation(before_refining)).square().mean().sqrt().item()


def _divided(pair: Sample, scale: int, cut: int, dim: int) -> tuple[Sample, Sample]:
    """The part before ``cut`` pixels of the coarse image along a side, and the part after it."""
    parts: list[list[Tensor]] = [[], []]
    for image, finer in zip(pair[:4], (1, scale, scale, scale), strict=True):
        assert image is not None
        length = image.shape[dim]
        parts[0].append(image.narrow(dim, 0, finer * cut))
        parts[1].append(image.narrow(dim, finer * cut, length - finer * cut))
    return Sample._make([*parts[0], pair.error, None]), Sample._make([*parts[1], pair.error, None])
