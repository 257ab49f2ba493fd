"""Verbs in processes of their own, for what one process cannot show."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def run_verb(verb: str, arguments: Sequence[str], cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a verb to its end, with one thread, whatever its status."""
    return subprocess.run(
        [sys.executable, "-m", "minimind_sft", verb, *arguments],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        cwd=cwd, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
