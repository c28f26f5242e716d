"""Which activation module alone uses a layer's output."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from fastfusion.accelerating.swapping import watched

#: The activations that the operators apply by themselves, by their modules.
KINDS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}


def label(module: nn.Module) -> str | None:
    """The operator's name of an activation, or None where it has none."""
    kind = KINDS.get(type(module))
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None

    return kind


def following_activations(
    model: nn.Module, arguments: tuple[Any, ...] | None = None
) -> dict[str, str]:
    """Names of layers, each with the name of the activation module that alone uses its output.

    The graph of the whole model tells that nobody else uses an output. Where ``torch.fx`` cannot
    trace it, a run on ``arguments`` does for neighbours in an ``nn.Sequential``, and without
    arguments there are none. A module that goes by several names or is watched by hooks is left
    out, and one that is called more than once in the graph.
    """
    try:
        pairs = _traced(model)
    except Exception:  # tracing runs the model's own code, which may fail in any way
        pairs = {} if arguments is None else _observed(model, arguments)
    shared = _called_by_more_than_one_name(model)
    return {
        layer: follower
        for layer, follower in pairs.items()
        if not any(watched(model.get_submodule(name)) for name in (layer, follower))
        and not shared & {id(model.get_submodule(layer)), id(model.get_submodule(follower))}
    }


def _traced(model: nn.Module) -> dict[str, str]:
    import torch.fx as fx  # brings in Triton

    nodes = list(fx.Tracer().trace(model).nodes)
    calls = [node.target for node in nodes if node.op == "call_module"]
    pairs: dict[str, str] = {}
    for node in nodes:
        if node.op != "call_module" or label(model.get_submodule(node.target)) is None:
            continue
        before = node.args[0] if node.args else None
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and list(before.users) == [node]
            and calls.count(node.target) == calls.count(before.target) == 1
        ):
            pairs[str(before.target)] = str(node.target)
    return pairs


@torch.no_grad()
def _observed(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, str]:
    """Neighbours in an ``nn.Sequential`` that nobody but the ``nn.Sequential`` called."""
    running: list[nn.Module] = []
    callers: dict[nn.Module, list[nn.Module | None]] = {}

    def enters(module: nn.Module, inputs: Any) -> None:
        callers.setdefault(module, []).append(running[-1] if running else None)
        running.append(module)

    def leaves(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    handles = [module.register_forward_pre_hook(enters) for module in model.modules()]
    handles += [module.register_forward_hook(leaves) for module in model.modules()]
    try:
        model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    pairs: dict[str, str] = {}
    for name, row in model.named_modules():
        if type(row).forward is not nn.Sequential.forward:
            continue
        expected: list[nn.Module | None] = [row] * len(callers.get(row, []))
        parts = list(row.named_children())
        for (before, layer), (after, follower) in itertools.pairwise(parts):
            if label(follower) and expected == callers.get(layer) == callers.get(follower):
                start = f"{name}." if name else ""
                pairs[start + before] = start + after
    return pairs


def _called_by_more_than_one_name(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        seen[id(module)] = seen.get(id(module), 0) + 1
    return {key for key, count in seen.items() if count > 1}
