"""Where operators and layers are used: other processes and threads, devices, checkpoints, files.

With test_citizenship.py this backs the table in docs/citizenship.md, cell by cell.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fastfusion.nn as fast
from tests.closeness import assert_close
from tests.ops.cases import FIRST, Case

by_case = pytest.mark.parametrize("case", FIRST, ids=str)
ROOT = Path(__file__).resolve().parents[2]

LAYERS = {
    "LatentOperator2d": lambda: fast.LatentOperator2d(16, tokens=4, basis=6, heads=4),
    "FrequencyFilter2d": lambda: fast.FrequencyFilter2d(16, kernel_size=3),
    "HaarSplit2d": fast.HaarSplit2d,
    "HaarDWT2d": fast.HaarDWT2d,
    "HaarIDWT2d": fast.HaarIDWT2d,
    "CoordinateMixing": lambda: fast.CoordinateMixing(16, 4),
    "DepthwiseConv2d": lambda: fast.DepthwiseConv2d(16, 16, 5, padding=2, groups=16),
    "LargeKernelAttention": lambda: fast.LargeKernelAttention(16),
    "MultiscaleAttention": lambda: fast.MultiscaleAttention(16),
    "InitialRepresentation": lambda: fast.InitialRepresentation(16, 16, 16),
    "FeatureSynchronization": lambda: fast.FeatureSynchronization(16),
    "FrequencyRecalibration": lambda: fast.FrequencyRecalibration(16, 8, 3),
    "MultiScaleGenerator": lambda: fast.MultiScaleGenerator(16, 16, (1, 1, 1)),
    "SpaCAM": lambda: fast.SpaCAM(16),
    "SpeCAM": lambda: fast.SpeCAM(16),
    "SSCFM": lambda: fast.SSCFM(16),
}
#: How those are called that take something else than one image of 16 channels.
CALLS = {
    "HaarIDWT2d": lambda layer, x: layer(x, x, x, x),
    "CoordinateMixing": lambda layer, x: layer(x.flatten(2)),
    "InitialRepresentation": lambda layer, x: layer(x, x),
    "FeatureSynchronization": lambda layer, x: layer(x, (24, 24)),
    "FrequencyRecalibration": lambda layer, x: layer(
        x, x[:, :, :2, 0].mean((0, 2)).expand(2, 16, 16)
    ),
    "SSCFM": lambda layer, x: layer(x, x),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


def test_every_layer_is_here() -> None:
    assert set(LAYERS) == set(fast.__all__)


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    """The first tensor that a layer gives for an image."""
    call = CALLS.get(type(layer).__name__, lambda layer, x: layer(x))
    return tree_leaves(call(layer, x))[0]


def _floats(case: Case) -> dict[str, Tensor]:
    return {name: value.float() for name, value in case.tensors().items()}


# -- differentiation ------------------------------------------------------------------------------


@by_case
def test_forward_mode(case: Case) -> None:
    tensors = case.tensors()
    names, values = list(tensors), tuple(tensors.values())
    directions = tuple(torch.randn_like(value) for value in values)

    def function(backend: str):
        return lambda *values: case.outputs(dict(zip(names, values, strict=True)), backend)

    _, found = torch.func.jvp(function("auto"), values, directions)
    # The Jacobian by reverse mode, twice, which does not know of forward mode.
    outputs, pull = torch.func.vjp(function("reference"), *values)
    seeds = tuple(torch.zeros_like(y) for y in outputs)
    _, push = torch.func.vjp(lambda *seeds: pull(seeds), *seeds)
    for tangent, truth in zip(found, push(directions), strict=True):
        assert_close(tangent, truth, 1e-10, "tangent")


def test_forward_mode_of_a_gradient_is_refused() -> None:
    case = FIRST[0]
    tensors = case.tensors()
    name = case.images[0]

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in case.outputs({**tensors, name: x}, "auto"))

    x = tensors[name]
    with pytest.raises(NotImplementedError, match="jacrev of jacrev"):
        torch.func.jvp(torch.func.grad(loss), (x,), (x,))


@by_case
def test_activation_checkpointing(case: Case) -> None:
    plain = {name: value.detach().requires_grad_() for name, value in _floats(case).items()}
    again = {name: value.detach().requires_grad_() for name, value in plain.items()}
    sum(y.square().sum() for y in case.outputs(plain, "auto")).backward()
    outputs = checkpoint(
        lambda *_: case.outputs(again, "auto"), *again.values(), use_reentrant=False
    )
    sum(y.square().sum() for y in outputs).backward()
    for name in plain:
        assert torch.equal(plain[name].grad, again[name].grad)


# -- processes and threads ------------------------------------------------------------------------


class _AllCases(Dataset):
    def __len__(self) -> int:
        return len(FIRST)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return FIRST[index].outputs(_floats(FIRST[index]), "auto")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    """After the operators ran here, so that a fork inherits their threads' state."""
    expected = [case.outputs(_floats(case), "auto") for case in FIRST]
    loader = DataLoader(_AllCases(), batch_size=None, num_workers=1, multiprocessing_context=start)
    for outputs, truth in zip(loader, expected, strict=True):
        for y, wanted in zip(outputs, truth, strict=True):
            assert torch.equal(y, wanted)


def test_forward_after_fork() -> None:
    """With one thread, as a DataLoader's workers: GNU OpenMP, and so torch, hangs with more."""
    case = FIRST[0]
    expected = case.outputs(_floats(case), "auto")[0]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        queue.put(torch.equal(case.outputs(_floats(case), "auto")[0], expected))

    child = context.Process(target=work)
    child.start()
    child.join(timeout=60)
    child.kill()
    assert not queue.empty(), "the child hangs"
    assert queue.get()


@by_case
def test_many_threads_at_once(case: Case) -> None:
    tensors = _floats(case)
    expected = case.outputs(tensors, "auto")
    found: list[tuple[Tensor, ...]] = []

    def work() -> None:
        for _ in range(5):
            found.append(case.outputs(tensors, "auto"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(y, e) for ys in found for y, e in zip(ys, expected, strict=True))


# -- layers ---------------------------------------------------------------------------------------


@by_layer
def test_deepcopy_and_files(name: str) -> None:
    layer = LAYERS[name]().eval()
    x = torch.randn(1, 16, 12, 12)
    expected = _output(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)  # pickles the layer itself
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(_output(other, x), expected)
        assert all(
            a.data_ptr() != b.data_ptr()
            for a, b in zip(layer.parameters(), other.parameters(), strict=True)
        )


@by_layer
def test_made_on_meta(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]().eval()
        assert _output(layer, torch.randn(1, 16, 12, 12)).device.type == "meta"
    layer.to_empty(device="cpu")
    assert all(value.device.type == "cpu" for value in layer.state_dict().values())


@by_layer
def test_default_device(name: str) -> None:
    torch.set_default_device("meta")
    try:
        layer = LAYERS[name]().eval()
        x = torch.randn(1, 16, 12, 12)
        assert x.device.type == "meta"
        assert _output(layer, x).device.type == "meta"
    finally:
        torch.set_default_device("cpu")


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "CoordinateMixing"])
def test_channels_last_goes_through(name: str) -> None:
    layer = LAYERS[name]().eval()
    x = torch.randn(1, 16, 12, 12)
    expected = _output(layer, x)
    y = _output(layer, x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, 1e-5, "channels_last")


class _Everything(nn.Module):
    """Every layer and every operator once, for one ahead-of-time compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make() for make in LAYERS.values()])

    def forward(self, x: Tensor, tensors: list[dict[str, Tensor]]) -> list[Tensor]:
        outputs = [_output(layer, x) for layer in self.layers]
        for case, values in zip(FIRST, tensors, strict=True):
            outputs += case.outputs(values, "auto")
        return outputs


def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    model = _Everything().eval()
    arguments = torch.randn(1, 16, 12, 12), [_floats(case) for case in FIRST]
    expected = model(*arguments)
    with torch.inference_mode():
        program = torch.export.export(model, arguments)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for y, truth in zip(loaded(*arguments), expected, strict=True):
            assert_close(y, truth, 1e-5, "ahead-of-time compiled")


# -- the table ------------------------------------------------------------------------------------


def test_every_cell_of_the_table_has_its_test() -> None:
    """docs/citizenship.md names tests; each must be there."""
    page = (ROOT / "docs" / "citizenship.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named and named <= written, sorted(named - written)
