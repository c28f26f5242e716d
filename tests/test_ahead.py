"""What runs beside the tests is what the test would have run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ahead


def job(number: int) -> ahead.Command:
    return ahead.Command([sys.executable, "-c", f"print({number})"], {})


@pytest.mark.ahead(command=job)
@pytest.mark.parametrize("number", [1, 2])
def test_a_result_is_there(number: int) -> None:
    done = ahead.result(job, number=number)
    assert (done.returncode, done.stdout) == (0, f"{number}\n")
    assert ahead.result(job, number=number).stdout == done.stdout  # a second time: run here


TESTS = """
import subprocess, sys
import pytest
from tests import ahead
def job(name):
    code = "import sys, time; open(sys.argv[1], 'w'); time.sleep(600)"
    return ahead.Command([sys.executable, "-c", code, name], {{}})
@pytest.mark.skipif(True, reason="not here")
@pytest.mark.ahead(command=job)
@pytest.mark.parametrize("name", ["{0}/skipped"])
def test_skipped(name): pass
@pytest.mark.ahead(command=job)
@pytest.mark.parametrize("name", ["{0}/begun", "{0}/later"])
def test_fails(name):
    import pathlib, time
    while not pathlib.Path("{0}/begun").exists(): time.sleep(0.01)
    assert False
"""


def test_nothing_outlives_the_tests(tmp_path, monkeypatch):
    """The second process is never started, the first ends with the run that did not ask for it."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("nothing is started ahead on one core")
    (tmp_path / "test_it.py").write_text(TESTS.format(tmp_path))
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ahead.ROOT)}
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), "-x", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert "1 failed, 1 skipped" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("*") if not path.suffix) == ["begun"]
