"""The one form in which images travel between files, sensors and fusion."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(eq=False)
class Cube:
    """An image with a spectrum at every pixel.

    Attributes:
        data: ``(bands, rows, columns)``, integers or floats. From `open_cube` it may lie on disk:
            then it has ``shape`` and ``dtype``, and slicing it reads what is asked for.
        wavelengths: centre of each band in nanometres, ``(bands,)``, or None where unknown.
        metadata: what else is known: where the cube was read from and how, its georeference.

    Raises:
        TypeError: ``data`` is not an array.
        ValueError: wrong number of axes, an empty axis, a type that is not a real number, or
            wavelengths that do not fit the bands.

    Example:
        >>> cube = Cube(np.full((3, 4, 5), 800, np.uint16), wavelengths=[450, 550, 650])
        >>> cube.shape, cube.normalized(peak=1000).data.max().item()
        ((3, 4, 5), 0.800000011920929)
    """

    data: np.ndarray
    wavelengths: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.data, "dtype", None), np.dtype):
            raise TypeError(f"data must be a NumPy array, got {type(self.data).__name__}")
        check_cube_array(self.data.shape, self.data.dtype, "data")
        if self.wavelengths is not None:
            self.wavelengths = real_numbers("wavelengths", self.wavelengths)
            if self.wavelengths.shape != (self.bands,):
                raise ValueError(
                    f"wavelengths must have one value for each of the {self.bands} bands, "
                    f"got shape {self.wavelengths.shape}"
                )
            if not (np.isfinite(self.wavelengths).all() and (self.wavelengths > 0).all()):
                raise ValueError("wavelengths must be positive and finite, in nanometres")
        if not isinstance(self.metadata, dict):
            raise TypeError(f"metadata must be a dictionary, got {type(self.metadata).__name__}")

    @property
    def bands(self) -> int:
        return self.data.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(bands, rows, columns)``."""
        bands, rows, columns = self.data.shape
        return bands, rows, columns

    def check_finite(self, name: str = "cube") -> None:
        """Raise ValueError, with how many and where, if a value is NaN or infinite."""
        count, first = 0, None
        for band in range(self.bands):  # one band in memory at a time
            bad = ~np.isfinite(self.data[band])
            if first is None and bad.any():
                row, column = np.unravel_index(int(bad.argmax()), bad.shape)
                first = f"band {band}, row {row}, column {column}"
            count += int(np.count_nonzero(bad))
        if count:
            raise ValueError(
                f"{name} holds {count} values that are NaN or infinite "
                f"({count / np.prod(self.shape):.2%}), the first at {first} (counted from 0); "
                "fill them in or cut them out first"
            )

    def normalized(self, peak: float | None = None) -> Cube:
        """Divide by a peak value, so that values are in [0, 1] as fusion expects; float32.

        Two cubes that are fused together need the same peak. Values above the peak stay above 1.

        Args:
            peak: what becomes 1; by default the largest finite value of the cube.

        Returns:
            A new cube with the peak in ``metadata["peak"]``; `restored` multiplies it back.
        """
        if peak is None:
            peak = max(_largest_finite(self.data[band]) for band in range(self.bands))
        elif isinstance(peak, bool) or not isinstance(peak, (int, float)):
            raise TypeError(f"peak must be a number, got {type(peak).__name__}")
        if not (np.isfinite(peak) and peak > 0):
            raise ValueError(f"peak must be positive and finite, got {peak}")
        data = np.asarray(self.data).astype(np.float32) / np.float32(peak)
        total = float(peak) * self.metadata.get("peak", 1.0)
        return replace(self, data=data, metadata={**self.metadata, "peak": total})

    def restored(self) -> Cube:
        """Multiply by the peak that `normalized` divided by; the same cube where it did not."""
        metadata = dict(self.metadata)
        peak = metadata.pop("peak", None)
        if peak is None:
            return self
        return replace(self, data=self.data * np.float32(peak), metadata=metadata)


def real_numbers(name: str, values: Any) -> np.ndarray:
    """A list of real numbers as float64."""
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "uif":
            raise TypeError(f"{array.dtype} was given")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be real numbers: {error}") from error


def check_cube_array(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    """Raise ValueError unless an array can be a cube's data."""
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ValueError(f"{name} must hold real numbers of at most 64 bits, got {dtype}")
    if len(shape) != 3:
        raise ValueError(
            f"{name} must have three axes, bands, rows and columns, got shape {tuple(shape)}"
        )
    if 0 in shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(shape)}")


def _largest_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else -np.inf
