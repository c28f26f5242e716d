"""Scenes by name: the built-in one and the real ones of a folder that is not part of the package.

The folder is named in ``FASTFUSION_DATA``; by default it is ``../shared/data``, seen from the
repository. Each scene has its own layout on disk; here they all become cubes with values in [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastfusion.data.cube import Cube
from fastfusion.data.demo import demo_scene
from fastfusion.data.files import read_cube
from fastfusion.data.formats.matlab import load_arrays
from fastfusion.data.formats.stored import reading
from fastfusion.ops import checks

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Scene:
    """What is known about a scene. Values of cubes are in [0, 1].

    Cubes of one scene that had to be brought there share one peak; it is in their metadata.

    Attributes:
        name: how it was asked for.
        terms: under which terms its data may be used.
        reference: hyperspectral image of high resolution, where there is one.
        lr_hsi, hr_msi: images that real sensors took.
        scale: how many times finer the pixels of ``hr_msi`` are than those of ``lr_hsi``; with a
            reference on the grid of ``hr_msi``, what to degrade it by.
        srf: spectral response ``(msi_bands, hsi_bands)``, where it is given with the scene.
        psf: point spread function, where it is given with the scene.
        endmembers, abundances: a published unmixing, ``(bands, materials)`` and
            ``(materials, rows, columns)``.
        note: what to know before trusting figures from it.
    """

    name: str
    terms: str
    reference: Cube | None = None
    lr_hsi: Cube | None = None
    hr_msi: Cube | None = None
    scale: int | None = None
    srf: np.ndarray | None = None
    psf: np.ndarray | None = None
    endmembers: np.ndarray | None = None
    abundances: np.ndarray | None = None
    note: str = ""


def load_scene(name: str | os.PathLike[str]) -> Scene:
    """Load a scene by its name, or a reference image from any file that `read_cube` reads.

    Args:
        name: ``demo`` (needs no file), ``cave:<scene>`` such as ``cave:sponges``,
            ``jasper_ridge``, ``samson``, ``paris_eo1``, ``paris_eo1_pan``, ``tg1``, ``pavia``, or
            a path.

    Returns:
        The scene; a cube with values above 1 (counts, say) is divided by its largest value.

    Raises:
        FileNotFoundError: the scene's files are not there; the message says where they were
            looked for.
        ValueError: no scene has that name, or its file is damaged or holds NaN.

    Example:
        >>> load_scene("demo").reference.shape
        (31, 256, 256)
    """
    name = str(checks.path("name", name))
    if name.startswith("cave:"):
        return _cave(name)
    if name in _LOADERS:
        return _LOADERS[name]()
    if not Path(name).exists() and not Path(name).suffix and os.sep not in name:
        raise ValueError(
            f"no scene is called {name!r}: name a file, or one of {', '.join(scene_names())}"
        )
    cube = read_cube(name)
    cube.check_finite(name)
    return Scene(name, "those of the file", reference=_to_unit_range(cube)[0])


def scene_names() -> list[str]:
    """Names that `load_scene` knows; which CAVE scenes depends on what is in the folder."""
    cave = _data_folder() / "cave"
    found = sorted(entry.name.removesuffix("_ms") for entry in cave.glob("*_ms"))
    return [*_LOADERS, *(f"cave:{scene}" for scene in found or ["<scene>"])]


def _data_folder() -> Path:
    return Path(os.environ.get("FASTFUSION_DATA") or REPOSITORY.parent / "shared" / "data")


def _file(*parts: str) -> Path:
    path = _data_folder().joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; name the folder of real scenes in FASTFUSION_DATA"
        )
    return path


def _arrays(path: Path, *names: str) -> list[np.ndarray]:
    arrays = reading(path, lambda: load_arrays(path, *names))
    return [arrays[name] for name in names]


def _to_unit_range(*cubes: Cube) -> tuple[Cube, ...]:
    """Divide cubes that belong together by their common peak, if any value is above 1."""
    peak = max(float(cube.data.max()) for cube in cubes)
    return tuple(cube.normalized(peak) for cube in cubes) if peak > 1 else cubes


def _image(rows_columns_bands: np.ndarray, wavelengths: np.ndarray | None = None) -> Cube:
    data = np.ascontiguousarray(np.moveaxis(rows_columns_bands, -1, 0), np.float32)
    metadata = {} if wavelengths is None else {"wavelengths": "nominal, not calibrated"}
    return Cube(data, wavelengths, metadata)


def _columns_to_image(columns: np.ndarray, side: int) -> np.ndarray:
    """``(n, pixels)``, pixels counted down the columns of the image, to ``(side, side, n)``."""
    return columns.T.reshape(side, side, -1, order="F")


# ------------------------------------------------------------------------------------------------
# One function a scene
# ------------------------------------------------------------------------------------------------


def _demo() -> Scene:
    return Scene("demo", "generated by this package; free", reference=demo_scene())


def _cave(name: str) -> Scene:
    scene = name.removeprefix("cave:")
    folder = _data_folder() / "cave"
    if folder.is_dir() and not (folder / f"{scene}_ms").is_dir():
        known = ", ".join(known for known in scene_names() if known.startswith("cave:"))
        raise ValueError(f"no scene is called {name!r}; {folder} holds {known}")
    (response,) = _arrays(_file("srf", "nikon_d700_P_N_V2.mat"), "P")
    return Scene(
        name,
        "research (Yasuma et al. 2010)",
        reference=read_cube(_file("cave", f"{scene}_ms")),
        srf=response,
        note="srf: Nikon D700, matrix P_N_V2, as in the papers on CAVE; the MSI is simulated",
    )


def _jasper_ridge() -> Scene:
    path = _file("jasper_ridge", "jasperRidge2_R198.mat")
    counts, abundances, endmembers, bands = _arrays(path, "Y", "A", "M", "SlectBands")
    wavelengths = np.linspace(380, 2500, 224)[bands.ravel().astype(int) - 1]  # AVIRIS
    (reference,) = _to_unit_range(_image(_columns_to_image(counts, 100), wavelengths))
    return Scene(
        "jasper_ridge",
        "AVIRIS data of NASA/JPL; reference unmixing by F. Zhu",
        reference=reference,
        endmembers=endmembers,
        abundances=np.moveaxis(_columns_to_image(abundances, 100), -1, 0),
        note="5367 * endmembers @ abundances approximates the counts to 16 %",
    )


def _samson() -> Scene:
    path = _file("samson", "samson_dataset.mat")
    values, abundances, endmembers = _arrays(path, "Y", "A", "M")
    wavelengths = np.linspace(401, 889, 156)
    (reference,) = _to_unit_range(_image(_columns_to_image(values, 95), wavelengths))
    return Scene(
        "samson",
        "unclear; internal use only",
        reference=reference,
        endmembers=endmembers,
        abundances=np.moveaxis(_columns_to_image(abundances, 95), -1, 0),
        note="each endmember is scaled to a largest value of 1: compare angles, not values",
    )


def _hyperion_wavelengths(path: Path) -> np.ndarray:
    (bands,) = _arrays(path, "non_del_bands")
    number = bands.ravel().astype(int)
    visible = 355.59 + 10.1733 * (number - 1)  # bands 1 to 70
    infrared = 912.45 + 10.0888 * (number - 77)  # bands 77 to 224
    return np.where(number <= 70, visible, infrared)


def _paris_eo1() -> Scene:
    path = _file("paris_eo1", "paris_data_hs_ms.mat")
    hyperion, ali = _arrays(path, "HSim", "MSim")
    (response,) = _arrays(_file("paris_eo1", "R_HysureParis.mat"), "R")
    centres = np.array([443, 482.5, 565, 660, 790, 867.5, 1250, 1650, 2215])
    reference, hr_msi = _to_unit_range(
        _image(hyperion, _hyperion_wavelengths(path)), _image(ali, centres)
    )
    return Scene(
        "paris_eo1",
        "public domain (EO-1: Hyperion and ALI)",
        reference=reference,
        hr_msi=hr_msi,
        scale=3,
        srf=response,
        note=(
            "two real sensors, on one 30 m grid; the rows of srf sum to 1.04 to 1.22, and "
            "srf @ reference is not the MSI: its correlation with it is 0.80 to 0.89 a band"
        ),
    )


def _paris_eo1_pan() -> Scene:
    path = _file("paris_eo1", "paris_data_hs_pan.mat")
    hyperion, panchromatic = _arrays(path, "HSim", "PCim")
    lr_hsi, hr_msi = _to_unit_range(
        _image(hyperion, _hyperion_wavelengths(path)), _image(panchromatic[..., np.newaxis])
    )
    return Scene(
        "paris_eo1_pan",
        "public domain (EO-1: Hyperion and ALI)",
        lr_hsi=lr_hsi,
        hr_msi=hr_msi,
        scale=3,
        note="two real sensors; no reference of high resolution exists",
    )


def _tg1() -> Scene:
    images = [_arrays(_file("tg1", f"{name}.mat"), name)[0] for name in ("lr_hsi", "hr_msi")]
    lr_hsi, hr_msi = _to_unit_range(*map(_image, images))
    (psf,) = _arrays(_file("tg1", "psf_gt.mat"), "psf_gt")
    (response,) = _arrays(_file("tg1", "srf_gt.mat"), "srf_gt")
    return Scene(
        "tg1",
        "unclear; internal use only",
        lr_hsi=lr_hsi,
        hr_msi=hr_msi,
        scale=12,
        srf=response.T.copy(),
        psf=psf,
        note="srf @ lr_hsi equals the psf-weighted 12x12 block means of hr_msi; no reference",
    )


def _pavia() -> Scene:
    (counts,) = _arrays(_file("pavia", "paviaU_subimg.mat"), "paviaU_subimg")
    (reference,) = _to_unit_range(_image(counts, np.linspace(430, 860, 103)))
    return Scene(
        "pavia",
        "unclear; internal use only",
        reference=reference,
        note="a 50x50 crop of Pavia University; say so beside every figure",
    )


_LOADERS: dict[str, Callable[[], Scene]] = {
    "demo": _demo,
    "jasper_ridge": _jasper_ridge,
    "samson": _samson,
    "paris_eo1": _paris_eo1,
    "paris_eo1_pan": _paris_eo1_pan,
    "tg1": _tg1,
    "pavia": _pavia,
}
