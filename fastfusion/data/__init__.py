"""Cubes, their files, real and built-in scenes, and the sensors that see them."""

from __future__ import annotations

from fastfusion.data.atomic import atomic_path

__all__ = ["atomic_path"]
