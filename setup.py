"""Builds the compiled kernels, where that is possible; all else is in pyproject.toml.

``FASTFUSION_CPP=0`` leaves them out, ``FASTFUSION_CPP=1`` makes it an error when they cannot be
built. By default the package is then installed without them, with a note that says why.
``FASTFUSION_PORTABLE=1`` links them for older systems too (csrc/release.py, for a wheel).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build import CannotBuild, build

KERNELS = "_C_cpu"
NOTE = f"{KERNELS}.why_not.txt"  # fastfusion/native.py shows it


class BuildKernels(build_ext):
    """Build by csrc/build.py, or leave the note."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        note = library.parent / NOTE
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        wish = os.environ.get("FASTFUSION_CPP", "")
        try:
            if wish == "0":
                raise CannotBuild("FASTFUSION_CPP=0 was set when fastfusion was installed")
            built = build(
                library.parent,
                objects=Path(self.build_temp) / KERNELS,
                portable=os.environ.get("FASTFUSION_PORTABLE") == "1",
            )
            assert built == library.resolve(), (built, library)
        except CannotBuild as error:
            if wish == "1":
                raise SystemExit(f"FASTFUSION_CPP=1, but {error}") from error
            print(f"fastfusion is built without its C++ kernels: {error}", file=sys.stderr)
            note.write_text(f"{error}\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the libraries and notes go beside the sources."""
        built = Path(self.build_lib) / "fastfusion"
        package = Path(__file__).resolve().parent / "fastfusion"
        for old in package.glob("_C_*"):
            old.unlink()
        for new in built.glob("_C_*"):
            self.copy_file(str(new), str(package / new.name))


setup(
    ext_modules=[
        Extension(f"fastfusion.{KERNELS}", sources=[], py_limited_api=True, optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
