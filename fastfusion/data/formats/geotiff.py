"""GeoTIFF through rasterio, with its coordinate reference system and transform kept."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from fastfusion._optional import need
from fastfusion.data.cube import Cube
from fastfusion.data.formats.stored import Stored, reserve, to_nanometres


def load(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    if variable is not None or bands_axis is not None:
        raise ValueError("a GeoTIFF says where the bands are; leave variable=, bands_axis= out")
    rasterio = need("rasterio", extra="io", purpose="reading GeoTIFF files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, driver="GTiff") as image:
            data = image.read()
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
            )


def save(path: Path, cube: Cube) -> None:
    rasterio = need("rasterio", extra="io", purpose="writing GeoTIFF files")
    dtype = np.dtype(np.float32 if cube.data.dtype == np.float16 else cube.data.dtype)
    bands, rows, columns = cube.shape
    place = {}
    if "crs" in cube.metadata:
        place["crs"] = rasterio.crs.CRS.from_wkt(cube.metadata["crs"])
    if "transform" in cube.metadata:
        place["transform"] = rasterio.Affine(*cube.metadata["transform"])
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
            **place,
        ) as image:
            for band in range(bands):  # one band in memory at a time
                image.write(np.asarray(cube.data[band], dtype), band + 1)
                if cube.wavelengths is not None:
                    wavelength = f"{cube.wavelengths[band]:.17g}"
                    image.update_tags(
                        band + 1, wavelength=wavelength, wavelength_units="Nanometers"
                    )
        with rasterio.open(path) as image:  # GDAL does not tell when closing a file fails
            for band in range(bands):
                if not np.array_equal(image.read(band + 1), cube.data[band], equal_nan=True):
                    raise OSError(f"band {band} was not written as it is")


def _wavelengths(tags: list[dict[str, str]]) -> np.ndarray | None:
    """Band centres in nm from the tags that GDAL carries over from ENVI headers."""
    try:
        values = [float(tag["wavelength"]) for tag in tags]
    except (KeyError, ValueError):
        return None
    return to_nanometres(values, tags[0].get("wavelength_units"))
