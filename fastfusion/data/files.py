"""Cubes in files: one reader and one writer for every format, chosen by the name of the file.

========================  ==========================  ============================================
name                      band axis in the file       what else is kept
========================  ==========================  ============================================
``.mat`` (v5, v7.3)       last: rows, columns, bands  wavelengths, as a variable of that name
``.npy``                  first                       nothing
``.npz``                  first                       wavelengths, as an array of that name
``.hdr`` (ENVI)           told by the header          wavelengths, widths, other header fields
``.tif``, ``.tiff``       told by the file            wavelengths, reference system, transform
folder of ``.png``        a file a band               wavelengths (31 bands without any: CAVE's)
``.zarr``                 first                       wavelengths, all metadata that JSON can hold
========================  ==========================  ============================================
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastfusion._optional import need
from fastfusion.data.atomic import atomic_path, check_place
from fastfusion.data.cube import Cube, check_cube_array
from fastfusion.data.formats import envi, geotiff, matlab, numpy_files, png_bands, zarr_store
from fastfusion.data.formats.stored import Stored, check_bytes, one_line, reading
from fastfusion.ops import checks


@dataclass(frozen=True)
class _Format:
    name: str
    load: Callable[[Path, str | None, int | None], Stored]
    save: Callable[[Path, Cube], None]
    check: Callable[[Cube], None] | None = None
    in_pieces: bool = False  # load leaves the values on the disk
    library: str | None = None  # that it cannot be written without
    is_earlier_output: Callable[[Path], bool] | None = None  # for formats that are folders

    @property
    def place(self) -> dict[str, Any]:
        """What kind of output it is, in the words of `atomic_path`."""
        folder = self.is_earlier_output is not None
        return {"folder": folder, "may_replace": self.is_earlier_output}


_PNG_BANDS = _Format(
    "a folder of band PNGs",
    png_bands.load,
    png_bands.save,
    png_bands.check,
    library="PIL",
    is_earlier_output=png_bands.is_band_folder,
)
_ZARR = _Format(
    "a zarr store",
    zarr_store.load,
    zarr_store.save,
    in_pieces=True,
    library="zarr",
    is_earlier_output=zarr_store.is_zarr,
)
_GEOTIFF = _Format("GeoTIFF", geotiff.load, geotiff.save, in_pieces=True, library="rasterio")
_BY_SUFFIX = {
    ".mat": _Format("a MATLAB file", matlab.load, matlab.save),
    ".npy": _Format("a NumPy array", numpy_files.load_npy, numpy_files.save_npy, in_pieces=True),
    ".npz": _Format("NumPy arrays", numpy_files.load_npz, numpy_files.save_npz),
    ".hdr": _Format("ENVI", envi.load, envi.save, in_pieces=True, library="spectral"),
    ".tif": _GEOTIFF,
    ".tiff": _GEOTIFF,
    ".zarr": _ZARR,
}
_KNOWN = ", ".join(_BY_SUFFIX) + ", a folder of .png"


def read_cube(
    path: str | os.PathLike[str],
    *,
    variable: str | None = None,
    bands_axis: int | None = None,
    dtype: str | np.dtype | None = "float32",
    scale: float | Literal["auto"] | None = "auto",
) -> Cube:
    """Read a cube from a file, or from a folder of PNGs, into memory.

    Args:
        path: the file; its suffix names the format (see the table of this module). For ENVI the
            header; the data file lies beside it.
        variable: which array of a .mat, .npz or zarr group; needed when several have three axes.
        bands_axis: which axis of a .mat, .npy, .npz or zarr array holds the bands. By default the
            only one as long as the wavelengths beside it, else the one of the format's convention;
            an error where another axis would make the image square and that one does not.
        dtype: a floating type for the result, or None for the values just as they are stored.
        scale: what stored values are divided by. None: nothing, whatever their type. "auto": what
            the file says, and nothing where it says nothing: the largest value of the type for
            PNG, the reflectance scale factor of an ENVI header, scale and offset of a GeoTIFF.
            `Cube.normalized` brings other counts into [0, 1].

    Returns:
        The cube, bands first. Pixels that an ENVI header or a GeoTIFF marks as missing are NaN
        (`Cube.check_finite` tells); metadata says what was read and how (``source``, ``format``,
        ``stored_dtype``, and where it applies ``variable``, ``bands_axis``).

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: the file is truncated, damaged, not of its format, or holds no cube of real
            numbers; an option does not fit.
        OSError: the file system's own errors.
        ImportError: the format needs a library that is not installed; the message names it.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "scene.npy")
        >>> write_cube(path, Cube(np.ones((4, 8, 9), np.float32)))
        >>> cube = read_cube(path)
        >>> cube.shape, cube.metadata["bands_axis"]
        ((4, 8, 9), 0)
    """
    if dtype is not None:
        try:
            dtype = np.dtype(dtype)
        except TypeError as error:
            raise TypeError(f"dtype must be a floating type or None, got {dtype!r}") from error
        if dtype.kind != "f":
            raise ValueError(f"dtype must be a floating type or None, got {dtype}")
    _check_scale(scale)
    if dtype is None and scale not in ("auto", None):
        raise ValueError("scale= needs a floating dtype=; dtype=None keeps values as stored")
    _check_selection(variable, bands_axis)
    path = checks.path("path", path)
    return reading(path, lambda: _in_memory(path, variable, bands_axis, dtype, scale))


def open_cube(
    path: str | os.PathLike[str], *, variable: str | None = None, bands_axis: int | None = None
) -> Cube:
    """Open a cube without reading it: slices of its data are read from the disk when taken.

    For .npy, ENVI, GeoTIFF and zarr (bands first), whose scenes may be larger than memory. The
    values are as stored, of the stored type, not scaled; `write_cube` copies such a cube piece by
    piece.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: as `read_cube`; ValueError also for a
            format that has to be read as a whole.
    """
    _check_selection(variable, bands_axis)
    path = checks.path("path", path)
    return reading(path, lambda: _on_disk(path, variable, bands_axis))


def write_cube(path: str | os.PathLike[str], cube: Cube) -> None:
    """Write a cube, complete or not at all.

    Args:
        path: the file to make, over an earlier one; its suffix names the format (see the table of
            this module), and a name without a suffix makes a folder of PNGs. An earlier folder is
            replaced only if it holds such an output.
        cube: values are written in their own type, except that .mat, ENVI and GeoTIFF take float32
            for float16, and PNG takes 8- and 16-bit counts as they are and floats in [0, 1] as
            16-bit counts of 1/65535.

    Raises:
        TypeError: ``cube`` is not a `Cube`.
        ValueError: the suffix is not known, or the format cannot hold the values.
        FileNotFoundError, FileExistsError, OSError: ``path`` cannot be written (no such folder,
            no permission, no space left); nothing is left there.
        ImportError: the format needs a library that is not installed; the message names it.
    """
    if not isinstance(cube, Cube):
        raise TypeError(f"cube must be a fastfusion.data.Cube, got {type(cube).__name__}")
    path = checks.path("path", path)
    file_format = _format_to_write(path)
    if file_format.check:
        file_format.check(cube)
    with atomic_path(path, **file_format.place) as temporary:
        try:
            file_format.save(temporary, cube)
        except ImportError:
            raise
        except OSError as error:
            message = f"cannot write {path}: {one_line(error)}"
            if error.errno is None:  # some libraries lose it
                raise OSError(errno.EIO, f"{message} (is the disk full?)") from error
            raise OSError(error.errno, message) from error
        except Exception as error:  # the libraries raise nearly anything
            raise ValueError(f"cannot write {path}: {one_line(error)}") from error


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise now what `write_cube` would raise for the path alone, before the work for it is done.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError, ImportError: as
            `write_cube`.
    """
    path = checks.path("path", path)
    file_format = _format_to_write(path)
    check_place(path, **file_format.place)
    if file_format.library:
        need(file_format.library, extra="io", purpose=f"writing {file_format.name}")


def _format_to_write(path: Path) -> _Format:
    suffix = path.suffix.lower()
    if suffix and suffix not in _BY_SUFFIX:
        raise ValueError(f"cannot write {path}: {suffix!r} is not one of {_KNOWN} (no suffix)")
    return _BY_SUFFIX[suffix] if suffix else _PNG_BANDS


def _format_of_existing(path: Path) -> _Format:
    if path.is_dir():
        return _ZARR if zarr_store.is_zarr(path) or path.suffix == ".zarr" else _PNG_BANDS
    if path.suffix.lower() not in _BY_SUFFIX:
        raise ValueError(f"{path.suffix!r} is not one of {_KNOWN}")
    return _BY_SUFFIX[path.suffix.lower()]


def _check_scale(scale: float | Literal["auto"] | None) -> None:
    if scale is None or (isinstance(scale, str) and scale == "auto"):
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, 'auto' or None, got {scale!r}")
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _check_selection(variable: str | None, bands_axis: int | None) -> None:
    if variable is not None and not isinstance(variable, str):
        raise TypeError(f"variable must be a name or None, got {type(variable).__name__}")
    if bands_axis is not None:
        checks.integer("bands_axis", bands_axis, low=-3, high=2)


def open_stored(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    """What `open_cube` opens, with what the file says about its values; errors as there."""
    return reading(path, lambda: _stored_on_disk(path, variable, bands_axis))


def _stored_on_disk(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    file_format = _format_of_existing(path)
    if not file_format.in_pieces:
        raise ValueError(f"{file_format.name} is read as a whole: use read_cube, or make it .zarr")
    return file_format.load(path, variable, bands_axis)


def _on_disk(path: Path, variable: str | None, bands_axis: int | None) -> Cube:
    stored = _stored_on_disk(path, variable, bands_axis)
    data = stored.data
    if stored.bands_axis != 0:
        if not isinstance(data, np.ndarray):
            raise ValueError("bands must come first to be read in pieces; use read_cube")
        data = np.moveaxis(data, stored.bands_axis, 0)  # a view of the mapped file
    return Cube(data, stored.wavelengths, _metadata(path, stored))


def _in_memory(
    path: Path,
    variable: str | None,
    bands_axis: int | None,
    dtype: np.dtype | None,
    scale: float | Literal["auto"] | None,
) -> Cube:
    """The cube in memory, with values of the type and scale that are asked for."""
    stored = _format_of_existing(path).load(path, variable, bands_axis)
    check_cube_array(stored.data.shape, stored.data.dtype, "the image")
    check_bytes(stored.data.shape, stored.data.dtype, stored.room, "the image")
    metadata = _metadata(path, stored)
    raw = np.moveaxis(np.asarray(stored.data), stored.bands_axis, 0)
    if dtype is None:
        values = np.array(raw, raw.dtype.newbyteorder("="), order="C")
        return Cube(values, stored.wavelengths, metadata)
    with np.errstate(over="ignore"):  # beyond the range of float32 becomes infinite
        values = raw.astype(dtype, order="C")
    divisor, offset = (stored.divisor, stored.offset) if scale == "auto" else (scale or 1.0, 0.0)
    if not (np.isfinite(divisor).all() and np.not_equal(divisor, 0).all()):
        raise ValueError(f"its scale factor is {divisor}; say scale=None to read counts")
    if np.not_equal(divisor, 1).any():
        values /= divisor
        if np.ndim(divisor) == 0:
            metadata["divided_by"] = divisor
    if np.not_equal(offset, 0).any():
        values += offset
    if stored.ignore is not None:
        values[raw == stored.ignore] = np.nan
    return Cube(values, stored.wavelengths, metadata)


def _metadata(path: Path, stored: Stored) -> dict[str, Any]:
    return {
        **stored.metadata,
        "source": str(path),
        "format": _format_of_existing(path).name,
        "stored_dtype": str(stored.data.dtype),
    }
