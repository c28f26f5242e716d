"""What is left to gain over `regression`, found with the reference: bounds, not methods.

``python -m benchmarks.left_to_gain`` prints the table of docs/training.md ("What is left to gain")
from the CAVE scenes in the folder named by ``FASTFUSION_DATA``; with ``--closed-form`` the means of
docs/regression.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion import metrics
from fastfusion.data import Degradation, load_scene
from fastfusion.evaluation import Case, case_of, run, score
from fastfusion.models.regression import RegressionModel
from fastfusion.training import RECIPES

SCENES = (*RECIPES["lso-cave"].validation, *RECIPES["lso-cave"].scenes)
#: Sides of the windows in which the MSI is fitted to the errors.
WINDOWS = (33, 17, 9)
#: Side of the squares in which the noise is taken to be the same, in pixels.
SQUARE = 128


def psnr(fused: Tensor, reference: Tensor) -> float:
    return metrics.psnr(fused[None].clamp(0, 1), reference[None]).item()


def decibels(square_errors: Tensor) -> float:
    """Mean over bands, of their mean square errors, as PSNR takes it."""
    return -10 * square_errors.clamp_min(1e-12).log10().mean().item()


def noise(reference: Tensor, srf: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Mean squares ``(G,)`` of the reference's noise, and of what both sensors leave of it.

    The noise of a band is what all other bands do not tell of its finest diagonal detail (Haar's),
    by least squares in each square; so what only one band shows counts as noise too.  The MSI's
    bands are sums of the reference's and tell something of their noise; the HSI tells the share of
    one in ``scale**2`` of the pixels.
    """
    top, bottom = reference[:, ::2].double(), reference[:, 1::2].double()
    detail = (top[..., ::2] - top[..., 1::2] - bottom[..., ::2] + bottom[..., 1::2]) / 2
    side = SQUARE // 2
    squares = detail.unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2)
    squares = squares.transpose(0, 1)  # (squares, G, pixels)
    bands, pixels = squares.shape[1:]
    moments = squares @ squares.mT + 1e-14 * torch.eye(bands, dtype=squares.dtype)
    variances = 1 / torch.linalg.inv(moments).diagonal(dim1=1, dim2=2) / (pixels - bands + 1)
    covariance = torch.diag_embed(variances)
    seen = covariance @ srf.double().mT
    told = seen @ torch.linalg.inv(srf.double() @ seen) @ seen.mT
    left = (covariance - told).diagonal(dim1=1, dim2=2).mean(0)
    return variances.mean(0), left * (1 - 1 / scale**2)


def best_mixture(error: Tensor, candidates: Sequence[Tensor], each_band: bool) -> Tensor:
    """The combination of candidates that is nearest to the error."""
    features = torch.stack([candidate.flatten(1) for candidate in candidates]).double()
    target = error.flatten(1).double()
    moments = torch.einsum("igp,jgp->gij", features, features)
    products = torch.einsum("igp,gp->gi", features, target)
    if not each_band:
        moments, products = moments.sum(0, keepdim=True), products.sum(0, keepdim=True)
    damping = 1e-9 * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = moments + damping * torch.eye(len(features), dtype=moments.dtype)
    weights = torch.linalg.solve(damped, products[..., None])[..., 0].expand(len(error), -1)
    return torch.einsum("gi,igp->gp", weights, features).view_as(error).to(error)


def window_mean(image: Tensor, side: int) -> Tensor:
    half = side // 2
    padded = F.pad(image[None], (half, half, half, half), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(padded, (side, 1), 1), (1, side), 1)[0]


def local_maps(error: Tensor, msi: Tensor, side: int) -> Tensor:
    """At every pixel, the linear map of the MSI that fits the error best around it, applied."""
    guides = msi.double()
    mean = window_mean(guides, side)
    variance = torch.stack([window_mean(guides * g, side) for g in guides]) - mean * mean[:, None]
    matrices = variance.permute(2, 3, 0, 1)
    damping = 1e-9 * matrices.diagonal(dim1=2, dim2=3).mean()
    inverse = torch.linalg.inv(matrices + damping * torch.eye(len(msi), dtype=mean.dtype))
    # What the inverse gives for this pixel's own guides, so that bands are one product each.
    own = torch.einsum("hwij,jhw->ihw", inverse, guides - mean)
    fitted = torch.empty_like(error)
    for band, values in enumerate(error.double()):
        band_mean = window_mean(values[None], side)[0]
        products = window_mean(guides * values, side) - mean * band_mean
        fitted[band] = (band_mean + (own * products).sum(0)).to(error)
    return fitted


def by_detail(error: Tensor, shown: Tensor, msi: Tensor, classes: int = 10) -> Tensor:
    """``shown``, weighted as it fits the error best among pixels with as much detail around."""
    fine = msi - Degradation.gaussian(1, 1.0)(msi)
    amount = window_mean(fine.square().sum(0, keepdim=True), 5).flatten()
    rank = torch.empty_like(amount, dtype=torch.long)
    rank[amount.argsort()] = torch.arange(len(amount)) * classes // len(amount)
    flat_error, flat = error.flatten(1).double(), shown.flatten(1).double()
    sums = [
        flat.new_zeros(classes).index_add_(0, rank, (flat * other).sum(0))
        for other in (flat_error, flat)
    ]
    return (shown.flatten(1) * (sums[0] / sums[1])[rank].to(shown)).view_as(shown)


def scene_rows(case: Case) -> dict[str, float]:
    """dB over `regression` by what is changed, but for the first three, which are PSNRs."""
    reference, pair = case.reference, (case.lr_hsi, case.hr_msi)
    assert reference is not None and case.srf is not None and case.degradation is not None
    sensors = {"srf": case.srf, "psf": case.degradation}
    model = RegressionModel.fit(*pair, **sensors)
    fused = model.apply(*pair)
    start, error = psnr(fused, reference), reference - fused
    rows = {"regression": start}
    for name, squares in zip(
        ("noise", "noise left"), noise(reference, case.srf, case.scale), strict=True
    ):
        rows[name] = decibels(squares)

    def gain(name: str, change: Tensor) -> None:
        rows[name] = psnr(fused + change, reference) - start

    def other(**options: float) -> Tensor:
        return RegressionModel.fit(*pair, **sensors, **options).apply(*pair) - fused

    wider, narrower = (other(window_sigma=times * model.window_sigma) for times in (2, 0.5))
    gain(
        "half and twice as wide windows, one weight each",
        best_mixture(error, [wider, narrower], False),
    )
    blurred = [Degradation.gaussian(1, sigma)(fused) - fused for sigma in (0.7, 1.5)]
    shifted = [(fused.roll(1, dim) - fused.roll(-1, dim)) / 2 for dim in (1, 2)]
    candidates = [wider, narrower, other(local=False), other(ridge=1e-3), *blurred, *shifted]
    gain("eight candidates, a weight each for each band", best_mixture(error, candidates, True))
    smooth = Degradation.gaussian(1, 1.0)(case.hr_msi)
    # What the MSI's finest detail adds to the result beyond what its own bands tell.
    detail = fused - model.apply(case.lr_hsi, smooth)
    detail = detail - _told(detail, case.srf)
    gain("the finest detail weighted, one weight", best_mixture(error, [detail], False))
    gain("the same by how much detail there is around", by_detail(error, detail, case.hr_msi))
    for side in WINDOWS:
        gain(f"linear maps of the MSI in {side} pixels", local_maps(error, case.hr_msi, side))
    return rows


def closed_form_rows(case: Case) -> dict[str, float]:
    """PSNR, SAM and ERGAS of `regression`, with the sensors known and estimated, and PSNR of its
    one map of the scene."""
    known = score(case, run(case, "regression"))
    rows = {f"known {name}": known[name] for name in ("psnr", "sam", "ergas")}
    rows["estimated psnr"] = score(case, run(case, "regression", blind=True))["psnr"]
    rows["global psnr"] = score(case, run(case, "regression", local=False))["psnr"]
    return rows


def _told(change: Tensor, srf: Tensor) -> Tensor:
    """The part of a change that the MSI sees."""
    seen = torch.linalg.pinv(srf) @ srf
    return torch.einsum("gk,khw->ghw", seen, change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", nargs="+", default=SCENES)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--closed-form", action="store_true", help="its own figures alone")
    asked = parser.parse_args()
    found = []
    for name in asked.scenes:
        case = case_of(load_scene(name), asked.scale)
        found.append(closed_form_rows(case) if asked.closed_form else scene_rows(case))
        print(name, {row: round(value, 2) for row, value in found[-1].items()}, flush=True)
    print(
        f"| change | mean | range | {', '.join(asked.scenes[:2])} |", "|---|---|---|---|", sep="\n"
    )
    for row in found[0]:
        values = torch.tensor([rows[row] for rows in found])
        first = ", ".join(f"{value:+.2f}" for value in values[:2])
        spread = f"{values.min():+.2f} to {values.max():+.2f}"
        print(f"| {row} | {values.mean():+.2f} | {spread} | {first} |")


if __name__ == "__main__":
    main()
