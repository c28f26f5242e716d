"""ENVI: a text header (.hdr) beside raw values, in any interleave; a reader needs no copy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fastfusion._optional import need
from fastfusion.data.cube import Cube
from fastfusion.data.formats.stored import Stored, check_bytes, to_nanometres

#: What describes the raw values themselves; the rest of a header travels with the cube.
LAYOUT_FIELDS = {
    *("lines", "samples", "bands", "data type", "interleave", "byte order", "header offset"),
    *("file type", "wavelength", "wavelength units", "fwhm"),
    *("reflectance scale factor", "data ignore value"),
}
#: Order in which bands (0), lines (1) and samples (2) are stored.
AXES = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (1, 2, 0)}


def load(path: Path, variable: str | None, bands_axis: int | None) -> Stored:
    if variable is not None or bands_axis is not None:
        raise ValueError(
            "an ENVI header says where the bands are; leave variable=, bands_axis= out"
        )
    envi = need("spectral.io.envi", extra="io", purpose="reading ENVI files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about field names in capitals
        header = envi.read_envi_header(path)
        envi.check_compatibility(header)
        if "spectral library" in str(header.get("file type", "")).lower():
            raise ValueError("it is a spectral library, not an image")
        if "file compression" in header and int(header["file compression"]):
            raise ValueError("its data are compressed, which is not supported; uncompress them")
        layout = envi.gen_params(header)
    interleave = header["interleave"].lower()
    if interleave not in AXES:
        raise ValueError(f"interleave must be bsq, bil or bip, got {interleave!r}")
    shape = (layout.nbands, layout.nrows, layout.ncols)
    if min(shape) < 1 or layout.offset < 0:
        raise ValueError(
            f"bands, lines and samples must be positive and the offset not negative, "
            f"got {shape} and {layout.offset}"
        )
    file = _data_file(path, interleave)
    dtype = np.dtype(layout.dtype)
    check_bytes(shape, dtype, file.stat().st_size - layout.offset, file.name)
    axes = AXES[interleave]
    stored_shape = tuple(shape[axis] for axis in axes)
    values = np.memmap(file, dtype, "r", layout.offset, stored_shape)
    unit = header.get("wavelength units")
    widths = _numbers(header.get("fwhm"), shape[0], unit)
    return Stored(
        values.transpose(np.argsort(axes)),
        wavelengths=_numbers(header.get("wavelength"), shape[0], unit),
        metadata={
            "interleave": interleave,
            **({} if widths is None else {"fwhm": widths.tolist()}),
            "envi": {key: value for key, value in header.items() if key not in LAYOUT_FIELDS},
        },
        divisor=float(header.get("reflectance scale factor", 1)),
        ignore=float(header["data ignore value"]) if "data ignore value" in header else None,
    )


def save(path: Path, cube: Cube) -> None:
    """Write ``path`` (.hdr) and, beside it, the values (.img), in the interleave it was read in."""
    envi = need("spectral.io.envi", extra="io", purpose="writing ENVI files")
    dtype = np.dtype(np.float32 if cube.data.dtype == np.float16 else cube.data.dtype)
    if dtype == np.int8:
        dtype = np.dtype(np.int16)  # ENVI has no signed byte
    interleave = cube.metadata.get("interleave", "bsq")
    bands, rows, columns = cube.shape
    header: dict[str, Any] = {
        **cube.metadata.get("envi", {}),
        "lines": rows,
        "samples": columns,
        "bands": bands,
        "header offset": 0,
        "data type": envi.dtype_to_envi[dtype.char],
        "interleave": interleave,
        "byte order": 0,
    }
    if cube.wavelengths is not None:
        header["wavelength"] = cube.wavelengths.tolist()
        header["wavelength units"] = "Nanometers"
        if "fwhm" in cube.metadata:
            header["fwhm"] = cube.metadata["fwhm"]
    envi.write_envi_header(path, header)
    stored = dtype.newbyteorder("<")
    with path.with_suffix(".img").open("wb") as file:  # a band or a row in memory at a time
        if interleave == "bsq":
            for band in range(bands):
                file.write(np.asarray(cube.data[band], stored).tobytes())
        else:
            for row in range(rows):
                line = np.asarray(cube.data[:, row], stored)
                file.write((line if interleave == "bil" else line.T).tobytes())


def _data_file(header: Path, interleave: str) -> Path:
    """The file that the header describes: of the same name, with another suffix or none."""
    suffixes = [".img", "", ".dat", ".raw", ".bin", f".{interleave}"]
    for suffix in [*suffixes, *(suffix.upper() for suffix in suffixes)]:
        if (candidate := header.with_suffix(suffix)).is_file():
            return candidate
    raise FileNotFoundError(
        f"no data file lies beside it, named {header.stem} or {header.stem}.img"
    )


def _numbers(field: Any, bands: int, unit: str | None) -> np.ndarray | None:
    """A list of lengths, one a band, from a header: in nm, or None where it cannot be used."""
    try:
        values = np.array([float(value) for value in field], np.float64)
    except (TypeError, ValueError):
        return None
    return to_nanometres(values, unit) if values.size == bands else None
