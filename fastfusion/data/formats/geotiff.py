"""GeoTIFF through rasterio, with its coordinate reference system and transform kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastfusion._optional import need
from fastfusion.data.cube import Cube
from fastfusion.data.formats.stored import (
    LARGEST_COMPRESSION,
    LEFT_OUT,
    Stored,
    reserve,
    to_nanometres,
)

#: Rows of a cube on the disk that are written at a time, and the side of a block in the file.
BLOCK = 128


def load(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    if variable is not None or bands_axis is not None:
        raise ValueError("a GeoTIFF says where the bands are; leave variable=, bands_axis= out")
    rasterio = need("rasterio", extra="io", purpose="reading GeoTIFF files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, driver="GTiff") as image:
            data = _Bands(path, (image.count, *image.shape), np.result_type(*image.dtypes))
            tags = [image.tags(band) for band in image.indexes]
            metadata = {
                "crs": image.crs.to_wkt() if image.crs else None,
                "transform": None if image.transform.is_identity else tuple(image.transform)[:6],
            }
            return Stored(
                data,
                wavelengths=_wavelengths(tags),
                metadata={key: value for key, value in metadata.items() if value is not None},
                divisor=1 / np.reshape(image.scales, (-1, 1, 1)),
                offset=np.reshape(image.offsets, (-1, 1, 1)),
                ignore=image.nodata,
                room=max(path.stat().st_size * LARGEST_COMPRESSION, LEFT_OUT),
            )


class _Bands:
    """The bands of a GeoTIFF ``(bands, rows, columns)``, read from the disk when sliced."""

    ndim = 3

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        """One band, or slices with a step of 1."""
        rasterio = need("rasterio", extra="io", purpose="reading GeoTIFF files")
        if not isinstance(key, tuple):
            key = (key,)
        band, *rest = key
        limits = [
            (part.indices(length)[0], max(part.indices(length)[:2]))
            for part, length in zip([*rest, *[slice(None)] * 2][:2], self.shape[1:], strict=True)
        ]
        indexes = np.arange(1, self.shape[0] + 1)[band].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # An open file serves one thread alone, so every reading opens its own.
            try:
                with rasterio.open(self.path, driver="GTiff") as image:
                    window = rasterio.windows.Window.from_slices(*limits)
                    return image.read(indexes, window=window, out_dtype=self.dtype)
            except (rasterio.errors.RasterioError, IndexError) as error:
                raise ValueError(f"cannot read {self.path}: its values are damaged") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


def save(path: Path, cube: Cube) -> None:
    rasterio = need("rasterio", extra="io", purpose="writing GeoTIFF files")
    dtype = np.dtype(np.float32 if cube.data.dtype == np.float16 else cube.data.dtype)
    bands, rows, columns = cube.shape
    place = {}
    if "crs" in cube.metadata:
        place["crs"] = rasterio.crs.CRS.from_wkt(cube.metadata["crs"])
    if "transform" in cube.metadata:
        place["transform"] = rasterio.Affine(*cube.metadata["transform"])
    layout = {}
    if _in_blocks(cube):
        layout = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    reserve(path, bands * rows * columns * dtype.itemsize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=bands,
            height=rows,
            width=columns,
            dtype=dtype.name,
            interleave="band",
            compress="deflate",
            bigtiff="if_safer",
            **layout,
            **place,
        ) as image:
            for indexes, window, values in _pieces(cube):
                limits = rasterio.windows.Window.from_slices(*window)
                image.write(np.asarray(values, dtype), indexes, window=limits)
            if cube.wavelengths is not None:
                for band, wavelength in enumerate(cube.wavelengths, start=1):
                    image.update_tags(
                        band, wavelength=f"{wavelength:.17g}", wavelength_units="Nanometers"
                    )
        with rasterio.open(path) as image:  # GDAL does not tell when closing a file fails
            for indexes, window, values in _pieces(cube):
                limits = rasterio.windows.Window.from_slices(*window)
                if not np.array_equal(image.read(indexes, window=limits), values, equal_nan=True):
                    raise OSError(
                        f"bands {indexes[0]} to {indexes[-1]} were not written as they are"
                    )


def _in_blocks(cube: Cube) -> bool:
    """Whether the cube lies on the disk, in blocks that hold all bands."""
    return not isinstance(cube.data, np.ndarray)


def _pieces(cube: Cube) -> Iterator[tuple[list[int], tuple[tuple[int, int], ...], Any]]:
    """Parts of the cube, one in memory at a time: bands from 1, limits of rows and columns."""
    bands, rows, columns = cube.shape
    if not _in_blocks(cube):
        for band in range(bands):
            yield [band + 1], ((0, rows), (0, columns)), cube.data[band][None]
        return
    indexes = list(range(1, bands + 1))
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, 8 * BLOCK):
            limits = (row, min(row + BLOCK, rows)), (column, min(column + 8 * BLOCK, columns))
            yield indexes, limits, np.asarray(cube.data[:, slice(*limits[0]), slice(*limits[1])])


def _wavelengths(tags: list[dict[str, str]]) -> np.ndarray | None:
    """Band centres in nm from the tags that GDAL carries over from ENVI headers."""
    try:
        values = [float(tag["wavelength"]) for tag in tags]
    except (KeyError, ValueError):
        return None
    return to_nanometres(values, tags[0].get("wavelength_units"))
