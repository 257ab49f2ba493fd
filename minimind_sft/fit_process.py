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


def run_fit(
    options: Sequence[str], log: Path, *, append: bool = False, tag: str = "", threads: int | None = None
) -> float:
    """Run `fit` with these options.

    Args:
        options: the command line after `fit`.
        log: keeps the output.
        append: keep what is in the log already.
        tag: what every step line that is shown begins with.
        threads: that it computes with, on a CPU, where `OMP_NUM_THREADS` does not say; null for one per core.

    Returns:
        The seconds it took.

    Interrupted, it lets the run save its last step first.

    Raises:
        ValueError: the run failed; with its last line, which names its mistake.
    """
    command = [sys.executable, "-m", "minimind_sft", "fit", *options]
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with (
        open(log, "a" if append else "w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if line.startswith("epoch "):
                    print(f"  {tag}{line.rstrip()}", flush=True)
        except BaseException:  # Ctrl-C reaches it as well, and it must be read until it has saved
            process.terminate()
            file.writelines(process.stdout)
            raise
    if process.returncode:
        tail = " ".join(log.read_text(encoding="utf-8").strip().splitlines()[-1:])
        raise ValueError(
            f"the run {log.stem} ended with status {process.returncode}: {tail.removeprefix('minimind_sft: error: ')}"
        )
    return time.monotonic() - started
