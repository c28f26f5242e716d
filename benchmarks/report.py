"""Run the benchmarks and draw their tables: ``python -m benchmarks.report --write docs/x.md``.

The rounds come as pytest-benchmark's JSON, so ``pytest-benchmark compare`` reads them too. They are
kept in ``out/bench.json``, beside the tables as a CSV (one line a contestant), and drawn in
``out/bench.html``, a page that needs nothing else. ``--compare`` sets an earlier JSON beside the
run and tells what changed beyond the noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastfusion import benchmarking, reports

ROOT = Path(__file__).resolve().parents[1]

OURS = "fastfusion"
#: What stands from this line on in the page is written by hand, and stays when it is made again.
NOTES = "<!-- Written by hand from here on; `make bench` keeps it. -->"


def run(select: str, target: Path) -> int:
    """Run the benchmarks whose name matches, in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench", "-o", "addopts="]
    command += [
        "--timeout=0",
        f"--benchmark-json={target}",
        "--benchmark-columns=median,iqr,rounds",
    ]
    if select:
        command += ["-k", select]
    return subprocess.run(command, cwd=ROOT).returncode


def rows(data: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Work, then contestant, to its median and what was noted beside it."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in data["benchmarks"]:
        stats, extra = entry["stats"], entry["extra_info"]
        table.setdefault(entry["group"], {})[extra["contestant"]] = {
            **extra,
            "median": stats["median"],
            "q1": stats["q1"],
            "q3": stats["q3"],
            "rounds": stats["rounds"],
        }
    return table


def verdict(entry: dict[str, Any], ratios: dict[str, float]) -> str:
    """Which targets are met, and which missed by how much."""
    words = []
    for name, wanted in entry["target"].items():
        if name == "best":  # never slower than the better of torch's layouts, and compiled
            reached = min(ratios.values(), default=float("nan"))
        elif name == "share":
            reached = entry["floor"] / entry["median"]
        elif name in ratios:
            reached = ratios[name]
        else:
            continue
        mark = "met" if reached >= wanted else f"**{reached:.2f}**"
        words.append(f"{name} {wanted:g}: {mark}")
    return "; ".join(words)


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One line a piece of work."""
    lines = [
        "| work | fastfusion, ms | times faster than | floor, ms | share | GB/s | GFLOP/s "
        "| memory, result included, MB | targets |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for work, entries in table.items():
        if OURS not in entries or entries[OURS].get("series"):
            continue
        ours = entries[OURS]
        ratios = {n: e["median"] / ours["median"] for n, e in entries.items() if n != OURS}
        compared = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        memory = ours["peak_memory"]
        cells = [
            work,
            f"{1e3 * ours['median']:.3g}",
            compared,
            f"{1e3 * ours['floor']:.3g}",
            f"{ours['floor'] / ours['median']:.2f}",
            f"{1e-9 * ours['moved'] / ours['median']:.1f}",
            f"{1e-9 * ours['flops'] / ours['median']:.1f}",
            "not measured" if memory is None else f"{memory / 1e6:.1f}",
            verdict(ours, ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def growth(table: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The time of a pixel for each side of an image, a line for each operator."""
    times: dict[str, dict[int, float]] = {}
    for entries in table.values():
        ours = entries.get(OURS)
        if ours and ours.get("series"):
            name, side = ours["series"]
            times.setdefault(name, {})[side] = 1e9 * ours["median"] / side**2
    if not times:
        return []
    sides = sorted({side for found in times.values() for side in found})
    lines = [
        "## Size",
        "",
        "Nanoseconds a pixel of 64 channels, for square images as large as the machine's memory "
        "holds; and how far the slowest is from the fastest.",
        "",
        f"| operator | {' | '.join(f'{side}²' for side in sides)} | apart |",
        "|---|" + "---|" * (len(sides) + 1),
    ]
    for name, found in times.items():
        cells = [f"{found[side]:.3g}" if side in found else "" for side in sides]
        apart = max(found.values()) / min(found.values()) - 1
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * apart:.0f} % |")
    return [*lines, ""]


def roofline(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Every row under the machine's two limits."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    entries = {work: found for work, found in table.items() if OURS in found}
    limits = next(iter(entries.values()))[OURS]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensity = np.geomspace(0.1, 1000, 200)
    roof = np.minimum(intensity * limits["bandwidth"], limits["matrix_rate"]) / 1e9
    axes.loglog(intensity, roof, color="black", label="limit of this machine")
    kinds = ((OURS, "o", "tab:blue"), ("eager", "x", "tab:orange"), ("compiled", "+", "tab:green"))
    for name, marker, colour in kinds:
        points = [
            (found[OURS]["flops"] / found[OURS]["moved"], found[OURS]["flops"] / e["median"] / 1e9)
            for found in entries.values()
            if (e := found.get(name))
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=name, s=28)
    axes.set_xlabel("FLOPs a byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{limits['cpu']}, {limits['threads']} threads, float32")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(data: dict[str, Any], target: Path) -> None:
    """The page, its picture and its CSV."""
    table = rows(data)
    first = next(iter(next(iter(table.values())).values()))
    picture, source = target.with_suffix(".png"), target.with_suffix(".csv")
    roofline(table, picture)
    with source.open("w", newline="") as file:
        fields = ["work", "contestant", "median", "q1", "q3", "rounds", "floor", "moved", "flops"]
        fields += ["peak_memory", "cpu", "capability", "threads", "python", "torch", "fastfusion"]
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for work, entries in table.items():
            for entry in entries.values():
                writer.writerow({"work": work, **entry})
    lines = [
        "# Speed on a CPU",
        "",
        "Made by `make bench`; the rows with their quartiles are in "
        f"[{source.name}]({source.name}), and `out/bench.html` draws them on a page that needs "
        "nothing else. `make bench COMPARE=FILE` sets an earlier `out/bench.json` beside a run. "
        "Notes by hand stand at the end.",
        "",
        f"Measured on {data['datetime'][:10]}. Machine: {first['cpu']}, {first['threads']} "
        f"threads, kernels for {first['capability']}; torch {first['torch']}, Python "
        f"{first['python']}. In the same run: a large copy "
        f"{first['bandwidth'] / 1e9:.1f} GB/s (read + write), a float32 matrix product "
        f"{first['matrix_rate'] / 1e9:.0f} GFLOP/s.",
        "",
        "float32, 1 x 64 x 256 x 256 unless the row says otherwise. Medians of interleaved rounds "
        "in one process, which keeps the memory that it frees (`machine.keep_freed_memory`): else "
        "large results would time the system's fresh pages. The floor is the larger of bytes over "
        "the copy's bandwidth and FLOPs over the product's rate, each input read once and each "
        "output written once. A row stands here only when the operator's parity tests pass. Under "
        "*targets*, a figure in bold is what was reached where the target was missed; `best` "
        "is against the best of all others. What bounds a row that misses, and what was tried, "
        "stands on the operator's page: "
        "[latent operator](operators/latent_operator.md), "
        "[depthwise convolution and the attentions](operators/depthwise.md), "
        "[frequency filter](operators/frequency_filter.md), "
        "[Haar and SpeCAM's first stage](operators/haar.md), "
        "[coordinate mixing](operators/coordinate_mixing.md).",
        "",
        *markdown(table),
        "",
        f"![roofline]({picture.name})",
        "",
        *growth(table),
    ]
    target.write_text("\n".join([*lines, NOTES]) + notes(target))


def notes(page: Path) -> str:
    """What was written by hand at the end of a page."""
    _, _, kept = page.read_text().partition(NOTES) if page.is_file() else ("", "", "")
    return kept or "\n"


def main() -> int:
    """Run, or take a run's JSON, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page, docs/....md")
    parser.add_argument("--select", default="", help="only what matches, as pytest's -k")
    parser.add_argument("--json", type=Path, help="draw from an earlier run's JSON")
    parser.add_argument("--compare", type=Path, help="an earlier run's JSON, to set beside it")
    options = parser.parse_args()
    before = json.loads(options.compare.read_text()) if options.compare else None
    source = options.json or ROOT / "out" / "bench.json"
    status = 0
    if options.json is None:
        source.parent.mkdir(exist_ok=True)
        source.unlink(missing_ok=True)  # where nothing matches, pytest-benchmark leaves the old one
        status = run(options.select, source)
        if not source.is_file():
            raise SystemExit(f"no benchmark was run: pytest ended with status {status}")
    data = json.loads(source.read_text())
    changes = [] if before is None else benchmarking.compare(before, data)
    write(data, options.write)
    if notes(options.write).strip():
        print(f"{options.write}: its notes were kept; read whether they are still true of this run")
    drawn = source.with_suffix(".html")
    drawn.write_text(reports.page(data, changes, command="make bench"))
    print("\n".join([*markdown(rows(data)), *(f"{c.name}: {c}" for c in changes), str(drawn)]))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
