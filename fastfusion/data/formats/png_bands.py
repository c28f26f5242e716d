"""A folder with one grey PNG a band, as the CAVE scenes come; values are read as [0, 1]."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fastfusion._optional import need
from fastfusion.data.cube import Cube
from fastfusion.data.formats.stored import Stored, check_bytes

#: Deflate cannot do better; a band that claims more is damaged or made to exhaust memory.
LARGEST_COMPRESSION = 1032
CAVE_BANDS = 31
CAVE_WAVELENGTHS = np.linspace(400, 700, CAVE_BANDS)
#: Name of the text chunk that keeps a band's centre, in nm.
WAVELENGTH_KEY = "wavelength_nm"


def load(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    if variable is not None or bands_axis is not None:
        raise ValueError("a folder of PNGs has a file a band; leave variable=, bands_axis= out")
    image_module = need("PIL.Image", extra="io", purpose="reading PNG files")
    bands, wavelengths = [], []
    for file in _files_by_number(path):
        with image_module.open(file, formats=["PNG"]) as image:
            if image.mode not in ("L", "I;16"):
                raise ValueError(
                    f"{file.name} is {image.mode}, not grey with 8 or 16 bits: one file a band "
                    "is expected"
                )
            kind = np.dtype(np.uint8 if image.mode == "L" else np.uint16)
            room = file.stat().st_size * LARGEST_COMPRESSION
            check_bytes((image.height, image.width), kind, room, file.name)
            bands.append(np.array(image))
            wavelengths.append(float(image.text.get(WAVELENGTH_KEY, "nan")))
        if (bands[-1].shape, bands[-1].dtype) != (bands[0].shape, bands[0].dtype):
            raise ValueError(
                f"{file.name} is {bands[-1].shape} {bands[-1].dtype}, "
                f"but the first band is {bands[0].shape} {bands[0].dtype}"
            )
    data = np.stack(bands)
    centres: np.ndarray | None = np.array(wavelengths)
    if np.isnan(wavelengths).any():
        centres = CAVE_WAVELENGTHS if len(bands) == CAVE_BANDS else None
    return Stored(data, wavelengths=centres, divisor=float(np.iinfo(data.dtype).max))


def check(cube: Cube) -> None:
    """Raise ValueError if the values do not fit: 8- and 16-bit counts, or floats in [0, 1]."""
    if cube.data.dtype.kind == "f":
        for band in range(cube.bands):
            low, high = cube.data[band].min(), cube.data[band].max()
            if not (low >= 0 and high <= 1):  # NaN fails too
                raise ValueError(
                    f"PNG holds values in [0, 1], band {band} has {low:.6g} to {high:.6g}; "
                    "clip it or use Cube.normalized"
                )
    elif cube.data.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"PNG holds uint8, uint16 or floats in [0, 1], got {cube.data.dtype}; "
            "use Cube.normalized"
        )


def save(path: Path, cube: Cube) -> None:
    """Fill the empty folder ``path``: floats become 16-bit counts of 1/65535."""
    image_module = need("PIL.Image", extra="io", purpose="writing PNG files")
    info_module = need("PIL.PngImagePlugin", extra="io", purpose="writing PNG files")
    digits = max(2, len(str(cube.bands)))
    for band in range(cube.bands):
        values = np.asarray(cube.data[band])
        if values.dtype.kind == "f":
            values = np.rint(values.astype(np.float64) * 65535).astype(np.uint16)
        info = info_module.PngInfo()
        if cube.wavelengths is not None:
            info.add_text(WAVELENGTH_KEY, f"{cube.wavelengths[band]:.17g}")
        file = path / f"{path.name}_{band + 1:0{digits}d}.png"
        image_module.fromarray(values).save(file, format="PNG", pnginfo=info)


def is_band_folder(path: Path) -> bool:
    """Whether a folder holds PNGs alone, so that a new output may take its place."""
    return all(entry.suffix.lower() == ".png" and entry.is_file() for entry in path.iterdir())


def _files_by_number(folder: Path) -> list[Path]:
    """The PNGs in the order of the last number in their names, none missing."""
    files = [entry for entry in folder.iterdir() if entry.suffix.lower() == ".png"]
    if not files:
        inner = folder / folder.name  # as the published archives unpack
        if inner.is_dir():
            return _files_by_number(inner)
        raise ValueError("the folder holds no .png file (one a band is expected)")
    numbered: dict[int, Path] = {}
    for file in files:
        numbers = re.findall(r"\d+", file.stem)
        if not numbers:
            raise ValueError(f"{file.name} has no band number in its name; move it elsewhere")
        number = int(numbers[-1])
        if number in numbered:
            raise ValueError(f"{numbered[number].name} and {file.name} are both band {number}")
        numbered[number] = file
    missing = sorted(set(range(min(numbered), max(numbered))) - set(numbered))
    if missing:
        raise ValueError(f"band {missing[0]} is missing")
    return [numbered[number] for number in sorted(numbered)]
