"""Windows of scenes that stay on the disk, and where tiles with margins lie in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfusion.data.files import open_stored
from fastfusion.data.formats.stored import reading


class Windows:
    """A cube on the disk, read window by window: float32, divided by a peak.

    Args:
        path, variable, bands_axis: as `fastfusion.data.open_cube`.
        peak: what becomes 1.

    Attributes:
        path, variable: as given.
        shape: ``(bands, rows, columns)``.
        wavelengths, metadata: as in `fastfusion.data.Cube`.

    Raises:
        FileNotFoundError, ValueError, OSError, ImportError: as `fastfusion.data.open_cube`.
    """

    def __init__(
        self,
        path: str,
        variable: str | None = None,
        bands_axis: int | None = None,
        peak: float = 1.0,
    ) -> None:
        self.path, self.variable, self.peak = Path(path), variable, peak
        self.stored = open_stored(self.path, variable, bands_axis)
        rows, columns = (
            length
            for axis, length in enumerate(self.stored.data.shape)
            if axis != self.stored.bands_axis
        )
        self.shape = (self.stored.data.shape[self.stored.bands_axis], rows, columns)
        self.wavelengths, self.metadata = self.stored.wavelengths, self.stored.metadata

    def read(self, rows: Stretch, columns: Stretch) -> Tensor:
        """``(bands, rows, columns)``; values that the file marks as missing are NaN."""
        lines = [
            np.concatenate([self._values(r, c) for c in columns.pieces], axis=2)
            for r in rows.pieces
        ]
        values = np.concatenate(lines, axis=1)
        # Memory of torch's own is aligned alike in every run: results are equal to the last bit.
        return torch.empty(values.shape, dtype=torch.float32).copy_(torch.from_numpy(values))

    def _values(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        stored = self.stored
        key: list[Any] = [slice(*rows), slice(*columns)]
        key.insert(stored.bands_axis, slice(None))
        raw = reading(self.path, lambda: np.asarray(stored.data[tuple(key)]))
        raw = np.moveaxis(raw, stored.bands_axis, 0)
        values = raw.astype(np.float32)
        if np.not_equal(stored.divisor, 1).any():
            values /= np.asarray(stored.divisor, np.float32)
        if np.not_equal(stored.offset, 0).any():
            values += np.asarray(stored.offset, np.float32)
        if stored.ignore is not None:
            values[raw == stored.ignore] = np.nan
        if self.peak != 1:
            values /= np.float32(self.peak)
        return values


class Stretch:
    """Pixels along one axis of a scene: a tile's own, or with a margin.

    Attributes:
        pieces: the stretches ``(first, end)`` to read one after the other; several where the scene
            repeats beyond its edge.
        length: of all of them.
        inner: where the pixels without the margin lie among these.
    """

    def __init__(self, pieces: list[tuple[int, int]], inner: slice) -> None:
        self.pieces, self.inner = pieces, inner
        self.length = sum(end - first for first, end in pieces)

    @classmethod
    def of(cls, first: int, end: int) -> Stretch:
        return cls([(first, end)], slice(0, end - first))

    @property
    def first(self) -> int:
        return self.pieces[0][0]

    @property
    def end(self) -> int:
        return self.pieces[-1][1]

    def grown(self, margin: int, size: int, *, circular: bool = False) -> Stretch:
        """This one piece with a margin, as far as the axis of ``size`` pixels goes.

        A circular axis goes on at its other end. Where the margins meet around the scene, it is the
        whole axis, which then has the edges that it really has.

        >>> Stretch.of(0, 4).grown(2, 16).pieces
        [(0, 6)]
        >>> Stretch.of(0, 4).grown(2, 16, circular=True).pieces
        [(14, 16), (0, 6)]
        """
        first, end = self.first, self.end
        own = end - first
        if own + 2 * margin >= size:
            return Stretch([(0, size)], slice(first, end))
        low, high = first - margin, end + margin
        if not circular:
            low, high = max(low, 0), min(high, size)
            return Stretch([(low, high)], slice(first - low, end - low))
        pieces = [(low, high)]
        if low < 0:
            pieces = [(low + size, size), (0, high)]
        elif high > size:
            pieces = [(low, size), (0, high - size)]
        return Stretch(pieces, slice(margin, margin + own))

    def times(self, scale: int) -> Stretch:
        """The same pixels on a grid that is ``scale`` times finer."""
        return Stretch(
            [(first * scale, end * scale) for first, end in self.pieces],
            slice(self.inner.start * scale, self.inner.stop * scale),
        )
