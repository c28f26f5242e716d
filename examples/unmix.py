"""Unmix a pair of images with FSRVL and compare its abundances with a reference.

FSRVL writes the fused image as abundances times endmembers; here with four endmembers and
abundances that are not negative and sum to 1. The scene is Jasper Ridge with F. Zhu's reference
unmixing where it is at hand (the folder named in FASTFUSION_DATA, by default ../shared/data), else
a made one whose abundances are known exactly. The hyperspectral image is made 4 times coarser, so
the abundances at full resolution come from the multispectral image alone. The endmembers found are
matched with the reference's by their angles. Beside FSRVL stands what needs no network: the purest
pixels of the coarse image as endmembers and abundances from the bicubic enlargement of that image.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from fastfusion.data import Cube, Scene, load_scene
from fastfusion.evaluation import case_of
from fastfusion.models import FSRVL
from fastfusion.models.fsrvl import purest_spectra

MATERIALS = 4


def made_scene(side: int = 64, bands: int = 60) -> Scene:
    """Smooth spectra, mixed by smooth abundances that are nearly pure in places."""
    generator = torch.Generator().manual_seed(0)
    at = torch.linspace(0, 1, bands)
    centres = torch.tensor([0.15, 0.4, 0.65, 0.9])
    spectra = 0.1 + 0.7 * torch.exp(-(((at - centres[:, None]) / 0.18) ** 2))  # (materials, bands)
    rough = torch.randn(1, MATERIALS, side // 8, side // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, size=(side, side), mode="bicubic")[0]
    abundances = (4 * smooth).softmax(0)
    image = torch.einsum("mrc,mb->brc", abundances, spectra)
    image += 0.002 * torch.randn(image.shape, generator=generator)
    reference = Cube(image.clamp(0, 1).numpy(), wavelengths=(400 + 600 * at).numpy())
    return Scene("made", "made here", reference=reference, endmembers=spectra.T.numpy(),
                 abundances=abundances.numpy())  # fmt: skip


def angles(found: Tensor, truth: Tensor) -> Tensor:
    """Degrees between each found spectrum and each reference one, ``(found, truth)``."""
    cosine = torch.nn.functional.cosine_similarity(found[:, None], truth[None], dim=-1)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def matched(abundances: Tensor, spectra: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Abundances in the order of the reference's materials, and the angles to their spectra."""
    table = angles(spectra, truth)
    orders = itertools.permutations(range(len(spectra)))
    best = min(orders, key=lambda order: sum(table[i, j].item() for j, i in enumerate(order)))
    return abundances[list(best)], torch.stack([table[i, j] for j, i in enumerate(best)])


def on_simplex(pixels: Tensor, spectra: Tensor, steps: int = 300) -> Tensor:
    """Abundances ``(materials, n)``, not negative with sum 1, of least squares error, by
    exponentiated gradient steps on ``pixels (n, bands)``."""
    gram, products = spectra @ spectra.T, spectra @ pixels.T
    logits = torch.zeros_like(products)
    rate = 10 / gram.diagonal().max()
    for _ in range(steps):
        logits -= rate * (gram @ logits.softmax(0) - products)
    return logits.softmax(0)


def rmse(found: Tensor, truth: Tensor) -> list[float]:
    """Of each material."""
    return [float(value) for value in (found - truth).square().mean((1, 2)).sqrt()]


def main() -> None:
    """Unmix and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", choices=["jasper_ridge", "samson", "made"])
    parser.add_argument("--steps", type=int, default=600, help="of FSRVL's training")
    options = parser.parse_args()
    try:
        scene = made_scene() if options.scene == "made" else load_scene("jasper_ridge")
        if options.scene == "samson":
            scene = load_scene("samson")
    except FileNotFoundError as error:
        if options.scene is not None:
            raise SystemExit(str(error)) from error
        scene = made_scene()
    case = case_of(scene, scale=4)
    assert scene.abundances is not None and scene.endmembers is not None
    rows, columns = case.hr_msi.shape[1:]
    reference = torch.from_numpy(np.array(scene.abundances, np.float32))[:, :rows, :columns]
    spectra = torch.from_numpy(np.array(scene.endmembers, np.float32)).T

    model = FSRVL(
        case.lr_hsi.shape[0],
        case.hr_msi.shape[0],
        case.scale,
        endmembers=MATERIALS if len(spectra) > 3 else len(spectra),
        abundances="softmax",
        prior="none",
    )
    pair = case.lr_hsi[None], case.hr_msi[None]
    report = model.fit(
        *pair,
        srf=case.srf,
        psf=case.degradation,
        minutes=0.6,
        steps=options.steps,
        patience=options.steps,
    )
    with torch.no_grad():
        (found,), learnt = model.unmix(*pair)
    found, degrees = matched(found, learnt.detach(), spectra)

    purest = purest_spectra(case.lr_hsi.flatten(1).T, len(spectra))
    enlarged = torch.nn.functional.interpolate(pair[0], size=(rows, columns), mode="bicubic")[0]
    plain = on_simplex(enlarged.flatten(1).T, purest).view(-1, rows, columns)
    plain, plain_degrees = matched(plain, purest, spectra)

    print(f"{scene.name}: {scene.terms}. {scene.note}")
    print(f"FSRVL: {report.steps} steps in {report.seconds:.1f} s, {report.stopped}\n")
    print(f"{'RMSE of abundances':28s}" + "".join(f"  material {i}" for i in range(len(spectra))))
    even = torch.full_like(reference, 1 / len(reference))
    rows_of = {"FSRVL": found, "purest pixels, bicubic": plain, "the same everywhere": even}
    for name, abundances in rows_of.items():
        each = rmse(abundances, reference)
        mean = math.sqrt(sum(value**2 for value in each) / len(each))
        print(f"{name:28s}" + "".join(f"{v:12.4f}" for v in each) + f"   all {mean:.4f}")
    print(f"{'angle of spectra, degrees':28s}")
    for name, values in {"FSRVL": degrees, "purest pixels": plain_degrees}.items():
        print(f"{name:28s}" + "".join(f"{float(v):12.1f}" for v in values))


if __name__ == "__main__":
    main()
