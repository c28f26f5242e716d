"""NumPy's .npy and .npz: bands first by this package's convention; nothing is unpickled."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import numpy as np

from fastfusion.data.cube import Cube
from fastfusion.data.formats.stored import (
    Stored,
    arrange,
    beside,
    check_bytes,
    pick_variable,
)

#: Deflate cannot do better; a member that claims more is damaged or made to exhaust memory.
LARGEST_COMPRESSION = 1032

#: Held while heads of files are parsed, which NumPy leaves to Python's parser: that of Python 3.11
#: counts one depth of recursion for all threads, and two at once end, rarely, in a SystemError.
PARSING = threading.RLock()


def load_npy(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    if variable is not None:
        raise ValueError("a .npy file holds one array; leave variable= out")
    with PARSING:
        array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles, compares the size
    return arrange(array, bands_axis, convention=0)


def load_array(path: Path) -> np.ndarray:
    """An array of any shape; ValueError where the file does not hold what its header says."""
    with PARSING:
        array = np.lib.format.open_memmap(path, mode="r")
    return np.array(array)


def save_npy(path: Path, cube: Cube) -> None:
    with path.open("wb") as file:
        np.save(file, np.asarray(cube.data), allow_pickle=False)


def load_npz(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    with PARSING, zipfile.ZipFile(path) as archive:
        shapes, types = {}, {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            shape, dtype = _read_header(archive, info)
            if dtype.hasobject:
                continue  # a pickle; never opened
            room = min(info.file_size, info.compress_size * LARGEST_COMPRESSION)
            check_bytes(shape, dtype, room, name)
            shapes[name], types[name] = shape, dtype
    name = pick_variable(shapes, types, variable)
    with PARSING, np.load(path, allow_pickle=False) as arrays:
        lists = {key: arrays[key] for key in beside(shapes, types, shapes[name])}
        return arrange(arrays[name], bands_axis, convention=0, beside=lists, variable=name)


def save_npz(path: Path, cube: Cube) -> None:
    data = np.asarray(cube.data)
    with path.open("wb") as file:
        if cube.wavelengths is None:
            np.savez(file, data=data)
        else:
            np.savez(file, data=data, wavelengths=cube.wavelengths)


def _read_header(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(member)
    return shape, dtype
