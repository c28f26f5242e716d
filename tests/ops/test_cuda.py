"""What the CUDA kernels promise, tested without a GPU.

The parity matrix runs over them on the host runtime (tests/cuda_on_cpu), in processes of its own
because there the operators' backend "cuda" takes CPU tensors; under the address sanitizer where the
compiler has one. ``make cuda-sanitize`` runs it in full, in several orders of the threads.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from fastfusion.ops import choice
from fastfusion.ops.operator import OPERATORS
from tests import ahead
from tests.cuda_on_cpu import library, sanitize

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(name for name, operator in OPERATORS.items() if "cuda" in operator.backends)

needs_compiler = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))


def on_the_host_runtime(*arguments: str) -> ahead.Command:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_ON_CPU_ORDER": "random"}
    if sanitize.libraries() is None:
        pytest_ = [sys.executable, "-m", "pytest", "-x", "-p", "no:warnings"]
        command = [*pytest_, "-p", "tests.cuda_on_cpu.library", *arguments]
    else:
        module = [sys.executable, "-m", "tests.cuda_on_cpu.sanitize"]
        command = [*module, "--orders", "random", "--", *arguments]
    return ahead.Command(command, environment)


def parity() -> ahead.Command:
    return on_the_host_runtime("tests/ops/test_parity.py", "-k", "cuda and not threads")


@needs_compiler
@pytest.mark.ahead(command=parity)
@pytest.mark.timeout(900)  # the kernels are compiled first
def test_parity_on_the_host_runtime() -> None:
    done = ahead.result(parity)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-4000:]


def beyond_the_matrix() -> ahead.Command:
    stage = (
        "(test_maxima or test_mixture) and float32 or parts or equal or maxima_without or special"
    )
    latent = "not (threads or instruction or 2-17 or 2-40)"
    return on_the_host_runtime(
        "tests/ops/test_depthwise.py",
        "tests/ops/test_haar.py",
        "tests/ops/test_frequency_filter.py",
        "tests/ops/test_latent_operator.py",
        "-k",
        f"in_tiles or test_haar and ({stage}) or test_frequency or"
        f" test_latent_operator and {latent}",
    )


@needs_compiler
@pytest.mark.ahead(command=beyond_the_matrix)
@pytest.mark.timeout(900)
def test_beyond_the_matrix_on_the_host_runtime() -> None:
    done = ahead.result(beyond_the_matrix)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_what_the_latent_operator_declines() -> None:
    from fastfusion.ops.latent_operator import _too_large

    assert _too_large(256, 4, 64) is None  # test_latent_operator.py runs these
    assert "up to 256 channels, got 260" in (_too_large(260, 10, 4) or "")
    assert "up to 64 channels a head, got 65" in (_too_large(130, 2, 4) or "")
    assert "up to 64 tokens, got 65" in (_too_large(64, 8, 65) or "")


def test_what_the_frequency_filter_declines() -> None:
    from fastfusion.ops.frequency_filter import _too_large

    assert _too_large(torch.empty(2, 1, 33, 33)) is None  # test_frequency_filter.py runs it
    assert "up to 33 bins, got 35" in (_too_large(torch.empty(2, 1, 35, 35)) or "")
    assert _too_large(torch.empty(2, 1, 35, 35), "circular") is None


def test_the_table_names_each_operator_that_has_both_backends() -> None:
    assert sorted(choice.TABLE) == NAMES
    for classes in choice.TABLE.values():
        for choices in classes.values():
            assert choice.ANY in choices
            for entry in choices.values():
                assert entry.backend in ("cuda", "triton")
                assert entry.reason
                assert entry.basis
    for name in choice.SHAPE_CLASSES:
        assert len(choice.TABLE[name]) > 1


def test_auto_goes_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["haar_split2d"]
    x = torch.zeros(1, 1, 2, 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table = {"all": {"any": choice.Choice("cuda", "a"), "sm_90": choice.Choice("triton", "b")}}
    monkeypatch.setitem(choice.TABLE, "haar_split2d", table)
    declines = operator.backends["cuda"].declines
    monkeypatch.setattr(operator, "why_not", lambda name, *args: None)
    assert declines(x) == "its table says triton (predicted: b)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert declines(x) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(operator, "why_not", lambda name, *args: "not here")
    assert declines(x) is None  # nothing is left to Triton where it cannot run


def test_cuda_says_why_it_cannot() -> None:
    split = OPERATORS["haar_split2d"]
    assert "NVIDIA GPU, got cpu" in (split.why_not("cuda", torch.zeros(1, 1, 2, 2)) or "")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this"):
        split(torch.zeros(1, 1, 2, 2), backend="cuda")
