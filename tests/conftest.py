"""What every test shares: poisoned memory, fixed seeds, real scenes where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests import ahead
from tests.reliability.effort import TORTURE

ROOT = Path(__file__).resolve().parents[1]

# Tests on shared machines are slow at times; what they try beside other tests is always the same,
# so that a change that breaks nothing passes.
hypothesis.settings.register_profile(
    "fastfusion",
    deadline=None,
    database=None,
    derandomize=not TORTURE,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,  # ours reset what every example may share
    ],
)
hypothesis.settings.load_profile("fastfusion")


def pytest_configure(config):
    config.addinivalue_line("markers", "ahead(command): starts with the run (tests/ahead.py)")


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        ahead.start(session.items)


def pytest_sessionfinish(session):
    ahead.stop()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill every uninitialised tensor with NaN, so that no result can depend on one in silence."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def scenes() -> Path:
    """The folder of real scenes; the test is skipped, with the reason, where it is not there."""
    folder = Path(os.environ.get("FASTFUSION_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real scenes are not at {folder} (name their folder in FASTFUSION_DATA)")
    return folder
