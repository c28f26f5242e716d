"""The wheel's audit and the link for older systems, on small examples; `make wheel` does all."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
INFO = "fastfusion-1.0.dist-info"
METADATA = """\
Metadata-Version: 2.4
Name: fastfusion
Version: 1.0
Summary: Custom kernels and fused models
License-Expression: MIT
License-File: LICENSE
Classifier: Operating System :: POSIX :: Linux
Requires-Python: >=3.10
Description-Content-Type: text/markdown
Requires-Dist: torch>=2.10
Provides-Extra: io

# fastfusion
"""
GOOD = {
    "fastfusion/__init__.py": "",
    "fastfusion/ops/README.md": "# Operators",
    "fastfusion/_C_cpu.abi3.so": "\x7fELF",
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nTag: cp310-abi3-manylinux_2_17_x86_64\n",
}
NAME = "fastfusion-1.0-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of csrc/, as if run from there."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    spec = importlib.util.spec_from_file_location(f"csrc_{name}", ROOT / "csrc" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "build", raising=False)  # not the package of that name
    return module


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("release", monkeypatch)


def write_wheel(path: Path, files: dict[str, str], record: str | None = None) -> Path:
    """A wheel with these files; its RECORD is right unless one is given."""
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            content = text.encode()
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            rows.append(f"{name},sha256={digest.decode()},{len(content)}")
        rows.append(f"{INFO}/RECORD,,")
        archive.writestr(f"{INFO}/RECORD", "\n".join(rows) if record is None else record)
    return path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    package = tmp_path / "sources"
    package.mkdir()
    (package / "__init__.py").touch()
    return package


def test_a_good_wheel_has_no_problems(release: ModuleType, tmp_path: Path, sources: Path):
    assert release.problems(write_wheel(tmp_path / NAME, GOOD), sources) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fastfusion/_C_cpu.abi3.so": None}, "files: _C_cpu.abi3.so is missing"),
        ({"fastfusion/__init__.py": None}, "files: fastfusion/__init__.py is missing"),
        ({"fastfusion/gone.py": ""}, "files: fastfusion/gone.py is no longer a source"),
        ({"tests/test_it.py": ""}, "files: tests/test_it.py does not belong into the package"),
        (
            {"fastfusion/_C_cpu.why_not.txt": "no compiler\n"},
            "files: fastfusion/_C_cpu.why_not.txt: no compiler",
        ),
        (
            {f"{INFO}/WHEEL": "Tag: cp310-abi3-linux_x86_64\n"},
            "tag: Tag: cp310-abi3-linux_x86_64",
        ),
        (
            {f"{INFO}/METADATA": METADATA.replace("torch>=2.10", "torch")},
            "METADATA: no Requires-Dist: torch>=2\\.10",
        ),
        (
            {f"{INFO}/METADATA": METADATA.replace("# fastfusion", "UNKNOWN")},
            "METADATA: no readme",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_fault_is_named(
    release: ModuleType,
    tmp_path: Path,
    sources: Path,
    change: dict[str, str | None],
    expected: str,
):
    files = {name: text for name, text in {**GOOD, **change}.items() if text is not None}
    assert release.problems(write_wheel(tmp_path / NAME, files), sources) == [expected]


def test_the_record_must_tell_the_truth(release: ModuleType, tmp_path: Path, sources: Path):
    rows = [f"{name},sha256=0,1" for name in list(GOOD)[1:]] + ["ghost.py,sha256=0,1"]
    wheel = write_wheel(tmp_path / NAME, GOOD, "\n".join([*rows, f"{INFO}/RECORD,,"]))
    assert release.problems(wheel, sources) == [
        "RECORD: fastfusion/__init__.py is not listed",
        *[f"RECORD: {name} has another hash or size" for name in list(GOOD)[1:]],
        "RECORD: ghost.py is listed and not there",
    ]


def test_name_and_size(
    release: ModuleType, tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(release, "MOST_BYTES", 100)
    wheel = write_wheel(tmp_path / "fastfusion-1.0-cp311-cp311-linux_x86_64.whl", GOOD)
    assert [problem.split(":")[0] for problem in release.problems(wheel, sources)] == [
        "name",
        "size",
    ]


def test_what_setuptools_packs(release: ModuleType, tmp_path: Path):
    """Without the kernels, whose build takes minutes: just their absence and the tag are wrong."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("fastfusion", "csrc"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "_C_*")
        )
    code = "import backend, sys; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tree,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(tree / "csrc"),
            "FASTFUSION_CPP": "0",
            "FASTFUSION_CUDA": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.splitlines()[-1]
    kinds = ["name", "tag", "files", "files"]
    found = release.problems(wheel, tree / "fastfusion")
    assert [problem.split(":")[0] for problem in found] == kinds, found
    assert "_C_cpu.abi3.so is missing" in found[2]
    assert "FASTFUSION_CPP=0 was set" in found[3]


def test_a_portable_library_needs_only_old_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of glibc's functions the oldest versions, of libstdc++ nothing; and no symbol is shown."""
    compiler = load("build", monkeypatch).find_compiler()
    if compiler is None or shutil.which("objdump") is None:
        pytest.skip("needs a C++ compiler and objdump")
    portable = load("portable", monkeypatch)
    source = tmp_path / "small.cpp"
    source.write_text(
        "#include <cmath>\n#include <memory>\n#include <sstream>\n#include <dlfcn.h>\n"
        "double shown(double x) { auto p = std::make_shared<std::ostringstream>(); *p << x;\n"
        "  if (!dlopen(nullptr, 1)) throw std::bad_alloc();\n"
        "  return std::exp(x) + p->str().size(); }\n"
        "static double at_load = shown(1.0);\n"
    )
    library = tmp_path / "small.so"
    options = portable.portable_link(compiler, tmp_path / "stand_ins")
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library), *options],
        check=True,
    )
    table = subprocess.run(
        ["objdump", "-T", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "GLIBCXX" not in table
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([0-9.]+)", table)}
    assert versions and max(versions) <= (2, 17), table
    assert "shown" not in table
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
