"""Cubes, their files, real and built-in scenes, and the sensors that see them."""

from __future__ import annotations

from fastfusion.data.atomic import atomic_path
from fastfusion.data.cube import Cube
from fastfusion.data.files import open_cube, read_cube, write_cube
from fastfusion.data.sensors import (
    Degradation,
    SpectralResponse,
    apply_srf,
    gaussian_psf,
    read_response,
    read_srf,
    srf_from_bands,
    srf_from_response,
    wald,
)

__all__ = [
    "Cube",
    "Degradation",
    "SpectralResponse",
    "apply_srf",
    "atomic_path",
    "gaussian_psf",
    "open_cube",
    "read_cube",
    "read_response",
    "read_srf",
    "srf_from_bands",
    "srf_from_response",
    "wald",
    "write_cube",
]
