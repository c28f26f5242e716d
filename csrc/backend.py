"""The package's PEP 517 build backend: setuptools, and torch where none can be found.

The kernels are compiled against the headers of the torch that fastfusion will run with. It need
not be installed into an isolated build environment, which would fetch some gigabytes in vain;
only where the environment has none is it asked for.
"""

from __future__ import annotations

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (a backend offers all that setuptools offers)

import build


def _torch() -> list[str]:
    unwanted = os.environ.get("FASTFUSION_CPP") == "0" or build.find_compiler() is None
    return [] if unwanted or build.find_torch() is not None else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
