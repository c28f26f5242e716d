"""Timing operators: the rows, the checks before them, the comparison, the page."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from benchmarks import models, report
from benchmarks.lsm import LSM
from fastfusion import benchmarking, machine, reports
from fastfusion.cli import main

SHAPE = [(1, 8, 8, 8)]


@pytest.fixture(scope="module")
def run():
    return benchmarking.measure(
        list(benchmarking.OPERATIONS), [(1, 16, 8, 8), (1, 16, 16, 16)], seconds=0.001
    )


def test_every_operator_has_rows(run):
    names = {row["name"] for row in run["benchmarks"]}
    assert len(names) == len(run["benchmarks"]) == 4 * len(benchmarking.OPERATIONS)
    for row in run["benchmarks"]:
        stats, extra = row["stats"], row["extra_info"]
        assert 0 < stats["min"] <= stats["q1"] <= stats["median"] <= stats["q3"] <= stats["max"]
        assert extra["moved"] > 0 and extra["floor"] > 0
        assert extra["flops"] > 0 or "mixing" in row["name"]


def test_forward_and_backward_and_every_contestant():
    run = benchmarking.measure(
        ["haar_dwt2d"], SHAPE, contestants=["auto", "reference"], backward=True, seconds=0.001
    )
    contestants = [row["extra_info"]["contestant"] for row in run["benchmarks"]]
    assert contestants == ["auto", "reference", "definition"]
    assert "forward + backward" in run["benchmarks"][0]["group"]


def test_a_wrong_kernel_gets_no_figure(monkeypatch):
    from fastfusion.ops.operator import OPERATORS

    def wrong(x, *rest):
        return 1.001 * OPERATORS["depthwise_conv2d"].reference(x, *rest)

    operator = OPERATORS["depthwise_conv2d"]
    good = operator.backends["reference"]
    # In float64 it is right: the truth is computed by the same backend.
    monkeypatch.setitem(
        operator.backends,
        "cpp",
        dataclasses.replace(good, forward=wrong),
    )
    with pytest.raises(RuntimeError, match="no figure for depthwise_conv2d"):
        benchmarking.measure(["depthwise_conv2d"], SHAPE, seconds=0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["nothing"],), "op: expected one of .*haar_dwt2d.*, got 'nothing'"),
        ((["haar_dwt2d"], [(1, 2, 3)]), "shape: expected BxCxHxW"),
        ((["haar_dwt2d"], [(1, 0, 3, 3)]), "shape: expected BxCxHxW"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmarking.measure(*arguments)


def test_a_backend_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    with pytest.raises(ValueError, match="backend 'cuda' cannot be timed here"):
        benchmarking.measure(["haar_dwt2d"], SHAPE, contestants=["cuda"])


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]


def test_the_page_needs_nothing_else(run):
    changes = benchmarking.compare(run, run)
    page = reports.page(run, changes)
    tags = _Tags()
    tags.feed(page)
    assert tags.seen.count("svg") == 2 and "script" not in tags.seen and "link" in tags.seen
    assert all(address.startswith(("#", "data:")) for address in tags.addresses)
    # Names of XML's own are no addresses; nothing else may name a place on a network.
    named = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<rdf.*?</rdf:RDF>', "", page, flags=re.S)
    assert re.search(r"https?:|//\w|@import|url\((?!#)", named) is None
    for row in run["benchmarks"]:
        assert row["group"] in page
        assert f"{benchmarking.ABOUT[row['params']['operation']]}" in html.unescape(page)
    assert page.count('class="bar"') == len(run["benchmarks"])
    assert "within the noise" in page


def test_the_page_in_a_browser(run, tmp_path):
    """Headless Chromium shows it, with its text and without a word in the console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "bench.html"
    page.write_text(reports.page(run))
    told = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "how fast the operators run here" in told.stdout
    assert told.stdout.count("<svg") == 2
    assert "CONSOLE" not in told.stderr


def test_the_command(tmp_path, capsys):
    options = ["bench", "--op", "haar_split2d", "--shape", "1x4x8x8", "--seconds", "0.001"]
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    assert "haar_split2d 1x4x8x8 float32" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {"bench.json", "bench.csv", "bench.html"}
    rows = list(csv.DictReader((tmp_path / "a" / "bench.csv").open()))
    assert [row["contestant"] for row in rows] == ["auto", "definition"]
    earlier = tmp_path / "a" / "bench.json"
    assert main([*options, "--compare", str(earlier)]) == 0
    assert "haar_split2d[1x4x8x8-float32-auto]:" in capsys.readouterr().out
    # pytest-benchmark's own tools read the file.
    assert {"machine_info", "benchmarks", "datetime", "version"} <= json.loads(
        earlier.read_text()
    ).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "nothing"], "op: expected one of"),
        (["--shape", "1x2"], "--shape: expected BxCxHxW"),
        (["--seconds", "0"], "--seconds: expected more than 0"),
        (["--compare", "nowhere.json"], "No such file"),
    ],
)
def test_bad_usage(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_run(tmp_path, capsys):
    for text in ("{}", "not json", '{"benchmarks": [{"name": "x", "stats": {}}]}'):
        (tmp_path / "x.json").write_text(text)
        assert main(["bench", "--compare", str(tmp_path / "x.json")]) == 2
        assert "is no bench.json" in capsys.readouterr().err


# -- make bench -----------------------------------------------------------------------------------


def _repository_run(scale):
    """What pytest-benchmark writes of `benchmarks.rows.record`, for one piece of work."""
    extra = {"moved": 1e6, "flops": 1e6, "floor": 1e-4, "bandwidth": 1e10, "matrix_rate": 1e11}
    extra |= {"peak_memory": 0, "target": {"eager": 4.0}, **machine.describe()}
    rows = []
    for contestant, median in {"fastfusion": scale, "eager": 3e-3, "PyWavelets": 2e-3}.items():
        stats = dict.fromkeys(("min", "q1", "median", "q3", "max", "iqr", "mean"), median)
        rows.append(
            {
                "group": "haar_dwt2d",
                "name": f"bench[haar_dwt2d-{contestant}]",
                "params": {"row": "UNSERIALIZABLE", "contestant": contestant},
                "extra_info": {"contestant": contestant, **extra},
                "stats": {**stats, "rounds": 5},
            }
        )
    return {"benchmarks": rows, "datetime": "2026-01-01T00:00:00+00:00", "version": "5"}


def test_make_bench_writes_the_page_and_compares(tmp_path, monkeypatch, capsys):
    for name, scale in (("before", 2e-3), ("bench", 1e-3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(_repository_run(scale)))
    page = tmp_path / "page.md"
    arguments = ["report", "--write", str(page), "--json", str(tmp_path / "bench.json")]
    arguments += ["--compare", str(tmp_path / "before.json")]
    monkeypatch.setattr("sys.argv", arguments)
    assert report.main() == 0
    assert "bench[haar_dwt2d-fastfusion]: 2.00 times faster" in capsys.readouterr().out
    assert "eager 3.00" in page.read_text() and "**3.00**" in page.read_text()
    drawn = (tmp_path / "bench.html").read_text()
    assert "make bench" in drawn and "2.00 times faster" in drawn and "PyWavelets" in drawn
    tags = _Tags()
    tags.feed(drawn)
    assert tags.seen.count("svg") == 1  # one size only: no curves
    assert all(address.startswith(("#", "data:")) for address in tags.addresses)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"page.md", "page.csv", "page.png", "bench.html"} <= written
    # The same file can be given to the command, which here shares no row with it.
    options = ["bench", "--op", "haar_split2d", "--shape", "1x4x8x8", "--seconds", "0.001"]
    assert main([*options, "--compare", str(tmp_path / "bench.json")]) == 0
    assert "no row in common" in capsys.readouterr().out


def test_make_bench_keeps_what_was_written_by_hand(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench.json").write_text(json.dumps(_repository_run(1e-3)))
    page = tmp_path / "page.md"
    arguments = ["report", "--write", str(page), "--json", str(tmp_path / "bench.json")]
    monkeypatch.setattr("sys.argv", arguments)
    assert report.main() == 0
    assert "notes were kept" not in capsys.readouterr().out
    fresh = page.read_text()
    assert "Measured on 2026-01-01." in fresh
    page.write_text(fresh.replace("haar_dwt2d", "an old row") + "\n## Notes\n\n- The second run.\n")
    assert report.main() == 0
    assert page.read_text() == fresh + "\n## Notes\n\n- The second run.\n"
    assert "notes were kept" in capsys.readouterr().out


def test_a_busy_machine_is_no_change():
    before, after = _repository_run(1e-3), _repository_run(1e-3)
    for row in after["benchmarks"]:  # everybody takes three times as long
        for key in ("q1", "median", "q3"):
            row["stats"][key] *= 3
    ours, eager, _ = benchmarking.compare(before, after)
    assert not ours.beyond_noise and ours.control == pytest.approx(1 / 3)
    assert str(ours) == "within the noise (0.33; the definition 0.33)"
    assert eager.beyond_noise  # nothing tells whether PyTorch or the machine
    for key in ("q1", "median", "q3"):  # and ours nine times, which is its own
        after["benchmarks"][0]["stats"][key] *= 3
    ours, *_ = benchmarking.compare(before, after)
    assert ours.beyond_noise and str(ours) == "9.00 times slower"
    # Where only the machine got faster, the kernel that stayed as it was did not get slower.
    for row, factor in zip(after["benchmarks"], (1 / 9, 1 / 9, 1), strict=True):
        for key in ("q1", "median", "q3"):
            row["stats"][key] *= factor
    ours, *_ = benchmarking.compare(before, after)
    assert not ours.beyond_noise and ours.control == pytest.approx(3)


def test_the_page_of_whole_models(tmp_path, monkeypatch, capsys):
    """A model measured again takes the place of its line; the other lines stay."""
    page = tmp_path / "models.md"
    lines = [[name, "1 x 2", "inference", *5 * ["1.0"]] for name in ("ConvNeXt-Tiny", "LSM")]
    page.write_text(models.page(lines))
    monkeypatch.setitem(
        models.CASES, "LSM", (lambda: LSM(channels=1, width=8, scales=2), [(1, 1, 16, 16)], True)
    )
    arguments = ["models", "--models", "LSM", "--seconds", "0.001", "--write", str(page)]
    monkeypatch.setattr("sys.argv", arguments)
    models.main()
    rows = [line[2:-2].split(" | ") for line in page.read_text().splitlines() if "| 1 x" in line]
    assert rows[0] == lines[0]
    assert [row[:3] for row in rows[1:]] == [
        ["LSM", "1 x 1 x 16 x 16", "inference"],
        ["LSM", "1 x 1 x 16 x 16", "training step"],
    ]
    assert rows[2][7] == "2 latent operator"
    assert all(float(row[6]) < 1e-4 for row in rows[1:])
