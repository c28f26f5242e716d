"""Compile the CUDA kernels for every architecture, without a GPU, and read what came out.

``python -m benchmarks.kernels --write docs/kernels.md`` puts the table into the page; the tests
assert that no row has a problem. What is compiled is the code of the library, warnings as errors.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

#: Bytes of static shared memory that a block may have (CUDA C++ Programming Guide).
SHARED = 48 << 10
#: Registers of a thread: with more, a multiprocessor's 65536 would not do for as many blocks of 128
#: threads as its shared memory has room for at 48 KiB each (3, 4, 4, 2).
REGISTERS = {"sm_80": 168, "sm_90": 128, "sm_100": 128, "sm_120": 255}


@functools.cache
def _build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastfusion_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the assembler made of one instance of a kernel for one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled: int  # bytes a thread, stored and loaded
    shared: int  # bytes a block

    def problems(self) -> list[str]:
        """What the architecture cannot do or the kernel should not."""
        found = []
        if self.shared > SHARED:
            found.append(f"{self.shared} bytes of shared memory")
        if self.registers > REGISTERS[self.architecture]:
            found.append(f"{self.registers} registers")
        if self.spilled:
            found.append(f"{self.spilled} bytes spilled")
        return found


def _name(mangled: str) -> str:
    """The kernel's own name out of a mangled one: its last component before the template's part."""
    place, name = mangled.find("N") + 1, mangled
    while match := re.match(r"(\d+)", mangled[place:]):
        start = place + len(match[1])
        name = mangled[start : start + int(match[1])]
        place = start + int(match[1])
    return name


def parsed(text: str, architecture: str) -> list[Figures]:
    """The figures in what ``ptxas -v`` says."""
    rows = []
    for part in text.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        assert spills is not None and used is not None, part
        shared = re.search(r"(\d+) bytes smem", used[2])
        rows.append(
            Figures(
                _name(part.partition("'")[0]),
                architecture,
                int(used[1]),
                int(spills[1]) + int(spills[2]),
                int(shared[1]) if shared else 0,
            )
        )
    return rows


@functools.cache
def figures(source: Path, architecture: str) -> list[Figures]:
    """Compile a source for an architecture; a row for each instance of each kernel in it."""
    build = _build_script()
    number = architecture.removeprefix("sm_")
    options = build.cuda_options(f"{number[:-1]}.{number[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(str(build.find_nvcc()), *build.CUDA_FLAGS, *build.TORCH_FLAGS[1:], *options),
                *("-isystem", str(build.find_torch() / "include"), "-Xptxas", "-v", "-cubin"),
                *(str(source), "-o", f"{folder}/{source.stem}.cubin"),
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    return parsed(done.stderr, architecture)


def section() -> list[str]:
    """The lines of the page: a kernel a row, over all its instances."""
    lines = [
        "# CUDA kernels, as compiled",
        "",
        "Written by `make kernels` too, with nvcc and without a GPU, warnings as errors. A kernel",
        "has an instance for each element type, layout and size that it is a template over. Each",
        "cell is `the fewest to the most registers of a thread / bytes of shared memory of a",
        "block`, over all of them; a third figure, in bold, would be bytes spilled. The tests",
        f"refuse spills, more than {SHARED} bytes and more registers than leave room for the",
        "blocks that shared memory has room for: "
        + ", ".join(f"{count} on {name}" for name, count in REGISTERS.items())
        + ".",
        "",
    ]
    if _build_script().find_nvcc() is None:
        return [*lines, "nvcc was not there when this page was written.", ""]
    lines += [f"| kernel | instances | {' | '.join(ARCHITECTURES)} |"]
    lines += ["|---" * (2 + len(ARCHITECTURES)) + "|"]
    for source in SOURCES:
        found = {a: figures(source, a) for a in ARCHITECTURES}
        for kernel in dict.fromkeys(row.kernel for row in found[ARCHITECTURES[0]]):
            cells = []
            for architecture in ARCHITECTURES:
                rows = [row for row in found[architecture] if row.kernel == kernel]
                least, *rest = sorted({row.registers for row in rows})
                registers = f"{least} to {rest[-1]}" if rest else str(least)
                cell = f"{registers} / {max(row.shared for row in rows)}"
                spilled = max(row.spilled for row in rows)
                cells.append(f"{cell} / **{spilled}**" if spilled else cell)
            lines.append("| " + " | ".join([f"`{kernel}`", str(len(rows)), *cells]) + " |")
    return [*lines, ""]
