"""Fixtures that every test file may use. Test files run in one process per core (`-n 0` for one after the other)."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # else every process would start a thread per core, and wait for the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real and golden data beside the checkout; tests that need it skip where it is not there."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs the golden data in {SHARED.name}/ beside the checkout")
    return SHARED
