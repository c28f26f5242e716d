"""Learn the flow through a porous medium with a U-Net that holds ``LatentOperator2d`` layers.

The data are made here: random two-valued permeabilities ``a``, and the pressure ``u`` with
``-div(a grad u) = 1`` inside and 0 on the edge (Darcy's flow, as in the papers on neural
operators), solved by finite differences. The network learns ``a -> u``. The same U-Net without the
layers is trained beside it, on the same batches for the same number of steps; a guess that knows
nothing of ``a`` is the mean pressure. Printed is the relative L2 error on pairs not trained on.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import torch
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn

from fastfusion.nn import LatentOperator2d


def pressure(permeability: np.ndarray) -> np.ndarray:
    """Solve on ``(n, n)`` cells of side ``1/n``; a face between two cells has the harmonic mean."""
    n = len(permeability)
    index = np.arange(n * n).reshape(n, n)
    diagonal = np.zeros((n, n))
    rows, columns, values = [], [], []
    for axis in (0, 1):
        a = np.moveaxis(permeability, axis, 0)
        i = np.moveaxis(index, axis, 0)
        face = 2 * a[:-1] * a[1:] / (a[:-1] + a[1:])
        d = np.moveaxis(diagonal, axis, 0)
        d[:-1] += face
        d[1:] += face
        d[0] += 2 * a[0]  # the edge, half a cell away, where the pressure is 0
        d[-1] += 2 * a[-1]
        for one, other in ((i[:-1], i[1:]), (i[1:], i[:-1])):
            rows.append(one.ravel())
            columns.append(other.ravel())
            values.append(-face.ravel())
    rows.append(index.ravel())
    columns.append(index.ravel())
    values.append(diagonal.ravel())
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    matrix = sparse.csr_matrix(entries, shape=(n * n, n * n))
    return spsolve(matrix, np.full(n * n, 1 / n**2)).reshape(n, n)


def pairs(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Permeabilities of 3 and 12 in random patches, and pressures; ``(count, 1, size, size)``."""
    random = np.random.default_rng(seed)
    fields = gaussian_filter(random.standard_normal((count, size, size)), (0, size / 12, size / 12))
    media = np.where(fields > 0, 12.0, 3.0)
    flows = np.stack([pressure(medium) for medium in media])
    a = torch.from_numpy((media - 7.5) / 4.5).float()[:, None]
    return a, torch.from_numpy(100 * flows).float()[:, None]


class UNet(nn.Module):
    """Three scales; ``latent`` puts an operator on each skip."""

    def __init__(self, width: int = 32, *, latent: bool) -> None:
        super().__init__()
        widths = [width, 2 * width, 2 * width]

        def step(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.GELU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.GELU(),
            )  # fmt: skip

        self.down = nn.ModuleList(step(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.skips = nn.ModuleList(
            LatentOperator2d(w, tokens=4, basis=12, patch_size=None) if latent else nn.Identity()
            for w in widths
        )
        self.up = nn.ModuleList(step(a + b, a) for a, b in itertools.pairwise(widths))
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, a: Tensor) -> Tensor:
        b, _, h, w = a.shape
        rows, columns = (torch.linspace(0, 1, n, device=a.device) for n in (h, w))
        x = torch.cat([a, rows[:, None].expand(b, 1, h, w), columns.expand(b, 1, h, w)], dim=1)
        levels = []
        for i, layer in enumerate(self.down):
            x = layer(x if i == 0 else nn.functional.avg_pool2d(x, 2))
            levels.append(self.skips[i](x))
        y = levels.pop()
        for layer in reversed(self.up):
            y = nn.functional.interpolate(y, scale_factor=2, mode="bilinear")
            y = layer(torch.cat([levels.pop(), y], dim=1))
        return self.last(y)


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 error, the mean over the pairs."""
    return ((found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).mean()


def train(title: str, model: nn.Module, known: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor],
          steps: int) -> None:  # fmt: skip
    """Adam, and a line of errors five times."""
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    random, start = torch.Generator().manual_seed(0), time.perf_counter()
    errors = []
    for step in range(steps + 1):
        if step % max(1, steps // 4) == 0:
            with torch.no_grad():
                errors.append(f"{float(relative_error(model(unseen[0]), unseen[1])):.4f}")
        if step == steps:
            break
        batch = torch.randint(len(known[0]), (16,), generator=random)
        loss = relative_error(model(known[0][batch]), known[1][batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    count = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    print(f"{title:28s} {' -> '.join(errors)}   {count} parameters, {seconds:.0f} s")


def main() -> None:
    """Make the data, train both, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args()
    start = time.perf_counter()
    known, unseen = pairs(options.pairs, options.size, 0), pairs(64, options.size, 1)
    seconds = time.perf_counter() - start
    print(f"{options.pairs} pairs of {options.size} x {options.size}, {seconds:.1f} s")
    print("error on 64 pairs not trained on, at the start and after each quarter of the steps:")
    guess = known[1].mean(0, keepdim=True).expand_as(unseen[1])
    print(f"{'the mean pressure':28s} {float(relative_error(guess, unseen[1])):.4f}")
    for title, latent in (("U-Net", False), ("U-Net with latent operators", True)):
        torch.manual_seed(0)
        train(title, UNet(options.width, latent=latent), known, unseen, options.steps)


if __name__ == "__main__":
    main()
