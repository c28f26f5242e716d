"""Tells, and keeps, what the reliability tests counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.reliability.effort import FIGURES


def pytest_terminal_summary(terminalreporter):
    if not FIGURES:
        return
    terminalreporter.section("counted")
    for part, things in FIGURES.items():
        figures = ", ".join(f"{number:,.10g} {thing}" for thing, number in things.items())
        terminalreporter.write_line(f"{part}: {figures}")
    if "FASTFUSION_TORTURE_FIGURES" in os.environ:
        Path(os.environ["FASTFUSION_TORTURE_FIGURES"]).write_text(json.dumps(FIGURES, indent=1))
