"""Every public function, one bad argument at a time: the documented error, by name, at once.

tests/ops/test_bad_input.py holds the wording of the operators' messages.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from tests.reliability.bad_arguments import Public
from tests.reliability.effort import counted
from tests.reliability.public import PUBLIC

#: Memory that the refusal of a call may take, in MiB; the cases claim terabytes.
ROOM = 64


def peak_memory() -> float:
    """The most that this process has held in memory so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def what_is_wrong(public: Public, argument: str, value: object) -> str | None:
    """None when the call is refused as it should be."""
    arguments = public.good() | {argument: value}
    before = peak_memory()
    try:
        public.function(**arguments)
    except (TypeError, ValueError, *public.errors) as error:
        message = str(error)
        names = (argument, *public.together)
        if not message.strip():
            return f"{type(error).__name__} says nothing"
        if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names) and (
            str(value) not in message or not str(value)
        ):
            return f"{type(error).__name__} does not name it: {message[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    else:
        return "is taken"
    taken = peak_memory() - before
    return f"takes {taken:.0f} MiB to be refused" if taken > ROOM else None


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_is_refused_by_name(public: Public) -> None:
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for argument, what, value in public.cases():
            fault = what_is_wrong(public, argument, value)
            counted("bad arguments", "calls refused" if fault is None else "calls not refused")
            if fault is not None:
                wrong.append(f"{argument}, {what}: {fault}")
    assert not wrong, f"{len(wrong)} of them\n" + "\n".join(wrong)


def test_the_table_is_long_and_covers_all_that_is_public() -> None:
    import fastfusion.data
    import fastfusion.metrics
    import fastfusion.nn
    import fastfusion.ops

    cases = sum(1 for public in PUBLIC for _ in public.cases())
    counted("bad arguments", "public functions and classes", len(PUBLIC))
    assert cases >= 2000
    covered = {
        re.split(r"[().]", public.name.removesuffix("()").split(".", 1)[-1])[0] for public in PUBLIC
    }
    elsewhere = {"CONVENTIONS", "atomic_path", "Scene", "SpectralResponse", "scene_names"}
    for module in (fastfusion.ops, fastfusion.nn, fastfusion.metrics, fastfusion.data):
        missing = {n for n in module.__all__ if callable(getattr(module, n))} - covered - elsewhere
        assert not missing, f"{module.__name__}: {sorted(missing)}"


def test_the_good_calls_are_good() -> None:
    """So that each bad call is refused for its bad argument alone."""
    cannot = ("load", "save", "from_official", "read_srf", "read_response", "save_figure")
    slow = ("training.train", "fit", "run_across_scales", "fuse_files")
    for public in PUBLIC:
        if not public.name.endswith((*cannot, *slow, "train_on_pair")):
            public.function(**public.good())
