"""What `fastfusion.accelerate` gains on whole models: ``python -m benchmarks.models --write X.md``.

A model and its accelerated copy take turns, with random weights: they hold nothing trained, which
changes no figure. Needs transformers for the models that are not written here.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastfusion
from benchmarks.lsm import LSM
from fastfusion import machine
from fastfusion.benchmarking import take_turns


def _transformer(kind: str, **options: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        configuration = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, f"{kind}Model")(configuration)

    return make


#: Model, how it is made, the shapes of its inputs, and whether a training step is timed.
CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], bool]] = {
    "ConvNeXt-Tiny": (
        _transformer("ConvNext", layer_scale_init_value=0.1),  # 1e-6 would hide any difference
        [(1, 3, 224, 224), (4, 3, 224, 224)],
        False,
    ),
    "ConvNeXtV2-Tiny": (_transformer("ConvNextV2"), [(1, 3, 224, 224), (4, 3, 224, 224)], False),
    "MobileNetV2": (_transformer("MobileNetV2"), [(1, 3, 224, 224)], False),
    "LSM": (LSM, [(1, 1, 64, 64), (1, 1, 128, 128)], True),
}


def _output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.last_hidden_state


def _forward(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: _output(model, x))


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        _output(model, x).square().mean().backward()

    return run


def measure(name: str, shape: tuple[int, ...], train: bool, seconds: float) -> list[str]:
    """One line of the table."""
    torch.manual_seed(0)
    plain = CASES[name][0]().train(train)
    fast, x = copy.deepcopy(plain), torch.randn(shape)
    # A training step is not what an example measures, so there everything is swapped.
    report = fastfusion.accelerate(fast, None if train else x)
    kinds = [row.kind for row in report.swapped]
    swapped = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
    prepare = _step if train else _forward
    samples = take_turns({"plain": prepare(plain, x), "fast": prepare(fast, x)}, seconds)
    before, after = (statistics.median(samples[key]) for key in ("plain", "fast"))
    ratios = [a / b for a, b in zip(samples["plain"], samples["fast"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    with torch.no_grad():
        plain.eval(), fast.eval()
        truth, found = _output(plain, x), _output(fast, x)
    return [
        name,
        " x ".join(map(str, shape)),
        "training step" if train else "inference",
        f"{1e3 * before:.1f}",
        f"{1e3 * after:.1f}",
        f"{before / after:.2f} ({low:.2f} to {high:.2f})",
        f"{float((found - truth).norm() / truth.norm()):.0e}",
        swapped,
    ]


def page(lines: list[list[str]]) -> str:
    """The page of the documentation."""
    here = machine.describe()
    head = ["model", "input", "what", "PyTorch, ms", "accelerated, ms", "times faster"]
    head += ["difference", "swapped"]
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(
        [
            "# Whole models, accelerated",
            "",
            "Made by `python -m benchmarks.models --write docs/performance-models.md`; `--models` "
            "measures some of them again.",
            "",
            f"{here['cpu']}, {here['threads']} threads, kernels for {here['capability']}; torch "
            f"{here['torch']}, float32, random weights. The model as it is and the one after "
            "`fastfusion.accelerate(model, example)` took turns; medians, and of the ratio of each "
            "turn the quartiles. The difference is that of the outputs, relative L2. ConvNeXt and "
            "MobileNet are those of transformers, LSM is `benchmarks/lsm.py`. In a training step "
            "every layer that is known is swapped, without an example. Where nothing was swapped, "
            "two equal models took turns, and the ratio is the noise of this table.",
            "",
            *("| " + " | ".join(line) + " |" for line in table),
            "",
        ]
    )


def _others(path: Path | None, models: list[str]) -> list[list[str]]:
    """What the page holds of models that are not measured now."""
    if path is None or not path.is_file():
        return []
    rows = [line[2:-2].split(" | ") for line in path.read_text().splitlines() if line[:2] == "| "]
    return [row for row in rows if row[0] in CASES and row[0] not in models]


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page, docs/....md")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line, about")
    options = parser.parse_args()
    lines = _others(options.write, options.models)
    for name in options.models:
        _, shapes, trained = CASES[name]
        for shape in shapes:
            for train in (False, True) if trained else (False,):
                lines.append(measure(name, shape, train, options.seconds))
                print(*lines[-1], sep="  ", flush=True)
    if options.write:
        lines.sort(key=lambda line: list(CASES).index(line[0]))
        options.write.write_text(page(lines))


if __name__ == "__main__":
    main()
