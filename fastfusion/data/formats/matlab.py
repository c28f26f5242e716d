"""MATLAB's .mat, v5 (and v4) through scipy and v7.3 through h5py: rows, columns, bands.

A v7.3 file is HDF5, and HDF5 lists the axes of MATLAB's column-major arrays in reverse: what MATLAB
calls (rows, columns, bands) is (bands, columns, rows) there. Axes are counted in MATLAB's order
here, whatever the version.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastfusion._optional import need
from fastfusion.data.cube import Cube
from fastfusion.data.formats.matlab_elements import check_elements
from fastfusion.data.formats.stored import (
    Stored,
    arrange,
    beside,
    check_bytes,
    pick_variable,
    reserve,
)

BANDS_LAST = 2
#: MATLAB holds no larger variable in v5; from here on v7.3 is written.
LARGEST_V5_BYTES = 2**31 - 1
#: Deflate cannot do better; a variable that claims more is damaged or made to exhaust memory.
LARGEST_COMPRESSION = 1032
USER_BLOCK = 512  # bytes before the HDF5 content of a v7.3 file, for MATLAB's own header
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
CLASS_OF_TYPE = {"float32": "single", "float64": "double"}  # integers are called alike
NUMERIC_CLASSES = {"single", "double"} | {f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}


def load(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    return (_load_v73 if _is_hdf5(path) else _load_v5)(path, variable, bands_axis)


def save(path: Path, cube: Cube) -> None:
    dtype = np.promote_types(cube.data.dtype, np.float32 if cube.data.dtype.kind == "f" else "u1")
    if np.prod(cube.shape) * dtype.itemsize > LARGEST_V5_BYTES:
        _save_v73(path, cube, dtype)
    else:
        _save_v5(path, cube, dtype)


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Named arrays of a v5 file as they are, for scenes with a layout of their own."""
    import scipy.io

    check_elements(path)
    with path.open("rb") as file:
        contents = scipy.io.loadmat(file, variable_names=names)
    missing = [name for name in names if name not in contents]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}")
    return {name: contents[name] for name in names}


def load_first(path: Path, names: Sequence[str]) -> np.ndarray:
    """The first of some numeric arrays that a v5 file holds."""
    import scipy.io

    complex_arrays = check_elements(path)
    with path.open("rb") as file:
        found = {
            name: shape
            for name, shape, kind in scipy.io.whosmat(file)
            if kind in NUMERIC_CLASSES and name not in complex_arrays
        }
        name = next((name for name in names if name in found), None)
        if name is None:
            raise ValueError(
                f"expected a variable {', '.join(names[:-1])} or {names[-1]}, "
                f"got {', '.join(found) or 'none'}"
            )
        room = path.stat().st_size * LARGEST_COMPRESSION
        check_bytes(found[name], np.dtype(np.uint8), room, name)
        file.seek(0)
        return scipy.io.loadmat(file, variable_names=[name])[name]


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        for offset in (USER_BLOCK, 0):  # as MATLAB writes it, as a bare HDF5 library does
            file.seek(offset)
            if file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
                return True
    return False


def _load_v5(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    import scipy.io

    complex_arrays = check_elements(path)
    shapes, types = {}, {}
    with path.open("rb") as file:
        for name, shape, kind in scipy.io.whosmat(file):
            if kind in NUMERIC_CLASSES:
                shapes[name], types[name] = shape, kind
        name = pick_variable(shapes, types, variable)
        if name in complex_arrays:
            raise ValueError(f"{name!r} is complex128: a cube has real values")
        # A double may be stored in one byte where its values allow.
        room = path.stat().st_size * LARGEST_COMPRESSION
        check_bytes(shapes[name], np.dtype(np.uint8), room, name)
        lists = [key for key in beside(shapes, types, shapes[name]) if key not in complex_arrays]
        file.seek(0)
        arrays = scipy.io.loadmat(file, variable_names=[name, *lists])
    return arrange(
        arrays[name],
        bands_axis,
        convention=BANDS_LAST,
        beside={key: arrays[key] for key in lists},
        variable=name,
    )


def _save_v5(path: Path, cube: Cube, dtype: np.dtype) -> None:
    import scipy.io

    arrays: dict[str, Any] = {"data": np.moveaxis(np.asarray(cube.data, dtype), 0, BANDS_LAST)}
    if cube.wavelengths is not None:
        arrays["wavelengths"] = cube.wavelengths
    with path.open("wb") as file:
        scipy.io.savemat(file, arrays)


def _load_v73(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    h5py = need("h5py", extra="io", purpose="reading MATLAB v7.3 files")
    with h5py.File(path, "r") as file:
        arrays = {
            name: item
            for name in file
            # A link, or values that lie elsewhere, would read another file in this one's name.
            if isinstance(file.get(name, getlink=True), h5py.HardLink)
            and isinstance(item := file[name], h5py.Dataset)
            and not item.external
            and not item.is_virtual
            and item.dtype.kind in "uif"
            and item.attrs.get("MATLAB_class") != b"char"
        }
        shapes = {name: array.shape[::-1] for name, array in arrays.items()}
        types = {name: array.dtype for name, array in arrays.items()}
        name = pick_variable(shapes, types, variable)
        array = arrays[name]
        room = array.id.get_storage_size() * (LARGEST_COMPRESSION if array.chunks else 1)
        check_bytes(array.shape, array.dtype, room, name)
        return arrange(
            array[()].T,
            bands_axis,
            convention=BANDS_LAST,
            beside={key: arrays[key][()] for key in beside(shapes, types, array.shape)},
            variable=name,
        )


def _save_v73(path: Path, cube: Cube, dtype: np.dtype) -> None:
    h5py = need("h5py", extra="io", purpose="writing MATLAB v7.3 files")
    bands, rows, columns = cube.shape
    reserve(path, bands * rows * columns * dtype.itemsize)
    with h5py.File(path, "w", userblock_size=USER_BLOCK) as file:
        data = file.create_dataset("data", (bands, columns, rows), dtype)
        for band in range(bands):  # one band in memory at a time
            data[band] = cube.data[band].T
        if cube.wavelengths is not None:
            file["wavelengths"] = cube.wavelengths[:, np.newaxis]
        for dataset in file.values():
            name = dataset.dtype.name
            dataset.attrs["MATLAB_class"] = np.bytes_(CLASS_OF_TYPE.get(name, name))
    with path.open("r+b") as header:
        header.write(b"MATLAB 7.3 MAT-file, HDF5 schema 1.00 .".ljust(116))
        header.write(bytes(8) + b"\x00\x02IM")  # no subsystem data; version 2.0; little endian
