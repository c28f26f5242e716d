"""Zarr (a folder of compressed chunks) for scenes larger than memory; bands first."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastfusion._optional import need
from fastfusion.data.cube import Cube
from fastfusion.data.formats.stored import (
    LARGEST_COMPRESSION,
    LEFT_OUT,
    READING_KEYS,
    Stored,
    arrange,
    beside,
    check_bytes,
    pick_variable,
    reading,
)

#: Pixels along a chunk's side: 2 MB for 31 float32 bands, so that a tile of a scene touches little.
CHUNK_SIDE = 128
#: Marks stores in which a chunk that is not there is a loss, not a chunk of fill values.
COMPLETE = "every_chunk_stored"


def load(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    zarr = need("zarr", extra="io", purpose="reading zarr stores")
    if not is_zarr(path):
        raise ValueError("it is not a zarr store: a folder with a zarr.json")
    array = zarr.open(path, mode="r")
    attributes = dict(array.attrs)
    if isinstance(array, zarr.Group):
        arrays = dict(array.arrays())
        shapes = {name: item.shape for name, item in arrays.items()}
        types = {name: item.dtype for name, item in arrays.items()}
        variable = pick_variable(shapes, types, variable)
        array = arrays[variable]
        for name in beside(shapes, types, array.shape):
            check_bytes(shapes[name], types[name], _room(arrays[name]), name)
            attributes[name] = _decodable(arrays[name])[...]
        attributes.update(array.attrs)
    elif variable is not None:
        raise ValueError("the store is a single array; leave variable= out")
    if array.attrs.get(COMPLETE) and array.nchunks_initialized < array.nchunks:
        raise ValueError(
            f"only {array.nchunks_initialized} of its {array.nchunks} chunks are there: "
            "copy it anew"
        )
    metadata = {"variable": variable} if variable else {}
    values = _Values(path, _decodable(array))
    check_bytes(array.chunks, array.dtype, _room(array), "a chunk")
    stored = arrange(values, bands_axis, convention=0, beside=attributes, **metadata)
    stored.room = _room(array)
    stored.metadata = {**attributes.get("metadata", {}), **stored.metadata}
    return stored


class _Values:
    """An array in a store, read when sliced; an error names the store."""

    def __init__(self, path: Path, array: Any) -> None:
        self.path, self.array = path, array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, int) and not -self.shape[0] <= key < self.shape[0]:
            raise IndexError(f"{key} is not one of {self.shape[0]}")  # ends a loop over the values
        return reading(self.path, lambda: self.array[key])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(self.dtype if dtype is None else dtype, copy=False)


def _room(array: Any) -> int:
    """Bytes of values that the chunks which are there can hold, or that may be left out."""
    return max(array.nbytes_stored() * LARGEST_COMPRESSION, LEFT_OUT)


def _decodable(array: Any) -> Any:
    """The array, unless to read its chunks would be to run what they say.

    Format 2 names its codecs among numcodecs', one of which unpickles; whether that one refuses
    depends on the version.
    """
    of_format_2 = array.metadata.zarr_format == 2
    codecs = [array.metadata.compressor, *(array.metadata.filters or ())] if of_format_2 else []
    for codec in codecs:
        if getattr(codec, "codec_id", None) == "pickle":
            raise ValueError("its chunks are pickles, which are never read")
    return array


def save(path: Path, cube: Cube) -> None:
    """Fill the empty folder ``path``, a chunk in memory at a time.

    zarr writes in threads of its own, and leaves them running when Ctrl-C comes between or another
    chunk fails. So it is given one chunk at a time, from a thread that Ctrl-C does not reach and
    that is waited for: when this function is left, nobody writes any more.
    """
    rows, columns = cube.shape[1:]

    def make() -> Any:
        kind = cube.data.dtype.newbyteorder("=")
        return create(path, cube.shape, CHUNK_SIDE, cube.wavelengths, cube.metadata, kind)

    def write(array: Any, row: int, column: int) -> None:
        chunk = slice(None), slice(row, row + CHUNK_SIDE), slice(column, column + CHUNK_SIDE)
        array[chunk] = np.asarray(cube.data[chunk])

    with ThreadPoolExecutor(max_workers=1) as writer:
        array = writer.submit(make).result()
        for row in range(0, rows, CHUNK_SIDE):
            for column in range(0, columns, CHUNK_SIDE):
                writer.submit(write, array, row, column).result()


def create(
    path: Path,
    shape: tuple[int, int, int],
    chunk: int,
    wavelengths: np.ndarray | None,
    metadata: dict[str, Any],
    dtype: Any = np.float32,
) -> Any:
    """An array whose chunks, of ``chunk`` pixels a side and all bands, are still to be written."""
    zarr = need("zarr", extra="io", purpose="writing zarr stores")
    bands, rows, columns = shape
    attributes: dict[str, Any] = {COMPLETE: True, "metadata": _as_json(metadata)}
    if wavelengths is not None:
        attributes["wavelengths"] = wavelengths.tolist()
    return zarr.create_array(
        path,
        shape=shape,
        dtype=dtype,
        chunks=(bands, min(rows, chunk), min(columns, chunk)),
        dimension_names=("band", "row", "column"),
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store, of format 3 or 2."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def _as_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """The entries that JSON can hold, without those that tell how another file was read."""
    kept = {}
    for key, value in metadata.items():
        if key in READING_KEYS:
            continue
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept
