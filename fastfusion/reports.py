"""One self-contained HTML page from benchmark rows: bars, rooflines, curves, the environment."""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from fastfusion._optional import need

__all__ = ["csv_rows", "page", "terminal_table"]

_COLOURS = (
    *("#1b6ca8", "#d1603d", "#5b8c5a", "#8f5ea2", "#b8912b"),
    *("#4c4c4c", "#c2628f", "#3f9c9c", "#7a5b3a", "#9aa0a6"),
)
#: What others are compared with: the definition in plain PyTorch, by the names that it has.
_PLAIN = ("definition", "eager")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2429; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
p.lead { color: #4a555d; margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #dde3e7; text-align: right; }
th:first-child, td:first-child, td:only-of-type { text-align: left; }
thead th { border-bottom: 2px solid #9aa7af; }
.better { color: #2b7a3f; } .worse { color: #b3391f; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #4a555d; font-size: .9rem; }
.table { overflow-x: auto; }
"""


def _groups(run: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    return groups


def _table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of all rows."""
    head = ["work", "contestant", "median, ms", "quartiles, ms", "times faster", "share of floor"]
    head += ["GB/s", "GFLOP/s"]
    lines = []
    for group, rows in _groups(run).items():
        medians = {row["extra_info"]["contestant"]: row["stats"]["median"] for row in rows}
        base = next((medians[name] for name in _PLAIN if name in medians), None)
        for row in rows:
            stats, extra = row["stats"], row["extra_info"]
            median = stats["median"]
            lines.append(
                [
                    group,
                    extra["contestant"],
                    f"{1e3 * median:.4g}",
                    f"{1e3 * stats['q1']:.4g} to {1e3 * stats['q3']:.4g}",
                    f"{base / median:.2f}" if base else "",
                    f"{extra['floor'] / median:.2f}",
                    f"{1e-9 * extra['moved'] / median:.1f}",
                    f"{1e-9 * extra['flops'] / median:.1f}",
                ]
            )
    return head, lines


def terminal_table(run: dict[str, Any]) -> str:
    """The rows as text; "times faster" is against the definition in plain PyTorch."""
    head, lines = _table(run)
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(head), text(["-" * w for w in widths]), *map(text, lines)])


def csv_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat dictionary a row, for ``csv.DictWriter``."""
    return [
        {
            "name": row["name"],
            **row["params"],
            **{key: row["stats"][key] for key in ("median", "q1", "q3", "min", "max", "rounds")},
            **row["extra_info"],
            "datetime": run["datetime"],
        }
        for row in run["benchmarks"]
    ]


def page(
    run: dict[str, Any], changes: Iterable[Any] = (), command: str = "fastfusion bench"
) -> str:
    """The page.

    Args:
        run: what `fastfusion.benchmarking.measure` gives, or the rows of ``make bench``.
        changes: what `fastfusion.benchmarking.compare` gives, where two runs are compared.
        command: what made the rows, for the reader.

    Raises:
        ImportError: matplotlib is not installed.
    """
    first = run["benchmarks"][0]["extra_info"]
    head, lines = _table(run)
    sections = [
        "<h1>fastfusion: how fast the operators run here</h1>",
        '<p class="lead">fastfusion is a PyTorch library of custom kernels for hyperspectral image '
        f"fusion. This page was made by <code>{html.escape(command)}</code> on one machine. Each "
        "<em>work</em> is one operator on one size of image; its <em>contestants</em> are "
        "fastfusion's kernels (<em>auto</em> takes the fastest it knows to be right), the "
        "operator's definition in plain PyTorch, eager or compiled, and what else a user could "
        "install. They took turns in one process; <em>times faster</em> is against the definition "
        "eager; shown are medians and quartiles. The <em>floor</em> is the time under which "
        "nothing can be: each input read once and each output written once at the speed of a "
        "large copy, or the arithmetic at the speed of a matrix product, whichever is "
        "longer.</p>",
        "<h2>Machine</h2>",
        _html_table(
            ["what", "value"],
            [
                ["processor", first["cpu"]],
                ["instruction set of the kernels", first["capability"]],
                ["threads", first["threads"]],
                ["GPU", first.get("gpu", "none")],
                ["large copy, read + write", f"{first['bandwidth'] / 1e9:.1f} GB/s"],
                ["float32 matrix product", f"{first['matrix_rate'] / 1e9:.0f} GFLOP/s"],
                ["torch, Python", f"{first['torch']}, {first['python']}"],
                ["fastfusion", first["fastfusion"]],
                ["when", run["datetime"]],
            ],
        ),
    ]
    changes = list(changes)
    if changes:
        sections += [
            "<h2>Against the other run</h2>",
            "<p>A change counts where the quartiles of the two runs do not overlap.</p>",
            _html_table(
                ["row", "change"],
                [[c.name, str(c)] for c in changes],
                [
                    "" if not c.beyond_noise else "better" if c.ratio > 1 else "worse"
                    for c in changes
                ],
            ),
        ]
    sections += [
        "<h2>Latency</h2>",
        _figure(_bars(run), "Milliseconds a call; shorter is better. The tick is the floor."),
        "<h2>Roofline</h2>",
        _figure(
            _roofline(run),
            "How much of the machine each contestant uses: the black line is what the machine "
            "allows for work with so many FLOPs a byte.",
        ),
    ]
    curves = _curves(run)
    if curves:
        sections += [
            "<h2>Scaling</h2>",
            _figure(curves, "Nanoseconds a pixel against the number of pixels; flat is good."),
        ]
    sections += ["<h2>All rows</h2>", _html_table(head, lines)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><title>fastfusion bench</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _html_table(
    head: Sequence[str], lines: Sequence[Sequence[Any]], classes: Sequence[str] | None = None
) -> str:
    def cells(tag: str, line: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in line)

    marks = classes or [""] * len(lines)
    body = "".join(
        f"<tr{f' class={mark!r}' if mark else ''}>{cells('td', line)}</tr>"
        for mark, line in zip(marks, lines, strict=True)
    )
    head_row = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="table"><table>{head_row}<tbody>{body}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _axes(height: float) -> tuple[Any, Any]:
    # Not pyplot: no state is shared, and nothing is opened.
    figures = need("matplotlib.figure", extra="plot", purpose="drawing the page")
    figure = figures.Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _contestants(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["extra_info"]["contestant"] for row in run["benchmarks"]))


def _bars(run: dict[str, Any]) -> str:
    groups, names = _groups(run), _contestants(run)
    colours = dict(zip(names, itertools.cycle(_COLOURS)))
    bars = len(run["benchmarks"]) + len(groups)  # each work is followed by a gap
    figure, axes = _axes(1.2 + 0.17 * bars)
    at, ticks = 0, []
    for rows in groups.values():
        first = at
        for row in rows:
            stats = row["stats"]
            colour = colours[row["extra_info"]["contestant"]]
            axes.barh(at, 1e3 * stats["median"], height=0.85, color=colour)
            axes.plot([1e3 * stats["q1"], 1e3 * stats["q3"]], [at, at], color="black", lw=1)
            at += 1
        floor = 1e3 * rows[0]["extra_info"]["floor"]
        axes.plot([floor, floor], [first - 0.5, at - 0.5], color="black", lw=1.5)
        ticks.append((first + at - 1) / 2)
        at += 1
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.set_yticks(ticks, list(groups), fontsize=8)
    axes.set_ylim(at - 1, -1)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.legend(fontsize=8)
    return _svg(figure)


def _roofline(run: dict[str, Any]) -> str:
    figure, axes = _axes(5)
    extras = [row["extra_info"] for row in run["benchmarks"]]
    bandwidth, rate = extras[0]["bandwidth"], extras[0]["matrix_rate"]
    found = [e["flops"] / e["moved"] for e in extras]
    low, high = min([*found, 0.1]) / 2, max([*found, 10.0]) * 2
    steps = [low * (high / low) ** (i / 99) for i in range(100)]
    axes.loglog(steps, [min(s * bandwidth, rate) / 1e9 for s in steps], color="black")
    for name, colour in zip(_contestants(run), itertools.cycle(_COLOURS)):
        rows = [row for row in run["benchmarks"] if row["extra_info"]["contestant"] == name]
        axes.scatter(
            [row["extra_info"]["flops"] / row["extra_info"]["moved"] for row in rows],
            [row["extra_info"]["flops"] / row["stats"]["median"] / 1e9 for row in rows],
            color=colour,
            label=name,
            s=24,
        )
    axes.set_xlabel("FLOPs a byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8)
    return _svg(figure)


def _curves(run: dict[str, Any]) -> str:
    """Time a pixel of "auto" or the first contestant, a line an operation; "" with one size."""
    name = _contestants(run)[0]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in run["benchmarks"]:
        if row["extra_info"]["contestant"] == name and "pixels" in row["extra_info"]:
            pixels = row["extra_info"]["pixels"]
            point = (pixels, 1e9 * row["stats"]["median"] / pixels)
            lines.setdefault(row["params"]["operation"], []).append(point)
    lines = {work: sorted(points) for work, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    figure, axes = _axes(5)
    for work, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=work)
    axes.set_xlabel("pixels")
    axes.set_ylabel(f"ns a pixel, {name}")
    axes.legend(fontsize=8)
    return _svg(figure)
