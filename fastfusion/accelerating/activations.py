"""Which activation module alone uses a layer's output."""

from __future__ import annotations

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


def following_activations(model: nn.Module) -> dict[str, str]:
    """Names of layers, each with the name of the activation module that alone uses its output.

    Only the graph of the whole model tells that nobody else uses an output, so there are none where
    ``torch.fx`` cannot trace it. A module that is called more than once, that goes by several
    names, or that is watched by hooks is left out.
    """
    try:
        pairs = _traced(model)
    except Exception:  # tracing runs the model's own code, which may fail in any way
        return {}
    shared = _called_by_more_than_one_name(model)
    return {
        layer: follower
        for layer, follower in pairs.items()
        if not any(watched(model.get_submodule(name)) for name in (layer, follower))
        and not shared & {id(model.get_submodule(layer)), id(model.get_submodule(follower))}
    }


def _traced(model: nn.Module) -> dict[str, str]:
    import torch.fx  # brings in Triton

    nodes = list(torch.fx.Tracer().trace(model).nodes)
    calls = [node.target for node in nodes if node.op == "call_module"]
    pairs: dict[str, str] = {}
    for node in nodes:
        if node.op != "call_module" or label(model.get_submodule(node.target)) is None:
            continue
        before = node.args[0] if node.args else None
        if (
            isinstance(before, torch.fx.Node)
            and before.op == "call_module"
            and list(before.users) == [node]
            and calls.count(node.target) == calls.count(before.target) == 1
        ):
            pairs[str(before.target)] = str(node.target)
    return pairs


def _called_by_more_than_one_name(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        seen[id(module)] = seen.get(id(module), 0) + 1
    return {key for key, count in seen.items() if count > 1}
