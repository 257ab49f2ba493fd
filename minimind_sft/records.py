"""What a run leaves on disk besides its checkpoints: `metrics.csv`, written so that a crash cannot make it lie.

One row per step that has something to say. A row is complete when the next step begins or when a checkpoint is about
to be written, whichever comes first, and is then on disk; on resume, rows past the checkpoint's step are cut off. So
the file of a run that was killed and resumed is the file of a run that was not (but for the times).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

COLUMNS = (
    "step",
    "epoch",
    "train/loss",
    "lr",
    "grad_norm",
    "train/replay",
    "replay_weight",
    "train/ekfac",
    "val/chat/loss",
    "val/chat/perplexity",
    "val/pretrain/loss",
    "val/pretrain/bits_per_byte",
    "val/forgetting",
    "val/own_chats/loss",
    "val/own_chats/forgetting",
    "tokens_per_second",
    "seconds",
)
CLOCK = 2  # columns at the end that a clock fills


class MetricsFile(Logger):
    """Appends to `metrics.csv` in a folder; metrics without a column of their own are left to other loggers.

    Args:
        folder: where it lies.
        terms: names of the user's own losses, for a column each.
    """

    def __init__(self, folder: Path, terms: Sequence[str] = ()) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.columns = _with(COLUMNS, [f"train/{name}" for name in terms])
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of `step`."""
        if step is None or not metrics.keys() & set(self.columns):
            return
        if self._row.get("step", step) != step:
            self.save()
        self._row |= {"step": step} | {name: value for name, value in metrics.items() if name in self.columns}

    @rank_zero_only
    def save(self) -> None:
        """Put the row on disk."""
        if not self._row:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(self._row)
            file.flush()
            os.fsync(file.fileno())
        self._row = {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def cut_after(self, step: int) -> None:
        """Drop rows past `step`, and a last row that was not written whole. Columns of the file are kept."""
        if not self.path.is_file():
            return
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            kept = [row for row in rows if row["seconds"] is not None and int(row["step"]) <= step]
        self.columns = _with(self.columns, rows.fieldnames or ())
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, self.path)


def _with(columns: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """The columns and those of `more` that are not among them, in front of what is read off the clock: the last one
    tells whether a row is whole."""
    new = [name for name in more if name not in columns]
    return (*columns[:-CLOCK], *new, *columns[-CLOCK:])
