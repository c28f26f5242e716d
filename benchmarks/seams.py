"""How far tiles differ from the whole image, and what a narrower margin costs a network.

``python -m benchmarks.seams`` prints the rows of docs/large-scenes.md: a scene of 248 x 384 pixels
and 16 bands in tiles of 128, networks of the papers' size (CoFusion shallower) with random weights.
With ``FASTFUSION_DATA`` it adds a real scene by `regression`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.large_scene import SyntheticScene
from fastfusion import fuse
from fastfusion.data import Cube, load_scene, read_cube, wald, write_cube
from fastfusion.evaluation import case_of
from fastfusion.models import LSO, CoFusion
from fastfusion.models.base import ResidualModel
from fastfusion.tiling import fuse_files

BANDS, MSI_BANDS, SCALE, ROWS, COLUMNS, TILE = 16, 4, 4, 248, 384, 128
MARGINS = (0, 16, 32, 48, 64)
DEPTHS = (1, 1, 2)


def network(kind: str, prior: str) -> ResidualModel:
    """With random weights, also where training would start at 0."""
    torch.manual_seed(0)
    shape = BANDS, MSI_BANDS, SCALE
    model = (
        LSO(*shape, prior=prior) if kind == "lso" else CoFusion(*shape, depths=DEPTHS, prior=prior)
    )
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def difference(pair: tuple[Tensor, Tensor], method: str, tile: int, **options: Any) -> float:
    """The greatest, between the files' result in tiles and the whole image's."""
    whole = {name: value for name, value in options.items() if name != "margin"}
    fuse_files("hsi.zarr", "msi.zarr", "out.zarr", method, tile=tile, **options)
    expected = fuse(*pair, method, **whole)
    return (torch.from_numpy(read_cube("out.zarr").data) - expected).abs().max().item()


def store(lr_hsi: Tensor, hr_msi: Tensor) -> None:
    """Where `difference` reads them."""
    write_cube("hsi.zarr", Cube(lr_hsi.numpy()))
    write_cube("msi.zarr", Cube(hr_msi.numpy()))


def main() -> None:
    scene = SyntheticScene(COLUMNS, BANDS, MSI_BANDS, SCALE)
    image = scene.radiance(slice(0, ROWS), slice(0, COLUMNS))
    pair = wald(image, scene.degradation, scene.srf)
    sensors = {"srf": scene.srf, "psf": scene.degradation}
    store(*pair)
    print("bicubic", difference(pair, "bicubic", TILE), flush=True)
    for kind in ("lso", "cofusion"):
        for prior in ("bicubic", "regression"):
            network(kind, prior).save("weights.safetensors")
            known = {**sensors, "weights": "weights.safetensors"}
            print(kind, prior, difference(pair, kind, TILE, **known), flush=True)
            if prior == "bicubic":
                for margin in MARGINS:
                    found = difference(pair, kind, TILE, margin=margin, **known)
                    print(kind, prior, "margin", margin, found, flush=True)
    if "FASTFUSION_DATA" in os.environ:
        case = case_of(load_scene("cave:sponges"), SCALE)
        store(case.lr_hsi, case.hr_msi)
        for known in ({"srf": case.srf, "psf": case.degradation}, {}):
            found = difference((case.lr_hsi, case.hr_msi), "regression", TILE, **known)
            print("regression", case.name, "known" if known else "estimated", found, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(Path(folder))
        main()
