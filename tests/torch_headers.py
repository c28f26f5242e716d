"""What includes torch's headers, compiled with those of other versions: ``make torch-gate``.

``python -m tests.torch_headers 2.10.0 2.15.0`` fetches each version's wheel, keeps its headers in
build/torch-VERSION, and has the compilers read every such source with them, without making code:
an installation from source has no kernels where this fails. A version that cannot be fetched is
named, and is no failure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from csrc import build
from tests.ops.tritons import BUILD, why_not

ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]


def fetch(version: str) -> str | None:
    """None where the headers lie in build/torch-VERSION, else why they could not be fetched."""
    target = BUILD / f"torch-{version}"
    if (target / "fetched").is_file():
        return None
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        command = [*DOWNLOAD, "--no-cache-dir", "--no-deps", "--only-binary", ":all:"]
        reason = why_not([*command, "--dest", folder, f"torch=={version}"])
        if reason is not None:
            return reason
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            headers = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(target, headers)
    (target / "fetched").touch()
    return None


def commands(headers: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each source that includes torch's headers, and the command that reads it."""
    compiler, nvcc = build.find_compiler(), build.find_nvcc()
    if compiler is None:
        raise SystemExit("torch-gate: no C++ compiler was found")
    include = [*build.TORCH_FLAGS[1:], "-isystem", str(headers)]
    for source in [build.SOURCES / "library.cpp", *sorted(build.SOURCES.glob("bindings/*.cpp"))]:
        yield source, [*compiler, *build.FLAGS, *include, "-fsyntax-only", str(source)]
    if nvcc is None:
        print("torch-gate: NOT TESTED, the CUDA sources: nvcc was not found")
        return
    for source in sorted(build.SOURCES.glob("cuda/*.cu")):
        options = [*build.CUDA_FLAGS, *include, *build.cuda_options("8.0"), "-O0"]
        yield source, [nvcc, *options, "-cuda", str(source), "-o", os.devnull]


def problems(headers: Path) -> tuple[int, list[str]]:
    """How many sources were read, and what the compilers said of those that they refused."""

    def read(command: list[str]) -> str:
        ended = subprocess.run(command, capture_output=True, text=True)
        return (ended.stderr or "refused") if ended.returncode else ""

    todo = list(commands(headers))
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        said = list(pool.map(read, [command for _, command in todo]))
    return len(todo), [
        f"{source.relative_to(ROOT)}: {line}"
        for (source, _), lines in zip(todo, said, strict=True)
        for line in lines.splitlines()[:5]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="+")
    wrong = False
    for version in parser.parse_args(arguments).versions:
        reason = fetch(version)
        if reason is not None:
            print(f"torch-gate: NOT TESTED with torch {version}, which was not fetched: {reason}")
            continue
        number, found = problems(BUILD / f"torch-{version}" / "torch" / "include")
        print("\n".join(found), end="\n" if found else "")
        verdict = "WRONG" if found else "right"
        print(f"torch-gate: torch {version}: {verdict}, {number} sources", flush=True)
        wrong |= bool(found)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
