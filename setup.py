"""Builds the compiled kernels, where that is possible; all else is in pyproject.toml.

``FASTFUSION_CPP=0`` leaves the CPU kernels out, ``FASTFUSION_CPP=1`` makes it an error when they
cannot be built; ``FASTFUSION_CUDA`` says the same of the CUDA kernels. By default the package is
installed without what cannot be built, with a note that says why, and the CUDA kernels, which take
minutes to compile, are built where nvcc is and torch is one with CUDA; ``FASTFUSION_CUDA=1`` builds
them beside any torch, for machines other than this. ``FASTFUSION_PORTABLE=1`` links them for older
systems too (csrc/release.py, for a wheel).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build import CannotBuild, build, find_torch, torch_cuda

#: The libraries, and the variable that asks for each; fastfusion/native.py shows their notes.
KERNELS = {"_C_cpu": "FASTFUSION_CPP", "_C_cuda": "FASTFUSION_CUDA"}


#: One library for every Python, but those without the global lock (PEP 703), which have no limited
#: API to 3.14: they get the same library in a wheel for their own version.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildKernels(build_ext):
    """Build by csrc/build.py, or leave the note."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        name = ext.name.rpartition(".")[2]
        note = library.parent / f"{name}.why_not.txt"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        variable, cuda = KERNELS[name], name == "_C_cuda"
        wish = os.environ.get(variable, "")
        try:
            if wish == "0":
                raise CannotBuild(f"{variable}=0 was set when fastfusion was installed")
            torch = find_torch()
            if cuda and wish != "1" and torch is not None and torch_cuda(torch) is None:
                raise CannotBuild(
                    "the torch that fastfusion was installed beside has no CUDA "
                    "(FASTFUSION_CUDA=1 builds the kernels nevertheless)"
                )
            built = build(
                library.parent,
                cuda=cuda,
                objects=Path(self.build_temp) / name,
                portable=os.environ.get("FASTFUSION_PORTABLE") == "1",
            )
            built.rename(library)
            print(f"fastfusion is built with {library.name}", file=sys.stderr)
        except CannotBuild as error:
            if wish == "1":
                raise SystemExit(f"{variable}=1, but {error}") from error
            print(f"fastfusion is built without {name}: {error}", file=sys.stderr)
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
        Extension(f"fastfusion.{name}", sources=[], py_limited_api=LIMITED, optional=True)
        for name in KERNELS
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
