"""Cubes, their files, real and built-in scenes, and the sensors that see them."""

from __future__ import annotations

from fastfusion.data.atomic import atomic_path
from fastfusion.data.cube import Cube
from fastfusion.data.demo import demo_scene
from fastfusion.data.estimation import estimate_sensors
from fastfusion.data.files import check_output, open_cube, read_cube, write_cube
from fastfusion.data.scenes import Scene, load_scene, scene_names
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
    "Scene",
    "SpectralResponse",
    "apply_srf",
    "atomic_path",
    "check_output",
    "demo_scene",
    "estimate_sensors",
    "gaussian_psf",
    "load_scene",
    "open_cube",
    "read_cube",
    "read_response",
    "read_srf",
    "scene_names",
    "srf_from_bands",
    "srf_from_response",
    "wald",
    "write_cube",
]
