"""What a file holds, and the choices every array format has to make."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastfusion.data.cube import check_cube_array

#: Names under which lists of band centres are found beside a cube.
WAVELENGTH_NAMES = ("wavelengths", "wavelength", "wavelengths_nm", "wavelength_nm", "wl")
#: Metadata that tells how a file was read, and says nothing about a copy of it.
READING_KEYS = {"source", "format", "stored_dtype", "variable", "bands_axis", "divided_by"}

_Result = TypeVar("_Result")


@dataclass
class Stored:
    """A cube as its file holds it: axes in the file's order, not scaled, perhaps still on disk.

    ``divisor`` and ``offset`` are what the format's own convention says about the values:
    ``stored / divisor + offset`` is the quantity; ``ignore`` marks pixels without a measurement.
    """

    data: Any
    bands_axis: int = 0
    wavelengths: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    divisor: float | np.ndarray = 1.0
    offset: float | np.ndarray = 0.0
    ignore: float | None = None
    room: float = float("inf")  # bytes of values that the file can hold, for formats in pieces


def pick_variable(
    shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Any], variable: str | None
) -> str:
    """The array that is meant: the one asked for, or the only one with three axes."""
    listing = ", ".join(f"{name} {tuple(shape)} {types[name]}" for name, shape in shapes.items())
    if variable is not None:
        if variable not in shapes:
            raise ValueError(f"it has no array {variable!r}; it has: {listing or 'none'}")
        return variable
    cubes = [name for name, shape in shapes.items() if len(shape) == 3]
    if not cubes:
        raise ValueError(
            f"a cube has three axes, and no array in it has; it has: {listing or 'none'}"
        )
    if len(cubes) > 1:
        raise ValueError(f"it holds several cubes; say which with variable=: {listing}")
    return cubes[0]


def arrange(
    array: Any,
    bands_axis: int | None,
    *,
    convention: int,
    beside: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Stored:
    """Find the band axis of an array.

    The band axis is ``bands_axis`` where it is given; else the only axis as long as a list of
    wavelengths that lies ``beside`` the array; else the format's ``convention``. Where the image
    would be square with another axis and is not with that one, the shape speaks against the
    convention, and the caller has to decide. The axis taken is told in the metadata.
    """
    check_cube_array(array.shape, array.dtype, "the array")
    shape = tuple(array.shape)
    wavelengths = find_wavelengths(beside or {})
    listed = 0 if wavelengths is None else wavelengths.size
    if bands_axis is not None:
        if not -3 <= bands_axis <= 2:
            raise ValueError(f"bands_axis must be 0, 1 or 2 (or counted from -1), got {bands_axis}")
        axis = bands_axis % 3
    elif shape.count(listed) == 1:
        axis = shape.index(listed)
    else:
        axis = convention
        others = [length for other, length in enumerate(shape) if other != axis]
        if listed != shape[axis] in others and others[0] != others[1]:
            raise ValueError(
                f"which axis of {shape} holds the bands is not clear: by the convention of the "
                f"format it is axis {axis}, but with another one the image would be square; "
                f"say bands_axis={axis} or the other"
            )
    return Stored(
        array,
        axis,
        wavelengths if listed == shape[axis] else None,
        {**metadata, "bands_axis": axis},
    )


def find_wavelengths(candidates: Mapping[str, Any]) -> np.ndarray | None:
    """The list of band centres in nm among the arrays that lie beside a cube."""
    for name in WAVELENGTH_NAMES:
        if name in candidates:
            values = np.asarray(candidates[name])
            if values.dtype.kind in "uif" and values.size == max(values.shape, default=0) > 0:
                return to_nanometres(values.ravel(), unit=None)
    return None


def beside(
    shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Any], cube: tuple[int, ...]
) -> list[str]:
    """Names of the arrays of a file that may be the cube's list of band centres.

    One longer than every axis belongs to another cube, or is a lie that takes gigabytes to read.
    """
    return [
        name
        for name in WAVELENGTH_NAMES
        if name in shapes
        and np.dtype(types[name]).kind in "uif"
        and math.prod(shapes[name]) <= max(cube, default=0)
    ]


def to_nanometres(values: Any, unit: str | None) -> np.ndarray | None:
    """Band centres in nm, or None where they are not lengths or not usable.

    Without a known unit, values that are all below 100 are taken for micrometres: no optical
    sensor sees below 100 nm or beyond 100 um.
    """
    centres = np.asarray(values, np.float64)
    if not (np.isfinite(centres).all() and (centres > 0).all()):
        return None
    name = (unit or "unknown").strip().lower()
    if name in ("nanometers", "nanometres", "nanometer", "nanometre", "nm"):
        return centres
    if name in ("micrometers", "micrometres", "micrometer", "micrometre", "microns", "um", "µm"):
        return centres * 1000
    if name == "unknown":
        return centres * 1000 if centres.max() < 100 else centres
    return None


#: The most that the compressions of zarr and GeoTIFF make of a byte (Zstandard, of a constant).
LARGEST_COMPRESSION = 2**16
#: What is left out of such a file, because it is the fill value, may be so many bytes at least.
LEFT_OUT = 2**26


def check_bytes(shape: tuple[int, ...], dtype: np.dtype, available: float, name: str) -> None:
    """Refuse a header that promises more than the file can hold, before memory is taken for it."""
    promised = dtype.itemsize
    for length in shape:
        promised *= int(length)  # Python integers do not overflow
    if promised > available:
        raise ValueError(
            f"{name} is said to be {'x'.join(str(length) for length in shape)} {dtype}, "
            f"{promised} bytes, but the file can hold only {int(available)}: it is truncated, or "
            "its header is wrong"
        )


def reserve(path: Path, size: int) -> None:
    """Raise OSError now if the disk has no room for ``size`` bytes at ``path``.

    For libraries that do not survive a full disk: HDF5 kills the process when it cannot flush,
    and GDAL closes a file it could not finish in silence.
    """
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def reading(path: Path, action: Callable[[], _Result]) -> _Result:
    """Run a reader and turn whatever its libraries raise into one line that names the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"no permission to read {path}")
    try:
        return action()
    except ImportError:
        raise
    except MemoryError as error:
        raise ValueError(f"{path} needs more memory than there is; see open_cube") from error
    except FileNotFoundError as error:  # of a companion, such as an ENVI data file
        raise FileNotFoundError(f"cannot read {path}: {one_line(error)}") from error
    except OSError as error:
        # Parsers of damaged files raise it with no error number, or seek to nonsense places.
        if error.errno in (None, errno.EINVAL):
            raise ValueError(f"cannot read {path}: {one_line(error)}") from error
        raise OSError(error.errno, f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:
        if str(error).startswith(f"cannot read {path}: "):  # values that are read in pieces say so
            raise
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    except Exception as error:  # parsers of damaged files raise nearly anything
        damage = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"cannot read {path}: it is damaged, or not of this format ({damage})"
        ) from error


def one_line(error: Exception) -> str:
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split()) or type(error).__name__
