"""Fixtures and options that every test shares."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine that only runs the tests of its GPU
    settings = None

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"
MEMORY = Path("/dev/shm")
ROOM = 4 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the counted checks at their full size (minutes)")


def pytest_configure(config: pytest.Config) -> None:
    """Draw the same examples in every run, and new ones by `--full`; that a machine is busy fails none of them."""
    if settings is not None:
        again = not config.getoption("--full")
        quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
        settings.register_profile("tests", derandomize=again, **quiet)
        settings.load_profile("tests")
    # Every commit of a store waits for the disk, thousands of times: with room in memory, files are there.
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_finish() -> None:
    """Leave what the tests import out of every later pass of the garbage collector, as the server does."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        for item in items:
            item.add_marker(pytest.mark.timeout(4 * 3600))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether counted checks run at their full size."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_dir(shared: Path) -> Path:
    """The official Qwen3-Reranker tokenizer, byte for byte."""
    return shared / "tokenizer"
