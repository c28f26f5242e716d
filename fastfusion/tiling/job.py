"""The two images, what earlier passes found, and what each pass does with a tile."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfusion._optional import need
from fastfusion.data import estimation
from fastfusion.data.sensors import BOUNDARIES, Degradation
from fastfusion.data.windows import Stretch, Windows
from fastfusion.models.cofusion import CoFusion
from fastfusion.models.lso import LSO
from fastfusion.models.regression import RegressionModel
from fastfusion.nn.cofusion import SceneMaxima, SpeCAM
from fastfusion.ops import haar_split2d
from fastfusion.ops.operator import backend as backend_for_block
from fastfusion.tiling.folder import load, load_if_there, save
from fastfusion.tiling.plan import load_network, psf_from_json, support


def run_task(work: str, plan: str, stage: str, index: int) -> None:
    """Do one tile of one pass, and leave its file. ``plan`` is the digest of the plan."""
    torch.set_num_threads(1)  # as many tasks run as there are threads; and sums stay in one order
    job = job_of(work, plan, stage, threading.get_ident())
    name = job.plan["backend"]
    backend = contextlib.nullcontext() if name == "auto" else backend_for_block(name)
    with torch.no_grad(), backend:
        results = job.passes[stage.rstrip("0123456789")](*job.tile(index))
    save(Path(work, stage, f"{index:06}.npz"), **results)


@functools.lru_cache(maxsize=64)
def job_of(work: str, plan: str, stage: str, thread: int) -> Job:
    """One for each thread: a network's hooks hold what tile it works on."""
    return Job(Path(work))


class Job:
    """The two images, what earlier passes found, and what each pass does with a tile."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.plan = plan = json.loads((work / "plan.json").read_text())
        self.scale, self.device = plan["scale"], torch.device(plan["device"])
        self.scanned = load_if_there(work / "scan.npz")
        peak = self.scanned["peak"].item() if self.scanned else 1.0
        self.hsi = Windows(**plan["hsi"]["open"], peak=peak)
        self.msi = Windows(**plan["msi"]["open"], peak=peak)
        self.peak = peak
        _, self.rows, self.columns = self.hsi.shape
        self.side = plan["tile"] // self.scale  # from here on, in HSI pixels
        self.margin = plan["margin"] // self.scale
        self.passes: dict[str, Callable[[Stretch, Stretch], dict[str, Any]]] = {
            "scan": self.scan,
            "moments": self.moments,
            "sharpness": self.sharpness,
            "maxima": self.maxima,
            "fuse": self.fuse,
        }

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.side), -(-self.columns // self.side)

    def tile(self, index: int) -> tuple[Stretch, Stretch]:
        """The tile's rows and columns of the HSI."""
        row, column = (self.side * at for at in divmod(index, self.grid[1]))
        return (
            Stretch.of(row, min(row + self.side, self.rows)),
            Stretch.of(column, min(column + self.side, self.columns)),
        )

    def _grown(
        self, rows: Stretch, columns: Stretch, margin: int, boundary: str = "replicate"
    ) -> tuple[Stretch, Stretch]:
        circular = boundary == "circular"
        return (
            rows.grown(margin, self.rows, circular=circular),
            columns.grown(margin, self.columns, circular=circular),
        )

    def _pair(self, rows: Stretch, columns: Stretch) -> tuple[Tensor, Tensor]:
        fine = rows.times(self.scale), columns.times(self.scale)
        return self.hsi.read(rows, columns).to(self.device), self.msi.read(*fine).to(self.device)

    # -- statistics ----------------------------------------------------------------------------

    def scan(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """Values are finite; the least and the largest."""
        limits = {}
        for name, image, factor in (("hsi", self.hsi, 1), ("msi", self.msi, self.scale)):
            values = image.read(rows.times(factor), columns.times(factor))
            bad = ~values.isfinite()
            if bad.any():
                band, row, column = (bad.nonzero()[0]).tolist()
                raise ValueError(
                    f"{image.path} holds NaN or infinite values, as in band {band}, row "
                    f"{row + factor * rows.first}, column {column + factor * columns.first} "
                    "(counted from 0); fill them in or cut them out first"
                )
            limits[name] = [values.min().item(), values.max().item()]
        return limits

    def moments(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """`pair_moments` of the tile and of its pixels near the scene's edge, by boundary."""
        candidates = self.candidates
        margin = _reach(next(iter(candidates.values())))
        inside = all(
            stretch.first >= margin and stretch.end + margin <= size
            for stretch, size in ((rows, self.rows), (columns, self.columns))
        )
        edge = estimation.edge_mask(self.rows, self.columns)
        edge = edge[rows.first : rows.end, columns.first : columns.end].to(self.device)
        sums, at_edge = [], []
        for boundary, degradation in candidates.items():
            grown = self._grown(rows, columns, margin, boundary)
            hsi, msi = self._pair(*grown)
            inner = (slice(None), *(stretch.inner for stretch in grown))
            hsi, low_msi = hsi[inner], degradation(msi.double())[inner]
            sums.append(estimation.pair_moments(hsi, low_msi))
            at_edge.append(estimation.pair_moments(hsi[:, edge], low_msi[:, edge]))
            if inside:  # no boundary is met
                break
        return {"whole": torch.stack(sums).cpu(), "edge": torch.stack(at_edge).cpu()}

    @functools.cached_property
    def candidates(self) -> dict[str, Degradation]:
        """The PSF that is given or was found, with the boundaries that may be."""
        if self.plan["psf"] is not None:
            given = psf_from_json(self.plan["psf"])
            return {given.boundary: given}
        psf = load(self.work / "psf.npz")
        return {
            boundary: Degradation(psf["psf"], self.scale, int(psf["offset"]), boundary)
            for boundary in BOUNDARIES
        }

    def sharpness(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        model = self.model
        grown = self._grown(rows, columns, model.maps_halo, model.degradation.boundary)
        inner = grown[0].inner, grown[1].inner
        return {"sums": model.sharpness_moments(*self._pair(*grown), inner).cpu()}

    @functools.cached_property
    def model(self) -> RegressionModel:
        """The regression's, as far as the passes before have found it."""
        found = load(self.work / "sensors.npz")
        degradation = self.candidates[list(BOUNDARIES)[int(found["boundary"])]]
        model = RegressionModel.from_moments(
            found["moments"].to(self.device),
            degradation,
            found["srf"].to(self.device),
            **self.plan["options"],
        )
        sums = load_if_there(self.work / "sharpness.npz")
        return model.with_sharpness(sums["sums"].to(self.device)) if sums else model

    # -- the result ----------------------------------------------------------------------------

    @functools.cached_property
    def network(self) -> LSO | CoFusion | None:
        if self.plan["weights"] is None:
            return None
        return load_network(self.plan["method"], self.plan["weights"][0], self.device)

    @property
    def prior_kind(self) -> str:
        return self.plan["method"] if self.network is None else self.network.prior

    def prior(self, rows: Stretch, columns: Stretch) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, G, h, w)``, ``(B, g, H, W)`` and ``(B, G, H, W)`` of a part of the scene."""
        if self.prior_kind == "regression":
            boundary, halo = self.model.degradation.boundary, self.model.halo
        else:
            boundary, halo = "replicate", 3  # of cubic interpolation
        grown = self._grown(rows, columns, halo, boundary)
        low, high = self._pair(*grown)
        if self.prior_kind == "regression":
            prior = self.model.apply(low, high)
            if self.plan["method"] != "regression":
                prior = prior.clamp_(0, 1)
        else:
            prior = F.interpolate(low[None], high.shape[-2:], mode="bicubic")[0]
        inner = tuple(stretch.inner for stretch in grown)
        fine = tuple(stretch.times(self.scale).inner for stretch in grown)
        high, prior = (image[:, fine[0], fine[1]][None] for image in (high, prior))
        return low[:, inner[0], inner[1]][None], high, prior

    def fuse(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """Compute and write one tile."""
        if self.network is None:
            fused = self.prior(rows, columns)[2][0]
        elif self.prior_kind == "regression":
            fused = self._refined(rows, columns)
        else:
            fused = self._networked(rows, columns)
        fused = fused.clamp(0, 1)
        if self.peak != 1:
            fused = fused * self.peak
        place = [stretch.times(self.scale) for stretch in (rows, columns)]
        zarr = need("zarr", extra="large", purpose="writing zarr stores")
        array = zarr.open_array(self.work / "result.zarr", mode="r+")
        array[:, place[0].first : place[0].end, place[1].first : place[1].end] = fused.cpu().numpy()
        return {}

    def _networked(self, rows: Stretch, columns: Stretch) -> Tensor:
        """What the network makes of one stretch of the scene: ``(G, H, W)``."""
        assert self.network is not None
        wide = self._grown(rows, columns, self.margin)
        low, high, prior = self.prior(*(Stretch.of(s.first, s.end) for s in wide))
        with self._told(*wide):
            fused = self.network(low, high, prior)[0]
        fine = [stretch.times(self.scale).inner for stretch in wide]
        return fused[:, fine[0], fine[1]]

    def _refined(self, rows: Stretch, columns: Stretch) -> Tensor:
        """The same, brought back to what both sensors saw; beyond the edge of a scene that repeats
        is what the network makes of its other end."""
        model = self.model
        step = self.network_step
        grown = self._grown(rows, columns, model.refine_halo, model.degradation.boundary)
        lines = []
        for r in grown[0].pieces:
            parts = []
            for c in grown[1].pieces:
                # The network's patches begin where those of the whole scene do.
                begin = [first // step * step for first in (r[0], c[0])]
                part = self._networked(Stretch.of(begin[0], r[1]), Stretch.of(begin[1], c[1]))
                skip = [
                    (first - at) * self.scale for first, at in zip((r[0], c[0]), begin, strict=True)
                ]
                parts.append(part[:, skip[0] :, skip[1] :])
            lines.append(torch.cat(parts, dim=2))
        fused = torch.cat(lines, dim=1).contiguous()
        fused = model.refine(fused, *self._pair(*grown))
        fine = [stretch.times(self.scale).inner for stretch in grown]
        return fused[:, fine[0], fine[1]]

    @property
    def network_step(self) -> int:
        """HSI pixels of which a network's tiles have to begin at a multiple."""
        return math.lcm(support(self.network)[1], self.scale) // self.scale

    @contextlib.contextmanager
    def _told(self, rows: Stretch, columns: Stretch) -> Iterator[None]:
        """The network knows of the scene what it cannot see in a tile."""
        assert self.network is not None
        with contextlib.ExitStack() as stack:
            if isinstance(self.network, LSO):
                grid = self._coordinates(rows, columns)
                hook = self.network.coordinates.register_forward_hook(
                    lambda module, inputs, output: grid.to(output.dtype)
                )
                stack.callback(hook.remove)
            for name, module in self.network.named_modules():
                if isinstance(module, SceneMaxima) and name in self.known:
                    maximum = self.known[name].to(self.device)
                    hook = module.register_forward_hook(
                        lambda module, inputs, output, maximum=maximum: maximum
                    )
                    stack.callback(hook.remove)
            yield

    def _coordinates(self, rows: Stretch, columns: Stretch) -> Tensor:
        """Those of the whole scene, padded to multiples of 4 as the network does."""
        lines = []
        for stretch, size in ((rows, self.rows), (columns, self.columns)):
            total = -(-size * self.scale // 4) * 4
            first = stretch.first * self.scale
            count = -(-stretch.length * self.scale // 4) * 4
            at = torch.arange(first, first + count, dtype=torch.float32, device=self.device)
            lines.append(at / (total - 1))
        shape = len(lines[0]), len(lines[1])
        return torch.stack([lines[0][:, None].expand(shape), lines[1].expand(shape)])[None]

    # -- CoFusion's maxima ---------------------------------------------------------------------

    @functools.cached_property
    def known(self) -> dict[str, Tensor]:
        """The maxima that passes before have found, by the names of their modules."""
        known: dict[str, Tensor] = {}
        for path in sorted(self.work.glob("maxima*.npz")):
            known |= load(path)
        return known

    def maxima(self, rows: Stretch, columns: Stretch) -> dict[str, Any]:
        """Over the tile, those maxima whose inputs depend on none that is not known yet."""
        network = self.network
        assert isinstance(network, CoFusion)
        wide = self._grown(rows, columns, self.margin)
        _, high, prior = self.prior(*(Stretch.of(s.first, s.end) for s in wide))
        images = network.seen(prior, high)
        found: dict[str, Tensor] = {}

        def record(name: str, level: int, *images: Tensor) -> None:
            keys = []
            for stretch, size in zip(wide, (self.rows, self.columns), strict=True):
                inner, stride = stretch.times(self.scale).inner, 2**level
                last = stretch.end == size and inner.stop == stretch.length * self.scale
                keys.append(slice(inner.start // stride, None if last else inner.stop // stride))
            maxima = [x[:, :, keys[0], keys[1]].amax((2, 3)) for x in images]
            found[name] = torch.cat(maxima, dim=1).cpu()

        with self._told(*wide):
            local, proxies = network.generator(torch.cat(images, dim=1))
            for level, scale in enumerate(cast(Any, network.scales)):
                name, x = f"scales.{level}", proxies[level]
                chained = network.spectral == "specam"
                blocks: Any = scale.spectral if chained else [scale.spectral]
                for number, block in enumerate(blocks):
                    place = f"{name}.spectral.{number}"
                    if isinstance(block, SpeCAM) and f"{place}.maxima" not in self.known:
                        low, high_part = haar_split2d(x)
                        record(f"{place}.maxima", level, block.low(low), block.high(high_part))
                        break
                    x = block(x)
                else:
                    if scale.cross is not None and f"{name}.cross.maxima.0" not in self.known:
                        record(f"{name}.cross.maxima.0", level, scale.spatial(local[level]))
                        record(f"{name}.cross.maxima.1", level, x)
        return found


def _reach(degradation: Degradation) -> int:
    """How many HSI pixels around one its PSF sees."""
    away = max(map(abs, degradation.centre))
    return math.ceil((max(degradation.psf.shape) + away) / degradation.scale) + 1
