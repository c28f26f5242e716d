"""The options of the CUDA library's build, and what nvcc makes of the kernels, without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import cuda_kernels as gate
from tests.cuda_on_cpu.library import build_script

build = build_script()
EVERYWHERE = os.environ.get("FASTFUSION_CUDA_GATE") == "all"


def test_architectures_as_torch_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert [option[-8:] for option in build.cuda_options()] == [
        "de=sm_80",
        "de=sm_90",
        "e=sm_100",
        "ute_120]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a+PTX")
    assert build.cuda_options() == ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.CannotBuild, match=r"like '8.0;9.0\+PTX', the part 'Hopper' is not"):
        build.cuda_options()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    with pytest.raises(build.CannotBuild, match=r"need compute capability 8\.0, not 7\.5"):
        build.cuda_options()


def test_a_missing_nvcc_is_told_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() is None
    with pytest.raises(build.CannotBuild, match="nvcc was not found"):
        build.build(tmp_path, cuda=True)


def test_the_cuda_of_a_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    version = tmp_path / "version.py"
    assert build.torch_cuda(tmp_path) is None
    version.write_text("__version__ = '2.10'\ncuda: Optional[str] = None\nhip = None\n")
    assert build.torch_cuda(tmp_path) is None
    version.write_text("__version__ = '2.10'\ncuda: Optional[str] = '12.8'\nhip = None\n")
    assert build.torch_cuda(tmp_path) == "12.8"


# An architecture takes 50 s of a core: the others are for `make cuda-gate`, beside the tests.
@pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not here")
@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("architecture", gate.ARCHITECTURES if EVERYWHERE else ["sm_90"])
@pytest.mark.parametrize("source", gate.SOURCES, ids=lambda path: path.stem)
def test_every_cuda_kernel_compiles(source: Path, architecture: str) -> None:
    """Without a warning, a spill, too many registers, or more shared memory than a block has."""
    figures = gate.figures(source, architecture)
    assert figures
    problems = [f"{row}: {problem}" for row in figures for problem in row.problems()]
    assert not problems, "\n".join(problems)


def test_the_gate_reads_what_the_assembler_says() -> None:
    text = """
ptxas info    : Compiling entry function '_ZN2ff5cubesIfLi2ELb0EEEvv' for 'sm_90'
ptxas info    : Function properties for _ZN2ff5cubesIfLi2ELb0EEEvv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 2304 bytes smem
"""
    (row,) = gate.parsed(text, "sm_90")
    assert (row.kernel, row.registers, row.spilled, row.shared) == ("cubes", 255, 12, 2304)
    assert row.problems() == ["255 registers", "12 bytes spilled"]
    assert gate.Figures("k", "sm_90", 40, 0, 60_000).problems() == ["60000 bytes of shared memory"]
