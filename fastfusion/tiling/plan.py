"""All that the bytes of a result depend on, checked and written down before the work begins."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastfusion._version import __version__
from fastfusion.data.formats import zarr_store
from fastfusion.data.sensors import Degradation
from fastfusion.data.windows import Windows
from fastfusion.fusing import Unavailable, scale_of
from fastfusion.models.cofusion import CoFusion
from fastfusion.models.lso import LSO
from fastfusion.ops import checks

#: Values of one tile, bands times pixels, where no side is asked for: 128 MB.
TILE_VALUES = 2**25
#: Memory of the process beside its tiles, in bytes.
BASE_MEMORY = 600 * 2**20
_METHODS = ("regression", "bicubic", "lso", "cofusion")
_REGRESSION_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "local": checks.flag,
    "ridge": checks.positive,
    "iterations": functools.partial(checks.integer, low=0),
    "window_sigma": lambda name, value: value is None or checks.positive(name, value),
}


def check_arguments(
    method: str,
    options: Mapping[str, Any],
    weights: Any,
    tile: int | None,
    margin: int | None,
    workers: int | None,
    memory: float,
) -> None:
    checks.of_type("method", method, str, "a method's name")
    if method == "fsrvl":
        raise Unavailable(
            "fsrvl does not go in tiles: its filters act on the spectrum of the whole image; take "
            "method regression, or crop the scene"
        )
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    if method in ("lso", "cofusion") and weights is None:
        raise Unavailable(
            f"method {method!r} needs trained weights in tiles: name a file as weights= (train it "
            "on a part of the scene)"
        )
    if method in ("regression", "bicubic") and weights is not None:
        raise ValueError(f"weights: {method} has none")
    unknown = options.keys() - (_REGRESSION_CHECKS.keys() if method == "regression" else set())
    if unknown:
        raise TypeError(f"{method} in tiles has no option {', '.join(sorted(unknown))}")
    for name, value, least in (("tile", tile, 1), ("margin", margin, 0), ("workers", workers, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    checks.positive("memory", memory)
    if weights is not None:
        checks.path("weights", weights)
    for name, check in _REGRESSION_CHECKS.items():
        if name in options:
            check(name, options[name])
    if margin is not None and method in ("regression", "bicubic"):
        raise ValueError(f"margin: is for networks; that of {method} is what its pixels depend on")


def make_plan(
    hsi: str | os.PathLike[str],
    msi: str | os.PathLike[str],
    out: Path,
    method: str,
    options: Mapping[str, Any],
    srf: Tensor | None,
    psf: Degradation | None,
    peak: float | None,
    tile: int | None,
    margin: int | None,
    weights: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    low, high = source_of(hsi), source_of(msi)
    scale = scale_of(low.shape, high.shape)
    if srf is not None:
        checks.response("srf", srf, (high.shape[0], low.shape[0]))
    if psf is not None:
        checks.of_type("psf", psf, Degradation, "a Degradation or None")
    if psf is not None and psf.scale != scale:
        raise ValueError(f"psf: expected a degradation by {scale}, got one by {psf.scale}")
    if peak is not None:
        checks.positive("peak", peak)
    network = None if weights is None else _network(method, weights, low, high, scale)
    reach, unit = support(network)
    unit = math.lcm(unit, scale)
    margin = -(-(reach if margin is None else margin) // unit) * unit
    if tile is None:
        values = TILE_VALUES if network is None else TILE_VALUES // 4
        tile = math.isqrt(values // low.shape[0])
        if math.lcm(unit, 64) <= tile:
            unit = math.lcm(unit, 64)  # whole chunks of a pleasant size
    side = max(1, round(tile / unit)) * unit
    chunk = max(n for n in range(1, min(side, zarr_store.CHUNK_SIDE) + 1) if side % n == 0)
    return {
        "hsi": _input(low),
        "msi": _input(high),
        "weights": None if weights is None else stamp(Path(weights)),
        "out": out.name,
        "shape": [low.shape[0], *high.shape[1:]],
        "msi_bands": high.shape[0],
        "scale": scale,
        "method": method,
        "options": dict(options),
        "srf": None if srf is None else srf.double().tolist(),
        "psf": None if psf is None else _psf_to_json(psf),
        "peak": peak,
        "tile": side,
        "margin": margin,
        "chunk": chunk if chunk >= 16 else side,
        "versions": [__version__, str(torch.__version__), np.__version__],
    }


def source_of(name: str | os.PathLike[str]) -> Windows:
    """The cube in ``FILE`` or ``FILE:VARIABLE``, left on the disk; errors as in `open_cube`."""
    path, variable = os.fspath(name), None
    if not Path(path).exists() and ":" in path:
        path, _, variable = path.rpartition(":")
    return Windows(os.path.realpath(path), variable)


def _input(image: Windows) -> dict[str, Any]:
    opened = {"path": str(image.path), "variable": image.variable}
    return {"open": opened, "stamp": stamp(image.path)}


def stamp(path: Path) -> list[Any]:
    """What changes when a file does: its place, size and time."""
    inner = path / "zarr.json" if (path / "zarr.json").exists() else path
    state = inner.stat()
    return [os.path.realpath(path), state.st_size, state.st_mtime_ns]


def _psf_to_json(psf: Degradation) -> dict[str, Any]:
    return {
        "psf": psf.psf.double().tolist(),
        "scale": psf.scale,
        "offset": psf.offset,
        "boundary": psf.boundary,
    }


def psf_from_json(psf: Mapping[str, Any]) -> Degradation:
    return Degradation(**{**psf, "psf": torch.tensor(psf["psf"], dtype=torch.float64)})


def _network(
    method: str, weights: str | os.PathLike[str], low: Windows, high: Windows, scale: int
) -> LSO | CoFusion:
    """The network in a file, checked to fit the pair."""
    network = load_network(method, weights)
    expected = (low.shape[0], high.shape[0], scale)
    if (network.hsi_bands, network.msi_bands, network.scale) != expected:
        raise ValueError(
            f"{weights}: expected a network for {expected[0]} and {expected[1]} bands and scale "
            f"{scale}, got one for {network.hsi_bands}, {network.msi_bands} and {network.scale}"
        )
    return network


def load_network(
    method: str, weights: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> LSO | CoFusion:
    if method == "lso":
        return LSO.load(weights, device=device)
    return CoFusion.load(weights, device=device)


def support(network: nn.Module | None) -> tuple[int, int]:
    """How many pixels around one the correction of a network depends on, and of what number of
    pixels tiles have to begin at a multiple (its levels, patches and Haar blocks)."""
    if isinstance(network, LSO):
        patch = 4 * network.patch_size
        guide = 2 + 2 * network.guide_blocks
        encoders, decoders = 2 + 2 * 2 + 2 * 4, (4 + 2 * 2) + (2 + 2)
        return guide + encoders + patch - 1 + decoders + 1, patch
    if isinstance(network, CoFusion):
        reach = 0
        strides = (1, 2, 4)
        down = [1]
        for depth, stride in zip(network.depths[1:], strides[1:], strict=True):
            down.append(down[-1] + (1 + 2 * depth) * stride)
        up = down[-1:]
        for depth, stride in zip(network.depths[-2::-1], strides[-2::-1], strict=True):
            up.insert(0, up[0] + 2 * stride + (1 + 2 * depth) * stride)
        spatial = {"spacam": 5, "residual": 2}[network.spatial]
        spectral = {"specam": 3, "residual": 2}[network.spectral]
        for level in (2, 1, 0):
            stride, depth = strides[level], network.depths[level]
            branches = [
                down[level] + stride * spatial * (depth if network.spatial == "spacam" else 1),
                up[level] + stride * spectral * (depth if network.spectral == "specam" else 1),
            ]
            own = max(branches) + 3 * stride
            reach = max(own, reach + 2 * stride + stride)  # doubled, then a 3x3 convolution
        return reach + 1, 8
    return 0, 1


def tile_bytes(plan: Mapping[str, Any]) -> int:
    """About what a tile takes while it is worked on."""
    bands, scale = plan["shape"][0], plan["scale"]
    side = plan["tile"] + 2 * plan["margin"]
    fused = 4 * bands * (side + 2 * 36 * scale) ** 2
    if plan["method"] in ("regression", "bicubic"):
        return 3 * fused
    channels = {"lso": 900, "cofusion": 1600}[plan["method"]]
    return 3 * fused + 4 * channels * side**2
