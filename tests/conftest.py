"""Fixtures that every test file may use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real and golden data beside the checkout; tests that need it skip where it is not there."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs the golden data in {SHARED.name}/ beside the checkout")
    return SHARED
