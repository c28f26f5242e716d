"""How much the reliability tests try: a little beside the other tests, much under `make torture`.

``FASTFUSION_TORTURE=1`` asks for the long profile, 0.1 for a tenth of its counts. What the tests
count (`counted`) is told at the end of the run, and written as JSON to the file that
``FASTFUSION_TORTURE_FIGURES`` names.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TypeVar

SHARE = float(os.environ.get("FASTFUSION_TORTURE", "0"))
TORTURE = SHARE > 0
_Value = TypeVar("_Value")

#: What was counted, by the part of the tests and by the thing.
FIGURES: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))


def effort(short: _Value, long: _Value) -> _Value:
    """The value for the profile that runs."""
    if isinstance(short, int) and isinstance(long, int) and not isinstance(short, bool):
        return max(short, round(SHARE * long))  # type: ignore[return-value]
    return long if TORTURE else short


def counted(part: str, thing: str, number: float = 1) -> None:
    """Add to a figure."""
    FIGURES[part][thing] += number


def largest(part: str, thing: str, number: float) -> None:
    """Keep the largest of the figures."""
    FIGURES[part][thing] = max(FIGURES[part].get(thing, number), number)
