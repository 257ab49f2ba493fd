"""A `fit` in a process of its own, for verbs that train more than once: what a user gets is what they compare.

Options in, seconds out. The whole output goes to a log; only the step lines are shown. Lightning is imported there and
not here, and each run's memory is given back (5 s to start one, on a CPU).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from minimind_sft.files import PROJECT


def run_fit(options: Sequence[str], log: Path, *, append: bool = False) -> float:
    """Run `fit` with these options; `log` keeps its output, after what is there where `append` is set.

    Returns:
        The seconds it took.

    Raises:
        ValueError: the run failed; with its last line, which names its mistake.
    """
    command = [sys.executable, "-m", "minimind_sft", "fit", *options]
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    with (
        open(log, "a" if append else "w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith("epoch "):
                print(f"  {line.rstrip()}", flush=True)
    if process.returncode:
        tail = " ".join(log.read_text(encoding="utf-8").strip().splitlines()[-1:])
        raise ValueError(
            f"the run {log.stem} ended with status {process.returncode}: {tail.removeprefix('minimind_sft: error: ')}"
        )
    return time.monotonic() - started
