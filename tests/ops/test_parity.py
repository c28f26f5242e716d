"""Every backend of every operator against the float64 reference, over one matrix.

The axes: the operator's cases (odd sizes, sizes 1, every option), dtype, layout of the images
(contiguous, channels_last, strided, transposed, expanded, at an offset), threads. A backend that
is written but not built here is skipped, with the reason. Triton's rows are there under
TRITON_INTERPRET=1, those of CUDA where pytest was given ``-p tests.cuda_on_cpu.library``, which
runs the kernels on the CPU; test_triton.py and test_cuda.py do so.
"""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from torch import Tensor

from fastfusion.ops.operator import BACKENDS, OPERATORS
from tests.closeness import assert_close, relative_error
from tests.cuda_on_cpu import library
from tests.ops.cases import CASES, FIRST, FIRST_TWO, Case

LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "expanded", "offset")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_ON_CPU = library.installed
CUDA_IN_FULL = os.environ.get("CUDA_ON_CPU_IN_FULL") == "1"
DTYPES = (torch.float64, torch.float16, torch.bfloat16)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values (those of the first image for "expanded") in another layout in memory."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:1].clone().expand_as(x)
    if layout == "offset":
        flat = x.new_full((x.numel() + 3,), float("nan"))
        flat[3:] = x.reshape(-1)
        return flat[3:].view(x.shape)
    return x.contiguous()


def run(
    case: Case, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The outputs and the gradients of a fixed random functional of them."""
    inputs = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    outputs = case.outputs(inputs, backend)
    generator = torch.Generator().manual_seed(7)
    seeds = [
        torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(dtype) for y in outputs
    ]
    found = torch.autograd.grad(outputs, list(inputs.values()), seeds, materialize_grads=True)
    return outputs, dict(zip(inputs, found, strict=True))


def half_bound(error: float) -> float:
    """The error allowed in half precision, by the reference's: where that happens to be exact but
    for float64's own rounding, as for a gradient that is 0 or sums of few numbers, sums in float32
    may err by float32's rounding."""
    return 1.5 * error if error > 1e-12 else torch.finfo(torch.float32).eps


def check(case: Case, backend: str, dtype: torch.dtype, layout: str, seed: int = 0) -> None:
    """One cell of the matrix."""
    tensors = {name: value.to(dtype) for name, value in case.tensors(seed).items()}
    for name in case.images:
        tensors[name] = lay_out(tensors[name], layout)
    # The truth starts from the very values that the kernel gets.
    exact, exact_grads = run(
        case, {n: t.double() for n, t in tensors.items()}, "reference", torch.float64
    )
    outputs, grads = run(case, tensors, backend, dtype)
    if dtype in (torch.float16, torch.bfloat16):
        plain, plain_grads = run(case, tensors, "reference", dtype)
    for index, (y, truth) in enumerate(zip(outputs, exact, strict=True)):
        assert y.dtype == dtype
        if dtype == torch.float32:
            bound = case.bounds[0]
        elif dtype == torch.float64:
            bound = 1e-12
        else:
            bound = half_bound(relative_error(plain[index], truth))
        assert_close(y, truth, bound, f"output {index}")
    for name, gradient in grads.items():
        truth = exact_grads[name]
        scale = exact_grads[case.scale_of[name]].norm().item() if name in case.scale_of else None
        assert gradient.dtype == dtype
        assert gradient.shape == tensors[name].shape
        if dtype == torch.float32:
            bound = case.bounds[1]
        elif dtype == torch.float64:
            bound = 1e-12
        else:
            bound = half_bound(relative_error(plain_grads[name], truth, scale))
        assert_close(gradient, truth, bound, f"gradient of {name}", scale)


def pairs(
    cases: list[Case],
    *,
    reference: bool = True,
    interpreted: int | None = None,
    of_triton: list[Case] = CASES,
) -> pytest.MarkDecorator:
    """Each case on each backend that is written for its operator.

    Triton's interpreter, which takes milliseconds for an instruction, and (but for ``make
    cuda-sanitize``) the CUDA kernels on the CPU get the cases of at most ``interpreted`` elements,
    the interpreter of these only those ``of_triton``.
    """
    left_out = {
        "" if reference else "reference",
        "" if INTERPRETED else "triton",
        "" if CUDA_ON_CPU else "cuda",
    }
    slow = ("triton",) if CUDA_IN_FULL else ("triton", "cuda")
    found = [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend in BACKENDS
        for case in cases
        if backend in OPERATORS[case.operator].backends and backend not in left_out
        if backend not in slow or interpreted is None or case.elements <= interpreted
        if backend != "triton" or case in of_triton
    ]
    return pytest.mark.parametrize(("backend", "case"), found)


def skip_unless_built(backend: str, case: Case) -> None:
    if backend == "cpp" and (reason := OPERATORS[case.operator].why_no_cpp()) is not None:
        pytest.skip(f"cpp: {reason}")


# The reference is itself a row of the matrix: it must keep its own bounds in float32.
# (Triton has no transform: it would go through 1435 taps for each of 6 channels.)
@pairs(CASES, interpreted=20_000, of_triton=[c for c in CASES if "k41x35" not in c.label])
def test_float32(backend: str, case: Case) -> None:
    skip_unless_built(backend, case)
    check(case, backend, torch.float32, "contiguous")


@pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter (test_triton.py)")
@pairs(FIRST, reference=False)
def test_the_tiles_of_a_gpu(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has larger tiles of its own, so those of a GPU run once."""
    if backend != "triton":
        pytest.skip("no tiles")
    from fastfusion.ops import triton

    monkeypatch.setattr(triton, "architecture", lambda device: "sm_90")
    check(case, backend, torch.float32, "contiguous")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pairs(CASES, reference=False, interpreted=2000)
def test_other_dtypes(backend: str, case: Case, dtype: torch.dtype) -> None:
    skip_unless_built(backend, case)
    if backend in ("triton", "cuda") and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="got float64"):
            check(case, backend, dtype, "contiguous")
        return
    check(case, backend, dtype, "contiguous")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pairs(CASES, interpreted=2000, of_triton=FIRST_TWO)
def test_layout(backend: str, case: Case, layout: str) -> None:
    skip_unless_built(backend, case)
    check(case, backend, torch.float32, layout, seed=1)


def far(x: Tensor, axis: int) -> Tensor:
    """The same values, the entries of one axis so far apart that 32 bits do not count the way from
    the first to the third, in a mapping of pages of which few are touched."""
    apart = 2**30 + 16
    rest = torch.empty([1 if i == axis else n for i, n in enumerate(x.shape)])
    strides = [apart if i == axis else s for i, s in enumerate(rest.stride())]
    size = x.element_size() * ((x.shape[axis] - 1) * apart + rest.numel())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    room = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
    return room.as_strided(x.shape, strides).copy_(x)


#: Of each operator a small case whose images have three channels and three rows.
AS_FAR = list(
    {
        case.operator: case
        for case in reversed(CASES)
        if case.elements <= 2000 and min(case.shapes[case.images[0]][1:3]) >= 3
    }.values()
)


@pytest.mark.parametrize("axis", [1, 2])
@pairs(AS_FAR, reference=False)
def test_offsets_beyond_32_bits(backend: str, case: Case, axis: int) -> None:
    skip_unless_built(backend, case)
    tensors = {name: value.float() for name, value in case.tensors(4).items()}
    expected, expected_grads = run(case, tensors, backend, torch.float32)
    images = {name: far(tensors[name], axis) for name in case.images}
    outputs, grads = run(case, {**tensors, **images}, backend, torch.float32)
    for y, like in zip(outputs, expected, strict=True):
        assert_close(y, like, 1e-6, "output")
    for name, gradient in grads.items():
        scale = expected_grads[case.scale_of[name]].norm().item() if name in case.scale_of else None
        assert_close(gradient, expected_grads[name], 1e-5, f"gradient of {name}", scale)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
@pairs(FIRST, reference=False)  # torch's own kernels promise no such thing
def test_threads_change_no_bit(backend: str, case: Case, threads: int) -> None:
    skip_unless_built(backend, case)
    tensors = {name: value.float() for name, value in case.tensors(2).items()}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, one_grads = run(case, tensors, backend, torch.float32)
        torch.set_num_threads(threads)
        more, more_grads = run(case, tensors, backend, torch.float32)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, more, strict=True):
        assert torch.equal(a, b)
    for name in one_grads:
        assert torch.equal(one_grads[name], more_grads[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pairs([*FIRST, next(case for case in CASES if "circular" in case.label)])
def test_special_values_go_where_the_reference_sends_them(
    backend: str, case: Case, value: float
) -> None:
    skip_unless_built(backend, case)
    tensors = {name: t.float() for name, t in case.tensors(3).items()}
    first = tensors[case.images[0]]
    first.view(-1)[first.numel() // 2] = value
    truth = case.outputs(tensors, "reference")
    for y, expected in zip(case.outputs(tensors, backend), truth, strict=True):
        assert torch.equal(y.isfinite(), expected.isfinite())
        good = expected.isfinite()
        assert_close(y[good], expected[good], 10 * case.bounds[0] + 1e-6, "finite part")


@pytest.mark.parametrize("axis", ["B", "H", "W"])
@pairs(FIRST)
def test_nothing_in_nothing_out(backend: str, case: Case, axis: str) -> None:
    skip_unless_built(backend, case)
    if case.operator in ("haar_idwt2d", "coordinate_mixing", "trigonometric_solve"):
        pytest.skip("tested with the operator's own sizes in test_empty.py")
    place = {"B": 0, "H": 2, "W": 3}[axis]
    tensors = {name: value.float() for name, value in case.tensors().items()}
    empty = [n for i, n in enumerate(tensors["x"].shape) if i != place]
    empty.insert(place, 0)
    tensors["x"] = torch.zeros(empty)
    if "latents" in tensors:
        batch, patches, *rest = tensors["latents"].shape
        tensors["latents"] = torch.zeros((0, patches, *rest) if axis == "B" else (batch, 0, *rest))
    outputs, grads = run(case, tensors, backend, torch.float32)
    assert not any(y.any() for y in outputs)
    for name, gradient in grads.items():
        assert gradient.shape == tensors[name].shape
        assert not gradient.any()
