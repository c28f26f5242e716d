"""FSRVL: unsupervised fusion by unmixing, fitted to the pair that it fuses.

The fused image is ``Z = A E``: abundances that a network with filters in the Fourier domain draws
from the MSI, times endmembers that are learnt from the HSI (anonymous authors, "Unsupervised
Multi-Sensor Spectral Image Fusion via Frequency-Spatial Reciprocal-View Learning").

What is added to the paper, each with an option that leaves it out: the regression as a skip
connection (``prior``), the step that brings the result back to both sensors (``consistency``), the
canvas of the filters (``extend``), and training on the HSI's grid, where a step costs ``scale**2``
times less (``steps`` and ``full_steps`` of `FSRVL.fit`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion._optional import need
from fastfusion.data.sensors import BOUNDARIES, Degradation, apply_srf
from fastfusion.losses import FSRVLLoss
from fastfusion.models.base import FusionModel
from fastfusion.models.regression import RegressionModel, consistent
from fastfusion.nn.fsrvl import (
    FeatureSynchronization,
    FrequencyRecalibration,
    InitialRepresentation,
    resize,
)
from fastfusion.ops import checks

__all__ = ["FSRVL", "FitReport"]

ABUNDANCES = ("free", "clamp", "softmax")
PRIORS = ("regression", "none")
#: Share of the HSI's pixels, in square blocks, that is kept from training to judge it by.
HELD_OUT = 0.1
#: Steps between two such judgements.
JUDGE_EVERY = 25
#: Steps of the learning rate's rise at the start of training.
RISE = 10

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FitReport:
    """What happened in `FSRVL.fit`.

    ``history`` holds a row for each judgement: ``step``, ``grid`` (``"low"`` or ``"full"``),
    ``seconds`` since the start, ``loss`` (equation 16) and ``held_out``, the mean
    absolute error on the HSI's pixels that were kept from training. ``stopped`` says why it ended;
    ``best`` is the step whose weights the model now has.
    """

    steps: int
    seconds: float
    stopped: str
    best: int
    history: list[dict[str, Any]] = field(repr=False)


class FSRVL(FusionModel):
    """FSRVL for one pair; make it, `fit` it to the pair, then call it with the pair.

    Args:
        hsi_bands: ``G``. msi_bands: ``g``. scale: of the pair.
        features: ``d``, channels of the representation.
        endmembers: ``e``.
        kernel_size: ``m`` of the filters in the Fourier domain.
        abundances: ``"softmax"`` (not negative, sum to 1), ``"clamp"`` (to [0, 1]) or ``"free"``.
        synchronization: without it the streams share no mixing of channels (the paper's FSRVL-S).
        recalibration: without it the spectra are not filtered (FSRVL-R). Without both nothing is
            transformed at all (Initial).
        prior: ``"regression"`` adds the regression's one linear map of the MSI to ``A E``, which
            then starts at 0; ``"none"`` is the paper's.
        consistency: in evaluation, move the result as little as needed to agree with both images.
        extend: transform on a canvas of twice the image's height and width, so that the filters do
            not tie opposite ends of the image together.
        psf_size: of the learnable PSF, an int or a pair; by default ``scale``. `fit` sets it to the
            size of the PSF that is given or estimated.

    Raises:
        TypeError, ValueError: where an argument is not as said above.

    >>> model = FSRVL(31, 3, 4, features=8, endmembers=5)
    >>> model(torch.rand(1, 31, 4, 4), torch.rand(1, 3, 16, 16)).shape
    torch.Size([1, 31, 16, 16])
    """

    psf_logits: nn.Parameter
    srf: Tensor
    skip: Tensor
    back: Tensor
    offset: Tensor
    boundary: Tensor

    def __init__(
        self,
        hsi_bands: int,
        msi_bands: int,
        scale: int,
        *,
        features: int = 32,
        endmembers: int = 12,
        kernel_size: int = 7,
        abundances: str = "free",
        synchronization: bool = True,
        recalibration: bool = True,
        prior: str = "regression",
        consistency: bool = True,
        extend: bool = True,
        psf_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(hsi_bands, msi_bands, scale)
        checks.integer("features", features, low=1)
        checks.integer("endmembers", endmembers, low=1)
        checks.integer("kernel_size", kernel_size, low=1)
        checks.choice("abundances", abundances, ABUNDANCES)
        checks.choice("prior", prior, PRIORS)
        for name, value in (
            ("synchronization", synchronization),
            ("recalibration", recalibration),
            ("consistency", consistency),
            ("extend", extend),
        ):
            checks.flag(name, value)
        self.features, self.endmembers, self.kernel_size = features, endmembers, kernel_size
        self.abundances, self.prior = abundances, prior
        checks.pair("psf_size", scale if psf_size is None else psf_size, low=1)
        self.synchronization, self.recalibration = synchronization, recalibration
        self.consistency, self.extend = consistency, extend
        self.psf_size: int | Sequence[int] = scale if psf_size is None else psf_size

        self.representation = InitialRepresentation(hsi_bands, msi_bands, features)
        self.synchronize = FeatureSynchronization(features, mix=synchronization)
        self.hr_recalibrate, self.lr_recalibrate = (
            FrequencyRecalibration(
                features, endmembers, kernel_size, filter=recalibration, extend=extend
            )
            for _ in range(2)
        )
        self.spectra = nn.Parameter(torch.rand(endmembers, hsi_bands))  # E
        self.msi_spectra = nn.Parameter(torch.rand(endmembers, msi_bands))  # E^
        rows, columns = checks.pair("psf_size", self.psf_size, low=1)
        # The softmax of these is the PSF: not negative, and sums to 1.
        self.psf_logits = nn.Parameter(torch.zeros(rows, columns))
        self.register_buffer("srf", torch.full((msi_bands, hsi_bands), 1 / hsi_bands))
        self.register_buffer("skip", torch.zeros(hsi_bands, 1 + msi_bands))
        self.register_buffer("back", torch.ones(hsi_bands, msi_bands) / msi_bands)
        self.register_buffer("offset", torch.tensor(scale // 2))
        self.register_buffer("boundary", torch.tensor(list(BOUNDARIES).index("circular")))

    # -- the network ---------------------------------------------------------------------------

    @property
    def psf(self) -> Tensor:
        """The PSF, ``(kh, kw)``: not negative, sums to 1."""
        return self.psf_logits.flatten().softmax(0).view_as(self.psf_logits)

    @property
    def degradation(self) -> Degradation:
        """How the HSI's sensor samples the fused image, with the PSF as it is learnt so far."""
        boundary = list(BOUNDARIES)[int(self.boundary)]
        return Degradation(self.psf, self.scale, int(self.offset), boundary)

    def forward(self, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
        """Fuse.

        Args:
            lr_hsi: ``(B, G, h, w)``, values in [0, 1].
            hr_msi: ``(B, g, H, W)``, ``H = scale*h`` and ``W = scale*w``.

        Returns:
            ``(B, G, H, W)``; in evaluation with the ``consistency`` step and within [0, 1].

        Raises:
            TypeError, ValueError: an image is not as above.
        """
        self.check_inputs(lr_hsi, hr_msi)
        fused = self._fused(hr_msi, self._hr_abundances(hr_msi))
        if self.training:
            return fused
        if self.consistency:
            fused = self._consistent(fused, lr_hsi, hr_msi)
        return fused.clamp(0, 1)

    def unmix(self, lr_hsi: Tensor, hr_msi: Tensor) -> tuple[Tensor, Tensor]:
        """The abundances ``(B, e, H, W)`` and the endmembers' spectra ``(e, G)``.

        With ``prior="none"`` their product is the fused image before the consistency step; with a
        prior they unmix what the network adds to it.
        """
        self.check_inputs(lr_hsi, hr_msi)
        return self._hr_abundances(hr_msi), self.spectra

    def _hr_abundances(self, hr_msi: Tensor, *, pixelwise: bool = False) -> Tensor:
        features = self.representation.of_msi(hr_msi, pixelwise=pixelwise)
        return self._abundances(self.hr_recalibrate, features)

    def _lr_abundances(self, lr_hsi: Tensor, size: Sequence[int]) -> Tensor:
        features = self.synchronize(self.representation.of_hsi(lr_hsi), size)
        return resize(self._abundances(self.lr_recalibrate, features), lr_hsi.shape[-2:])

    def _abundances(self, recalibrate: FrequencyRecalibration, features: Tensor) -> Tensor:
        if self.synchronization or self.recalibration:
            abundances = recalibrate(features, self.synchronize.mixing)
        else:
            abundances = recalibrate.abundances(features)
        if self.abundances == "softmax":
            return abundances.softmax(1)
        return abundances.clamp(0, 1) if self.abundances == "clamp" else abundances

    def _prior(self, msi: Tensor) -> Tensor:
        slopes, offset = self.skip[:, 1:], self.skip[:, :1, None]
        return apply_srf(msi, slopes) + offset

    def _fused(self, msi: Tensor, abundances: Tensor) -> Tensor:
        """Equation 13."""
        return self._prior(msi) + apply_srf(abundances, self.spectra.T)

    def _consistent(self, fused: Tensor, lr_hsi: Tensor, hr_msi: Tensor) -> Tensor:
        degradation = self.degradation
        return torch.stack(
            [
                consistent(z.clone(), y, x, degradation=degradation, srf=self.srf, back=self.back)
                for z, y, x in zip(fused, lr_hsi, hr_msi, strict=True)
            ]
        )

    # -- fitting -------------------------------------------------------------------------------

    def fit(
        self,
        lr_hsi: Tensor,
        hr_msi: Tensor,
        *,
        srf: Tensor | None = None,
        psf: Tensor | Degradation | None = None,
        minutes: float = 10.0,
        steps: int = 1000,
        full_steps: int = 0,
        patience: int = 300,
        learning_rate: float = 3e-3,
        alpha: float = 100.0,
        beta: float = 10.0,
        seed: int = 0,
        progress: bool | Progress = False,
    ) -> FitReport:
        """Learn from one pair, without any reference. Starts afresh at each call.

        A tenth of the HSI's pixels, in blocks, is kept from training; every 25 steps the error on
        them is taken, and the weights with which it was least are the result. It ends after
        ``patience`` steps without a lower error, after all steps, or when the time is over.
        Interrupted by Ctrl-C, the model keeps the best weights so far.

        Args:
            lr_hsi: ``(1, G, h, w)``, values in [0, 1].
            hr_msi: ``(1, g, H, W)``.
            srf: ``(g, G)`` spectral response; estimated where None (equation 15).
            psf: the HSI's `Degradation`, or its kernel as in `regression`; estimated where None,
                and then learnt further by the ``full_steps``.
            minutes: time limit.
            steps: of training on the HSI's grid, to which the MSI is degraded. There the PSF is
                the identity, and the convolutions know only the central weights.
            full_steps: of training on the MSI's grid thereafter, as in the paper.
            patience: see above.
            learning_rate: of Adam at its highest; it then falls to 0 along a cosine.
            alpha, beta: of `FSRVLLoss`.
            seed: of all that is random.
            progress: show a bar; or a callable that is given a row of `FitReport.history` at each
                judgement, with ``total``, the number of steps, beside it.

        Returns:
            a `FitReport`. The model is then in evaluation mode.

        Raises:
            TypeError, ValueError: an argument is not as said above, or an image not finite.
            RuntimeError: the loss is not finite any more.
            ImportError: ``progress=True`` without tqdm.
        """
        self.check_inputs(lr_hsi, hr_msi)
        if len(lr_hsi) != 1:
            raise ValueError(f"lr_hsi: expected a batch of one image, got {len(lr_hsi)}")
        for name, count in (("steps", steps), ("full_steps", full_steps), ("seed", seed)):
            checks.integer(name, count, low=0)
        checks.integer("patience", patience, low=1)
        for name, value in (("minutes", minutes), ("learning_rate", learning_rate)):
            if not checks.number(name, value) > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if srf is not None:
            checks.response("srf", srf, (self.msi_bands, self.hsi_bands))
        loss = FSRVLLoss(alpha, beta)
        deadline = time.monotonic() + 60 * minutes

        with torch.random.fork_rng(devices=[]), _shown(progress, steps + full_steps) as show:
            torch.manual_seed(seed)
            self._meet(lr_hsi, hr_msi, srf, psf)
            low_msi = self.degradation(hr_msi).detach()
            self._start(lr_hsi, low_msi, torch.Generator().manual_seed(seed))
            fitting = _Fitting(self, lr_hsi, low_msi, loss, deadline, patience, show)
            try:
                fitting.run(low_msi, "low", steps, learning_rate)
                if full_steps:
                    fitting.run(hr_msi, "full", full_steps, learning_rate / 10)
            finally:
                self.load_state_dict(fitting.best)
                self.eval()
        return fitting.report()

    @torch.no_grad()
    def _meet(
        self, lr_hsi: Tensor, hr_msi: Tensor, srf: Tensor | None, psf: Tensor | Degradation | None
    ) -> None:
        """Sensors, estimated where not given, and the regression's linear map."""
        model = RegressionModel.fit(lr_hsi[0], hr_msi[0], srf=srf, psf=psf, local=False)
        kernel = model.degradation.psf.to(lr_hsi)
        self.psf_size = list(kernel.shape)
        logits = (kernel / kernel.sum()).clamp_min(1e-12).log()
        self.psf_logits = nn.Parameter(logits, requires_grad=psf is None)
        self.srf.copy_(model.srf)
        self.back.copy_(model.back)
        self.offset.fill_(model.degradation.offset)
        self.boundary.fill_(list(BOUNDARIES).index(model.degradation.boundary))
        if self.prior == "regression":
            self.skip.copy_(model.weights)

    @torch.no_grad()
    def _start(self, lr_hsi: Tensor, low_msi: Tensor, generator: torch.Generator) -> None:
        """First weights, from the pair on the HSI's grid."""
        for block in (
            self.representation,
            self.synchronize,
            self.hr_recalibrate,
            self.lr_recalibrate,
        ):
            block.reset_parameters()
        self.representation.start_on(lr_hsi, low_msi, generator)
        mixing = self.synchronize.mixing
        self.hr_recalibrate.start_on(self.representation.of_msi(low_msi, pixelwise=True), mixing)
        self.lr_recalibrate.start_on(self.representation.of_hsi(lr_hsi), mixing)
        self.spectra.copy_(self._first_spectra(lr_hsi, low_msi))
        self.msi_spectra.copy_(apply_srf(self.spectra.T[..., None], self.srf)[..., 0].T)
        if self.prior != "none":
            for parameter in self.hr_recalibrate.abundances.parameters():
                nn.init.zeros_(parameter)

    def _first_spectra(self, lr_hsi: Tensor, low_msi: Tensor) -> Tensor:
        """Endmembers to start from, ``(e, G)``."""
        if self.prior == "none":
            return purest_spectra(lr_hsi[0].flatten(1).T, self.endmembers)
        # What the prior leaves unexplained is no spectrum: take the directions it varies along.
        rest = (lr_hsi - self._prior(low_msi))[0].flatten(1).T
        directions = torch.linalg.svd(rest, full_matrices=False).Vh[: self.endmembers]
        return nn.functional.pad(directions, (0, 0, 0, self.endmembers - len(directions)))

    def _images(self, lr_hsi: Tensor, msi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``Y^, Y~, X^, X~`` of equation 16, with the MSI on its own grid or on the HSI's."""
        full = msi.shape[-2:] != lr_hsi.shape[-2:]
        prior = self._prior(msi)
        hr_abundances = self._hr_abundances(msi, pixelwise=not full)
        lr_abundances = self._lr_abundances(lr_hsi, msi.shape[-2:])
        fused = prior + apply_srf(hr_abundances, self.spectra.T)
        seen = self.degradation(fused) if full else fused
        low_prior = self.degradation(prior) if full else prior
        return (
            low_prior + apply_srf(lr_abundances, self.spectra.T),
            seen,
            apply_srf(prior, self.srf) + apply_srf(hr_abundances, self.msi_spectra.T),
            apply_srf(fused, self.srf),
        )


class _Fitting:
    """The state of one call of `FSRVL.fit`."""

    def __init__(
        self,
        model: FSRVL,
        lr_hsi: Tensor,
        low_msi: Tensor,
        loss: FSRVLLoss,
        deadline: float,
        patience: int,
        show: Progress,
    ) -> None:
        self.model, self.lr_hsi, self.loss = model, lr_hsi, loss
        self.deadline, self.patience, self.show = deadline, patience, show
        self.held_out = held_out_blocks(*lr_hsi.shape[-2:]).to(lr_hsi)
        self.start, self.step = time.monotonic(), 0
        self.stopped: str | None = None
        self.history: list[dict[str, Any]] = []
        self.best, self.best_step, self.best_error = self._state(), 0, math.inf

    def run(self, msi: Tensor, grid: str, steps: int, learning_rate: float) -> None:
        """Adam on one grid, from the best weights so far."""
        model = self.model
        model.load_state_dict(self.best)
        self.stopped, self.best_error = None, math.inf  # errors of two grids do not compare
        self._judge(msi, grid)
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.99)
        )
        first, begun = self.step, time.monotonic()
        limit = max(self.deadline - begun, 1e-9)
        for index in range(steps):
            done = max(index / steps, (time.monotonic() - begun) / limit)
            if done >= 1:
                self.stopped = "the time was over"
                break
            rate = learning_rate * min(1, (index + 1) / RISE) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            loss = self._loss(msi, model._images(self.lr_hsi, msi))
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"the loss became {loss.item()} at step {self.step}; the model has its best "
                    f"weights, of step {self.best_step}. Try a lower learning_rate than "
                    f"{learning_rate:g}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            self.step += 1
            if (index + 1) % JUDGE_EVERY == 0 or index + 1 == steps:
                self._judge(msi, grid)
                if self.step - max(self.best_step, first) >= self.patience:
                    self.stopped = f"no lower error for {self.patience} steps"
                    break

    def _loss(self, msi: Tensor, images: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Equation 16 on the pixels that are not held out."""
        kept = 1 - self.held_out
        reconstructed, degraded, hr_reconstructed, hr_degraded = images
        low = (self.lr_hsi * kept, reconstructed * kept, degraded * kept)
        return self.loss(*low, msi, hr_reconstructed, hr_degraded)

    @torch.no_grad()
    def _judge(self, msi: Tensor, grid: str) -> None:
        self.model.eval()
        images = self.model._images(self.lr_hsi, msi)
        loss = self._loss(msi, images).item()
        errors = (images[1] - self.lr_hsi).abs().mean((0, 1))
        error = ((errors * self.held_out).sum() / self.held_out.sum()).item()
        if error < self.best_error:
            self.best, self.best_step, self.best_error = self._state(), self.step, error
        seconds = time.monotonic() - self.start
        row = {"step": self.step, "grid": grid, "seconds": seconds, "loss": loss, "held_out": error}
        self.history.append(row)
        self.show(row)

    def _state(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.model.state_dict())

    def report(self) -> FitReport:
        seconds = time.monotonic() - self.start
        stopped = self.stopped or "all steps were done"
        return FitReport(self.step, seconds, stopped, self.best_step, self.history)


def held_out_blocks(rows: int, columns: int) -> Tensor:
    """``(rows, columns)``: 1 in the blocks kept from training, at random places, else 0.

    Blocks, since single pixels would be told by their neighbours; of 4 x 4 pixels, or smaller in an
    image with few.
    """
    size = max(1, min(4, rows // 8, columns // 8))
    shape = (-(-rows // size), -(-columns // size))
    chosen = torch.rand(shape)
    count = max(1, round(HELD_OUT * chosen.numel()))
    held = (chosen <= chosen.flatten().kthvalue(count).values).float()
    if held.all():
        raise ValueError("lr_hsi must hold at least two pixels to learn from, got one")
    held = held.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return held[:rows, :columns]


def purest_spectra(pixels: Tensor, count: int) -> Tensor:
    """The ``count`` pixels ``(n, G)`` that span most: successive projection (Araujo et al., 2001).

    Where the pixels span fewer directions, the last ones repeat the brightest pixel.
    """
    rest, found = pixels.clone(), []
    for _ in range(count):
        norms = rest.norm(dim=1)
        found.append(int(norms.argmax()))
        direction = rest[found[-1]] / norms.max().clamp_min(1e-12)
        rest = rest - (rest @ direction)[:, None] * direction
    return pixels[found]


@contextmanager
def _shown(progress: bool | Progress, total: int) -> Iterator[Progress]:
    """Something to give each row of the history to."""
    if callable(progress):
        yield lambda row: progress({**row, "total": total})
        return
    checks.flag("progress", progress)
    if not progress:
        yield lambda row: None
        return
    tqdm = need("tqdm.auto", extra="train", purpose="a progress bar")
    with tqdm.tqdm(total=total, desc="FSRVL", unit="step") as bar:

        def show(row: dict[str, Any]) -> None:
            bar.update(row["step"] - bar.n)
            bar.set_postfix(loss=f"{row['loss']:.3g}", held_out=f"{row['held_out']:.2e}")

        yield show
