"""The latent operator's compiled kernels where the shared matrix does not reach.

Those for CPUs, or, where pytest was given ``-p tests.cuda_on_cpu.library`` (test_cuda.py does so),
those for CUDA.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfusion import ops
from fastfusion.ops.operator import OPERATORS
from tests.closeness import assert_close
from tests.cuda_on_cpu import library

BACKEND = "cuda" if library.installed else "cpp"
reason = None if BACKEND == "cuda" else OPERATORS["latent_operator"].why_no_cpp()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"cpp: {reason}")


def parameters(
    channels: int, heads: int, tokens: int, basis: int, *, offset: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    drawn = {"prompts": draw(heads, tokens, channels // heads, scale=0.5)}
    for role in ("key", "value", "query"):
        drawn[f"{role}_weight"] = draw(channels, channels, scale=channels**-0.5)
        drawn[f"{role}_bias"] = draw(channels, scale=0.3)
    for name in ("sine", "cosine"):
        drawn[name] = draw(channels, basis, scale=0.1)
    if offset:
        drawn["offset"] = draw(channels, scale=1.0)
    return drawn


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, values: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The output and the gradients of x and of every parameter."""
    inputs = {name: v.detach().requires_grad_() for name, v in {"x": x, **values}.items()}
    y = ops.latent_operator(**inputs, backend=backend, **options)
    seed = image(*y.shape, seed=2).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(inputs.values()), seed)]


def check(x: Tensor, values: dict[str, Tensor], **options: Any) -> None:
    exact = run(x.double(), {n: v.double() for n, v in values.items()}, "reference", **options)
    names = ["output", "x", *values]
    for name, result, truth in zip(names, run(x, values, BACKEND, **options), exact, strict=True):
        # The keys' bias has no gradient: its error is measured by that of the keys' weight.
        key_weight = exact[names.index("key_weight")].norm().item()
        scale = key_weight if name == "key_bias" else None
        assert_close(result, truth, 1e-5 if name == "output" else 5e-5, name, scale)


# Small patches go by strips, large ones by runs, several runs, or parts of more than 4096 pixels.
@pytest.mark.parametrize(
    ("size", "patch"),
    [
        ((1, 8, 5, 130), 1),
        ((3, 8, 9, 34), 2),
        ((2, 8, 21, 37), (3, 5)),
        ((1, 8, 33, 70), 8),
        ((1, 8, 50, 50), 24),
        ((2, 8, 41, 45), None),
        ((1, 8, 65, 127), None),
        ((1, 8, 100, 90), (90, 60)),
    ],
)
def test_every_way_through_the_patches(
    size: tuple[int, ...], patch: int | tuple[int, int] | None
) -> None:
    check(image(*size), parameters(8, 2, 3, 5, offset=True), patch_size=patch)


@pytest.mark.parametrize("tokens", [1, 2, 9, 17, 40])
@pytest.mark.parametrize("patch", [2, None])
def test_any_number_of_tokens(tokens: int, patch: int | None) -> None:
    check(image(1, 6, 18, 17), parameters(6, 3, tokens, 9), patch_size=patch)


@pytest.mark.parametrize(("channels", "heads"), [(1, 1), (5, 5), (7, 1), (33, 3), (80, 8)])
@pytest.mark.parametrize("patch", [4, 16])
def test_any_number_of_channels(channels: int, heads: int, patch: int) -> None:
    check(image(1, channels, 17, 20), parameters(channels, heads, 4, 3), patch_size=patch)


def test_as_much_as_the_cuda_kernels_take() -> None:
    check(image(1, 256, 3, 5), parameters(256, 4, 64, 2), patch_size=4)


@pytest.mark.parametrize("patch", [4, None])
def test_no_basis_leaves_the_latents(patch: int | None) -> None:
    values = parameters(8, 2, 3, 0)
    check(image(1, 8, 12, 12), values, patch_size=patch, squash=False)


@pytest.mark.parametrize("patch", [4, None])
def test_large_scores_neither_overflow_nor_vanish(patch: int | None) -> None:
    """Scores of many hundreds, highest in the last pixels: the softmax must follow the maximum."""
    values = parameters(8, 2, 3, 4)
    values["prompts"] = 300 * values["prompts"]
    ramp = torch.linspace(-2, 2, 80 * 64).view(1, 1, 80, 64)
    x = image(1, 8, 80, 64) * 0.2 + ramp
    y = ops.latent_operator(x, **values, patch_size=patch, backend=BACKEND)
    exact = ops.latent_operator(
        x.double(),
        **{n: v.double() for n, v in values.items()},
        patch_size=patch,
        backend="reference",
    )
    assert_close(y, exact, 1e-4, "output")  # the scores themselves round at 1e-7 * 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patch", [4, 16])
def test_special_values_stay_in_their_patch(value: float, patch: int) -> None:
    x = image(1, 8, 32, 48)
    x[0, 3, 5, 21] = value
    values = parameters(8, 2, 3, 4)
    y = ops.latent_operator(x, **values, patch_size=patch, backend=BACKEND)
    touched = torch.zeros(32, 48, dtype=torch.bool)
    top, left = 5 // patch * patch, 21 // patch * patch
    touched[top : top + patch, left : left + patch] = True
    assert not y[..., touched].isfinite().any()
    assert y[..., ~touched].isfinite().all()


@pytest.mark.parametrize("patch", [4, 16, None])
@pytest.mark.parametrize("wanted", ["x", "query_weight", "sine"])
def test_one_gradient_alone(patch: int | None, wanted: str) -> None:
    x, values = image(1, 8, 20, 20), parameters(8, 2, 3, 4)
    whole = dict(zip(["y", "x", *values], run(x, values, BACKEND, patch_size=patch), strict=True))
    inputs = {"x": x, **values}
    inputs[wanted] = inputs[wanted].detach().requires_grad_()
    y = ops.latent_operator(**inputs, patch_size=patch, backend=BACKEND)
    (gradient,) = torch.autograd.grad(y, [inputs[wanted]], image(*y.shape, seed=2))
    assert torch.equal(gradient, whole[wanted])


@pytest.mark.parametrize("patch", [4, 16, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_threads_change_no_bit(patch: int | None, layout: torch.memory_format) -> None:
    x = image(2, 8, 70, 66).contiguous(memory_format=layout)
    values = parameters(8, 2, 3, 4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(x, values, BACKEND, patch_size=patch))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("patch", [4, None])
def test_layouts_agree(patch: int | None) -> None:
    x, values = image(2, 20, 19, 23), parameters(20, 4, 3, 4)
    plain = ops.latent_operator(x, **values, patch_size=patch, backend=BACKEND)
    last = x.contiguous(memory_format=torch.channels_last)
    y = ops.latent_operator(last, **values, patch_size=patch, backend=BACKEND)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, plain)


@pytest.mark.parametrize("patch", [2, 16, None])
def test_whole_is_its_steps(patch: int | None) -> None:
    x, v = image(2, 8, 33, 18), parameters(8, 2, 3, 9, offset=True)
    keys = ("prompts", "key_weight", "key_bias", "value_weight", "value_bias")
    latents = ops.latent_encode(x, *(v[k] for k in keys), patch_size=patch, backend=BACKEND)
    solved = ops.trigonometric_solve(latents, v["sine"], v["cosine"], v["offset"], backend=BACKEND)
    y = ops.latent_decode(
        x, solved, v["query_weight"], v["query_bias"], patch_size=patch, heads=2, backend=BACKEND
    )
    assert_close(ops.latent_operator(x, **v, patch_size=patch, backend=BACKEND), y, 1e-6, "output")


def test_solver_keeps_its_digits_for_large_values() -> None:
    """The phase is reduced with more digits than a float has."""
    z = torch.tensor([0.1, 1.0, 33.3, 4097.7, 1e5, 1e6]).repeat(3).view(1, 1, 6, 3)
    sine, cosine = image(3, 24), image(3, 24, seed=3)
    exact = ops.trigonometric_solve(
        z.double(), sine.double(), cosine.double(), squash=False, backend="reference"
    )
    y = ops.trigonometric_solve(z, sine, cosine, squash=False, backend=BACKEND)
    # z itself, up to 1e6, stands in the sum and rounds with it.
    gap = (y.double() - exact).abs()
    assert (gap <= 1e-7 * z.double().abs() + 3e-5).all()


def test_every_instruction_set() -> None:
    """The choice is made once a process: each has its own, all at once."""
    code = (
        "import sys, tests.ops.test_latent_operator as t\n"
        "for patch in (2, 4, (3, 5), 16, None):\n"
        "    for channels, heads in ((64, 8), (15, 3)):\n"
        "        x = t.image(1, channels, 33, 40)\n"
        "        t.check(x, t.parameters(channels, heads, 5, 24), patch_size=patch)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    processes = {
        capability: subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "FASTFUSION_CPU_CAPABILITY": capability},
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for capability in ("default", "avx2", "avx512", "avx512_bf16")
    }
    said = {capability: process.communicate()[1] for capability, process in processes.items()}
    for capability, process in processes.items():
        assert process.returncode == 0, f"{capability}: {said[capability][-3000:]}"
