"""Cubes, their files, real and built-in scenes, and the sensors that see them."""

from __future__ import annotations

from fastfusion.data.atomic import atomic_path
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
    "Degradation",
    "SpectralResponse",
    "apply_srf",
    "atomic_path",
    "gaussian_psf",
    "read_response",
    "read_srf",
    "srf_from_bands",
    "srf_from_response",
    "wald",
]
