"""Tells, and keeps, what the reliability tests counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.reliability.effort import FIGURES, counted


def pytest_runtest_logreport(report):
    """After each test, so that a run that is stopped has told what it did until then."""
    if "FASTFUSION_TORTURE_FIGURES" not in os.environ:
        return
    if report.when == "call" or report.outcome == "failed":
        counted("tests", report.outcome)
    if report.outcome == "failed":
        counted("failed", report.nodeid.rpartition("::")[2])
    Path(os.environ["FASTFUSION_TORTURE_FIGURES"]).write_text(json.dumps(FIGURES, indent=1))


def pytest_terminal_summary(terminalreporter):
    if not FIGURES:
        return
    terminalreporter.section("counted")
    for part, things in FIGURES.items():
        figures = ", ".join(f"{number:,.10g} {thing}" for thing, number in things.items())
        terminalreporter.write_line(f"{part}: {figures}")
