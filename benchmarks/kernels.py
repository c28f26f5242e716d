"""Compile every Triton kernel for every architecture, without a GPU, and look at what came out.

``python -m benchmarks.kernels --write docs/kernels.md`` draws the table; the tests assert that no
row has a problem. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import cuda_kernels

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

#: Shared memory that one program may have, in bytes (CUDA C Programming Guide, table of compute
#: capabilities; CDNA 3 ISA: 64 KiB of LDS a workgroup).
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}

#: Bytes that a thread may spill with versions of Triton whose compiler needs more registers than
#: others': of some 900 compiled kernels 3.6.0 spills 8 to 32 bytes in nine (most of the frequency
#: filter's mix_kernel, which fills all 255 registers), 3.9.0 spills 8 in one. None with any other.
SPILLS = {"3.6": 32, "3.9": 8}

_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_\w+)")


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiler made of one kernel, one tile, one architecture."""

    kernel: str
    example: str
    architecture: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int  # bytes (NVIDIA) or registers (AMD)
    shared: int  # bytes
    words: frozenset[str]  # "f64" where the code has doubles
    matrix: bool
    matrix_meant: bool
    doubles_meant: bool = False
    spill_allowed: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.example}; {self.tile}; {self.architecture}]"

    def cell(self) -> str:
        """Registers, shared memory and, where there is any, what was spilled."""
        cell = f"{self.registers} / {self.shared}"
        return f"{cell} / **{self.spilled}**" if self.spilled else cell

    def problems(self) -> list[str]:
        """What the architecture cannot do or the kernel should not."""
        found = []
        if self.shared > SHARED[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.spilled > self.spill_allowed:
            found.append(f"{self.spilled} spilled")
        if "f64" in self.words and not self.doubles_meant:
            found.append("doubles")
        if self.matrix_meant and not self.matrix:
            found.append("no matrix instruction")
        return found


def folders() -> list[str]:
    """The folders of operators that have Triton kernels."""
    return sorted(path.parent.name for path in ROOT.glob("fastfusion/ops/*/kernels.py"))


def _target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def _resources(compiled: Any) -> tuple[int, int]:
    """Registers a thread, and what was spilled."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        count = {
            key: max(int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", text))
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (
        int(re.search(rf"\b{key}:(\d+)", text).group(1))  # type: ignore[union-attr]
        for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


@functools.cache
def figures(folder: str, architecture: str) -> list[Figures]:
    """Compile all that the examples of an operator's folder launch, once each."""
    import triton

    from fastfusion.ops.triton import recording

    module = importlib.import_module(f"fastfusion.ops.{folder}.kernels")
    version = ".".join(triton.__version__.split(".")[:2])
    rows, seen = [], set()
    for example, call in module.EXAMPLES.items():
        with recording(architecture) as launches:
            call()
        for launch in launches:
            source = launch.source()
            options = launch.tile.options(architecture)
            key = (source.hash(), *options.items())
            if key in seen:
                continue
            seen.add(key)
            compiled = triton.compile(source, target=_target(architecture), options=options)
            code = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
            registers, spilled = _resources(compiled)
            name = launch.kernel.__name__
            rows.append(
                Figures(
                    name,
                    example,
                    architecture,
                    " x ".join(str(size) for size in launch.tile.blocks.values()),
                    launch.tile.warps,
                    launch.tile.stages,
                    registers,
                    spilled,
                    compiled.metadata.shared,
                    frozenset({"f64"} if re.search(r"[._]f64", code) else ()),
                    bool(_MATRIX.search(code)),
                    name in getattr(module, "MATRIX_KERNELS", ()),
                    name in getattr(module, "FLOAT64_KERNELS", ()),
                    0 if architecture.startswith("gfx") else SPILLS.get(version, 0),
                )
            )
    return rows


def section(folder: str) -> list[str]:
    """The table of an operator's folder."""
    lines = [f"## {folder}", "", f"| kernel | example | tile | warps | {_columns()} |"]
    lines += ["|---" * (4 + len(ARCHITECTURES)) + "|"]
    cells: dict[tuple[str, ...], dict[str, Figures]] = {}
    for architecture in ARCHITECTURES:
        for row in figures(folder, architecture):
            star = "*" if row.matrix_meant else ""
            key = (f"`{row.kernel}`{star}", row.example, row.tile, str(row.warps))
            cells.setdefault(key, {})[architecture] = row
    for key, found in cells.items():
        columns = [found[a].cell() if a in found else "-" for a in ARCHITECTURES]
        lines.append("| " + " | ".join([*key, *columns]) + " |")
    return [*lines, ""]


def document(kept: Mapping[str, str]) -> str:
    """The text of docs/kernels.md; sections that are kept are not compiled."""
    import triton

    lines = [
        "# Triton kernels, as compiled",
        "",
        "Written by `make kernels`, without a GPU: every kernel of every operator, with each tile",
        "of its table, for each architecture. Each cell is `registers of a thread / bytes of",
        "shared memory of a program`. The tests assert that the shared memory fits, that no",
        "double is computed where none is meant, that kernels marked * use matrix instructions,",
        "and that nothing is spilled: there would be a third figure, in bold, that tells how much",
        "(bytes a thread; registers on AMD).",
        "",
        f"Triton {triton.__version__}. With 3.6.0 and 3.9.0 all of it compiles too, within the",
        "same bounds but for spills of a few bytes: "
        + ", ".join(f"{most} at most with {version}" for version, most in SPILLS.items())
        + ".",
        "",
    ]
    text = "\n".join(lines) + "\n"
    for folder in folders():
        text += kept.get(folder) or "\n".join(section(folder)) + "\n"
    return text + (kept.get("cuda") or "\n".join(cuda_kernels.section()))


def sections(page: str) -> dict[str, str]:
    """The tables of a page by their folders, and "cuda" for all that is CUDA's.

    >>> sections("# Triton\\n\\n## a\\n\\n1\\n\\n## b\\n\\n2\\n\\n# CUDA\\n3\\n")
    {'a': '## a\\n\\n1\\n\\n', 'b': '## b\\n\\n2\\n\\n', 'cuda': '# CUDA\\n3\\n'}
    """
    triton, mark, cuda = page.partition("# CUDA")
    parts = re.split(r"^(?=## )", triton, flags=re.MULTILINE)[1:]
    found = {part.partition("\n")[0].removeprefix("## "): part for part in parts}
    return found | ({"cuda": mark + cuda} if mark else {})


def _columns() -> str:
    return " | ".join(ARCHITECTURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="where the table goes; else to the terminal")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*folders(), "cuda"],
        help="compile these; what --write names keeps its other tables",
    )
    arguments = parser.parse_args()
    kept: dict[str, str] = {}
    if arguments.only:
        if arguments.write is None:
            parser.error("--only changes a page: name it with --write")
        there = sections(arguments.write.read_text())
        kept = {name: text for name, text in there.items() if name not in arguments.only}
    text = document(kept)
    if arguments.write:
        arguments.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
