"""One self-contained HTML page from benchmark rows: bars, rooflines, curves, the environment."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastfusion._optional import need
from fastfusion.benchmarking import ABOUT, PLAIN, Change

__all__ = ["csv_rows", "page", "terminal_table"]

_COLOURS = (
    *("#1b6ca8", "#d1603d", "#5b8c5a", "#8f5ea2", "#b8912b"),
    *("#4c4c4c", "#c2628f", "#3f9c9c", "#7a5b3a", "#9aa0a6"),
)
#: This library, by the names that it has; the first that takes part is what the page sums up.
_OURS = ("auto", "fastfusion", "cuda", "triton", "cpp")
_WHO = {
    "auto": "fastfusion, with the kernel that it takes by itself",
    "fastfusion": "this library, with the kernel that it takes by itself",
    "cpp": "fastfusion's C++ kernels",
    "triton": "fastfusion's Triton kernels",
    "cuda": "fastfusion's CUDA kernels",
    "reference": "the definition, called through fastfusion",
    "definition": "the operator's definition in plain PyTorch",
    "eager": "the operator's definition in plain PyTorch",
    "eager, other layout": "the same on the image in PyTorch's other memory layout",
    "compiled": "the definition through torch.compile",
    "our float32": "this library in float32, beside a narrower type",
}

_STYLE = """
:root { color-scheme: light; --ink: #1d2429; --soft: #56626b; --line: #dde3e7; --back: #f5f7f8; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
       color: var(--ink); background: #fff; max-width: 72rem; margin: 0 auto;
       padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { margin: 3rem 0 .3rem; font-size: 1.35rem; }
h3 { margin: 1.8rem 0 .1rem; font-size: 1rem; font-family: ui-monospace, "DejaVu Sans Mono",
     monospace; }
p { margin: .3rem 0 .9rem; max-width: 46rem; } p.lead, p.note { color: var(--soft); }
p.note { margin: 0 0 .5rem; font-size: .9rem; }
code { font-size: .9em; background: var(--back); padding: .1em .3em; border-radius: 3px; }
nav { margin: 1rem 0; font-size: .92rem; } nav a { margin-right: 1rem; color: #1b6ca8; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem;
         margin: 1.4rem 0; }
.card { background: var(--back); border: 1px solid var(--line); border-radius: 8px;
        padding: .8rem 1rem; font-size: .88rem; color: var(--soft); }
.card b { display: block; font-size: 1.35rem; color: var(--ink); line-height: 1.3; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0;
     font-size: .92rem; } dt { font-weight: 600; white-space: nowrap; } dd { margin: 0; }
.swatch { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px;
          margin-right: .45rem; }
.works { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr));
         gap: .8rem 1.6rem; }
.work { font-size: .84rem; font-variant-numeric: tabular-nums; }
.work h4 { font-size: .84rem; margin: 0 0 .15rem; color: var(--soft); font-weight: 600; }
.bar { display: grid; grid-template-columns: 5.2rem 1fr 9.4rem; gap: .5rem; align-items: center; }
.bar > span:first-child { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.bar > span:last-child { white-space: nowrap; }
.track { position: relative; height: .95rem; background: var(--back); border-radius: 2px; }
.track i { position: absolute; top: 0; bottom: 0; display: block; }
.track .fill { border-radius: 2px; left: 0; } .track .spread { background: #0007; top: 46%;
         bottom: 42%; } .track .floor { background: #000; width: 2px; top: -2px; bottom: -2px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid #9aa7af; white-space: nowrap; }
tbody tr:nth-child(even) { background: #fafbfc; }
.better { color: #22703a; } .worse { color: #b3391f; }
figure { margin: .6rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.table { overflow-x: auto; } summary { cursor: pointer; margin: .6rem 0; color: #1b6ca8; }
@media print { nav { display: none; } details > * { display: block; } }
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
        base = next((medians[name] for name in PLAIN if name in medians), None)
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
    run: dict[str, Any], changes: Iterable[Change] = (), command: str = "fastfusion bench"
) -> str:
    """The page.

    Args:
        run: what `fastfusion.benchmarking.measure` gives, or the rows of ``make bench``.
        changes: what `fastfusion.benchmarking.compare` gives, where two runs are compared.
        command: what made the rows, for the reader.

    Raises:
        ImportError: matplotlib is not installed.
    """
    colours = dict(zip(_contestants(run), itertools.cycle(_COLOURS)))
    sections = [
        (
            "against",
            "Against the other run",
            _comparison(list(changes)),
        ),
        (
            "latency",
            "Latency",
            "<p>The time of one call, work by work; a shorter bar is faster, and each work has its "
            "own scale; beside it stands how many times faster or slower than the definition in "
            "plain PyTorch it is. The thin line in a bar spans the quartiles, the tick is the "
            "<em>floor</em>, under which no program can be on this machine: each input read once "
            "and each output written once at the speed of a large copy, or the arithmetic at the "
            "speed of a matrix product, whichever takes longer.</p>"
            + _who(colours)
            + _latency(run, colours),
        ),
        (
            "roofline",
            "Roofline",
            _figure(
                _roofline(run, colours),
                "What the machine allows (black) and what each contestant makes of it; the higher "
                "the better. To the left the memory is the limit, to the right the arithmetic. "
                "Thin lines join the contestants of one work. Who reads or computes less than the "
                "definition asks for can be above the limit.",
            ),
        ),
        ("scaling", "Scaling", _scaling(run, colours)),
        ("machine", "Environment", _environment(run)),
        ("rows", "All rows", _html_table(*_table(run))),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<h2 id="{key}">{title}</h2>{text}' for key, title, text in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><title>fastfusion bench</title>'
        f"<style>{_STYLE}</style></head><body>"
        "<h1>fastfusion: how fast the operators run here</h1>"
        '<p class="lead">fastfusion is a PyTorch library of custom kernels for hyperspectral image '
        f"fusion. <code>{html.escape(command)}</code> timed its operators on one machine: each "
        "<em>work</em> is one operator on one size of image, and its contestants took turns in one "
        "process, so that whatever else the machine did falls on all of them. Shown are medians. "
        "A kernel whose result was not right got no figure.</p>"
        f"{_cards(run)}<nav>{links}</nav>{body}</body></html>\n"
    )


def _operation(row: dict[str, Any]) -> str:
    """The operator of a row; of one of ``make bench`` the first word of its work."""
    named = row["params"].get("operation")
    found = re.match(r"\w+_\w+", row["group"])
    return str(named or (found[0] if found else row["group"].split(",")[0]))


def _gains(run: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Who of this library takes part, and how many times faster than the definition, by work."""
    names = _contestants(run)
    ours = next((name for name in _OURS if name in names), names[0])
    gains = {}
    for group, rows in _groups(run).items():
        medians = {row["extra_info"]["contestant"]: row["stats"]["median"] for row in rows}
        base = next((medians[name] for name in PLAIN if name in medians), None)
        if base and ours in medians:
            gains[group] = base / medians[ours]
    return ours, gains


def _cards(run: dict[str, Any]) -> str:
    """The run in four sentences."""
    first = run["benchmarks"][0]["extra_info"]
    ours, gains = _gains(run)
    cards = []
    if gains:
        mean = math.exp(sum(map(math.log, gains.values())) / len(gains))
        best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
        slower = sum(gain < 1 for gain in gains.values())
        cards = [
            (f"{mean:.1f} times", f"faster than plain PyTorch: {ours}, the geometric mean of "
             f"{len(gains)} works"),
            (f"{gains[best]:.1f} times", f"where it gains most: {best}"),
            (f"{gains[worst]:.1f} times" if gains[worst] > 1 else
             f"{1 / gains[worst]:.1f} times slower", f"where it gains least: {worst}; slower than "
             f"plain PyTorch in {slower} of {len(gains)} works"),
        ]  # fmt: skip
    where = first["cpu"] if first.get("gpu", "none") == "none" else first["gpu"]
    threads = first["threads"]
    cards.append((f"{threads} thread{'s' * (threads != 1)}", f"{where}; torch {first['torch']}"))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{html.escape(big)}</b>{html.escape(small)}</div>'
            for big, small in cards
        )
        + "</div>"
    )


def _who(colours: dict[str, str]) -> str:
    """The contestants with their colours."""
    rows = "".join(
        f'<dt><span class="swatch" style="background:{colour}"></span>{html.escape(name)}</dt>'
        f"<dd>{html.escape(_WHO.get(name, 'what else a user could install'))}</dd>"
        for name, colour in colours.items()
    )
    return f"<dl>{rows}</dl>"


def _latency(run: dict[str, Any], colours: dict[str, str]) -> str:
    """Bars for each work, under the name of its operator."""
    operations: dict[str, list[str]] = {}
    notes: dict[str, str] = {}
    for group, rows in _groups(run).items():
        if len(rows) == 1 and rows[0]["extra_info"].get("series"):
            continue  # nobody to compare with: a point of the curves
        name = _operation(rows[0])
        about = [ABOUT.get(name, ""), rows[0]["extra_info"].get("note", "")]
        notes[name] = "; ".join(filter(None, about))
        operations.setdefault(name, []).append(_bars(group, rows, colours))
    return "".join(
        f'<h3>{html.escape(name)}</h3><p class="note">{html.escape(notes[name])}</p>'
        f'<div class="works">{"".join(works)}</div>'
        for name, works in operations.items()
    )


def _bars(group: str, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    medians = {row["extra_info"]["contestant"]: row["stats"]["median"] for row in rows}
    base = next((medians[name] for name in PLAIN if name in medians), None)
    floor = rows[0]["extra_info"]["floor"]
    whole = max([floor, *(row["stats"]["q3"] for row in rows)]) * 1.01
    lines = []
    for row in rows:
        stats, name = row["stats"], row["extra_info"]["contestant"]
        median, low, high = (100 * stats[key] / whole for key in ("median", "q1", "q3"))
        told = _time(stats["median"])
        if base and name not in PLAIN:
            gain = base / stats["median"]
            kind = "better" if gain > 1 else "worse"
            how = f"{gain:.1f}x faster" if gain > 1 else f"{1 / gain:.1f}x slower"
            told += f' <span class="{kind}">{how}</span>'
        lines.append(
            f'<div class="bar"><span title="{html.escape(name)}">{html.escape(name)}</span>'
            f'<span class="track"><i class="fill" style="width:{median:.2f}%;'
            f'background:{colours[name]}"></i><i class="spread" style="left:{low:.2f}%;'
            f'width:{high - low:.2f}%"></i><i class="floor" style="left:{100 * floor / whole:.2f}%"'
            f' title="floor {_time(floor)}"></i></span><span>{told}</span></div>'
        )
    title = group.removeprefix(_operation(rows[0])).strip(" ,") or "one call"
    return f'<div class="work"><h4>{html.escape(title)}</h4>{"".join(lines)}</div>'


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"


def _comparison(changes: Sequence[Change]) -> str:
    """What changed beyond the noise, the largest change first; the rest folded away."""
    if not changes:
        return ""
    ranked = sorted(changes, key=lambda change: -abs(math.log(change.ratio)))
    changed = [change for change in ranked if change.beyond_noise]
    rest = [change for change in ranked if not change.beyond_noise]
    faster = sum(change.ratio > 1 for change in changed)
    head = ["row", "change"]
    text = (
        f"<p>Of {len(changes)} rows in both runs {faster} got faster, {len(changed) - faster} "
        f"slower, and {len(rest)} stayed within the noise. A change counts where the quartiles of "
        "the two runs do not overlap, neither as they are nor against the definition in plain "
        "PyTorch, which tells when the whole machine was slower. What differs between two starts "
        "of a program (where its memory lies, who else runs) is in no quartile: a small change is "
        "to be believed when it comes back in a third run.</p>"
    )
    if changed:
        marks = ["better" if change.ratio > 1 else "worse" for change in changed]
        text += _html_table(head, [[c.name, str(c)] for c in changed], marks)
    if rest:
        rows = _html_table(head, [[c.name, str(c)] for c in rest])
        text += f"<details><summary>{len(rest)} rows within the noise</summary>{rows}</details>"
    return text


def _environment(run: dict[str, Any]) -> str:
    first = run["benchmarks"][0]["extra_info"]
    rounds = [row["stats"]["rounds"] for row in run["benchmarks"]]
    return _html_table(
        ["what", "value"],
        [
            ["processor", first["cpu"]],
            ["instruction set of the kernels", first["capability"]],
            ["threads", first["threads"]],
            ["GPU", first.get("gpu", "none")],
            ["large copy, read + write", f"{first['bandwidth'] / 1e9:.1f} GB/s"],
            ["float32 matrix product", f"{first['matrix_rate'] / 1e9:.0f} GFLOP/s"],
            ["torch", first["torch"]],
            ["Python", first["python"]],
            ["fastfusion", first["fastfusion"]],
            ["rounds of each contestant", f"{min(rounds)} to {max(rounds)}"],
            ["when", run["datetime"]],
        ],
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


def _figures() -> Any:
    return need("matplotlib.figure", extra="plot", purpose="drawing the page")


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # the text stays text
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1
    )


def _contestants(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["extra_info"]["contestant"] for row in run["benchmarks"]))


def _roofline(run: dict[str, Any], colours: dict[str, str]) -> str:
    # Not pyplot: no state is shared, and nothing is opened.
    figure = _figures().Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    works = [rows for rows in _groups(run).values() if rows[0]["extra_info"]["flops"] > 0]
    if all("pixels" in rows[0]["extra_info"] for rows in works):  # the largest size of each
        works.sort(key=lambda rows: rows[0]["extra_info"]["pixels"])
        works = list({_operation(rows[0]): rows for rows in works}.values())
    limits = run["benchmarks"][0]["extra_info"]
    bandwidth, rate = limits["bandwidth"], limits["matrix_rate"]
    found = [rows[0]["extra_info"]["flops"] / rows[0]["extra_info"]["moved"] for rows in works]
    low, high = min([*found, 0.1]) / 2, max([*found, 10.0]) * 2
    steps = [low * (high / low) ** (i / 99) for i in range(100)]
    axes.loglog(steps, [min(s * bandwidth, rate) / 1e9 for s in steps], color="black")
    for told, x, y, where in (
        (
            f"arithmetic: {rate / 1e9:.0f} GFLOP/s",
            rate / bandwidth,
            rate / 1e9,
            ("right", "bottom"),
        ),
        (f"memory: {bandwidth / 1e9:.0f} GB/s", low, low * bandwidth / 1e9, ("left", "top")),
    ):
        axes.text(x, y, told, ha=where[0], va=where[1], fontsize=8, style="italic")
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in colours}
    tops: list[tuple[float, float, str]] = []
    for rows, at in zip(works, found, strict=True):
        heights = []
        for row in rows:
            heights.append(row["extra_info"]["flops"] / row["stats"]["median"] / 1e9)
            points[row["extra_info"]["contestant"]].append((at, heights[-1]))
        axes.plot([at, at], [min(heights), max(heights)], color="#bbb", lw=0.8, zorder=1)
        tops.append((at, max(heights), _operation(rows[0])))
    for name, places in points.items():
        if places:
            x, y = zip(*places, strict=True)
            axes.scatter(x, y, color=colours[name], label=name, s=26, zorder=2)
    if len(works) <= 15:
        _name(axes, tops)
    axes.set_xlabel("FLOPs a byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return _svg(figure, "Roofline: GFLOP/s over FLOPs a byte, and the limits of the machine")


def _name(axes: Any, places: Sequence[tuple[float, float, str]]) -> None:
    """Labels beside points of a log-log plot, each at the nearest height that is free."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = 680 / math.log(right / left), 340 / math.log(top / bottom)  # in points
    taken: list[tuple[float, float, float]] = []
    for x, y, text in sorted(places, key=lambda place: -place[1]):
        long = 4.0 * len(text)
        start, level = width * math.log(x / left), height * math.log(y / bottom)
        right_of = start + long < 660
        begin = start + 5 if right_of else start - 5 - long
        for shift in (0, *(sign * 9 * step for step in range(1, 20) for sign in (-1, 1))):
            if all(
                begin + long < b or e < begin or abs(level + shift - at) > 8.5 for b, e, at in taken
            ):
                break
        taken.append((begin, begin + long, level + shift))
        axes.annotate(
            text,
            (x, y),
            (5 if right_of else -5, shift - 2),
            textcoords="offset points",
            ha="left" if right_of else "right",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4},
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999"} if shift else None,
        )


def _scaling(run: dict[str, Any], colours: dict[str, str]) -> str:
    """The time of a pixel over the size, a panel an operator; "" where all have one size."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in run["benchmarks"]:
        extra = row["extra_info"]
        name, pixels = _operation(row), extra.get("pixels")
        if extra.get("series"):  # of `make bench`: what grows, and an image's side
            name, pixels = extra["series"][0], extra["series"][1] ** 2
        if pixels:
            lines = panels.setdefault(name, {})
            point = (pixels, 1e9 * row["stats"]["median"] / pixels)
            lines.setdefault(extra["contestant"], []).append(point)
    panels = {n: lines for n, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not panels:
        return ""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figures().Figure(figsize=(3.5 * columns, 0.4 + 2.1 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, lines) in zip(places, panels.items(), strict=False):
        for contestant, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            axes.semilogx(x, y, marker="o", ms=3.5, lw=1.4, color=colours[contestant])
        axes.set_ylim(bottom=0)
        sizes = sorted({pixels for points in lines.values() for pixels, _ in points})
        axes.set_xticks(sizes, map(_side, sizes))
        axes.minorticks_off()
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", alpha=0.25)
    figure.supxlabel("pixels of the image", fontsize=9)
    figure.supylabel("ns a pixel", fontsize=9)
    return _figure(
        _svg(figure, "Nanoseconds a pixel over the number of pixels, a panel for each operator"),
        "Nanoseconds a pixel (all channels) over the number of pixels, in the colours from above. "
        "A flat line means that the time grows as the image does; what falls to the right has a "
        "fixed cost that small images pay.",
    )


def _side(pixels: int) -> str:
    """The number of pixels as a square where it is one."""
    side = math.isqrt(pixels)
    return f"{side}²" if side * side == pixels else f"{pixels:,}"
