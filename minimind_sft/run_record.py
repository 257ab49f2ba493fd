"""What is known of a run once it is over, or while it trains: what a report is made of.

`run_files.py` reads it from a run directory. What a run has not got, because it is still training, was stopped or was
made by an older version, is None or empty.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"
ASKED = {  # in words: the ways of asking (`probes.WAYS`), and where a fact stands
    "raw": "raw text",
    "chat": "as a chat",
    "raw_choice": "choice, raw text",
    "chat_choice": "choice, as a chat",
    "in_sft": "in the chats",
    "not_in_sft": "not in the chats",
}
COUNTS = ("probes", "before", "after", "kept", "lost", "gained")


class Look(NamedTuple):
    """One reading of a run; losses in nats per token, None where there was nothing to measure on."""

    step: int
    chat: float | None
    text: float | None
    forgetting: float | None
    bits: float | None = None  # of the text, per byte


class Source(NamedTuple):
    """What was forgotten of one source of the text, in nats per token, from the base to the end."""

    name: str
    documents: int | None
    before: float
    forgetting: float


class Fact(NamedTuple):
    """A fact that was lost or gained."""

    name: str
    way: str  # one of `probes.WAYS`
    in_sft: bool
    answer: str
    said: str  # by the model in the end


class Facts(NamedTuple):
    """The fact probes; see `probes.compare`."""

    groups: dict[str, dict[str, int]]  # raw/not_in_sft and so on -> COUNTS
    kept: list[str]  # names, asked in raw text
    lost: list[Fact]
    gained: list[Fact]


class Run(NamedTuple):
    """A run, as far as its directory tells."""

    name: str  # told apart from those of other runs
    folder: Path
    state: str  # FINISHED, RUNNING or STOPPED
    metrics: list[dict[str, float]]  # the rows of metrics.csv
    looks: list[Look]
    best: Look | None  # of `best.ckpt` where the run ended, else the best so far
    best_on: float  # the share of the documents that it was looked at on, where the run ended
    ended: int | None  # step of its summary; an earlier one than its last where it went on from there
    seen: str | None  # seen, unseen or another word for the text; None where it is not told
    sources: list[Source]
    facts: Facts | None
    answers: list[dict[str, str]]
    settings: dict[str, str]  # flat, by the names of the command line
    sample: dict[str, Any] | None
    record: dict[str, Any]  # command, versions, base, hashes

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.metrics[-1]["step"]) if self.metrics else (self.ended or 0)

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the log (of two the lower one), so that looks and breaks do not count."""
        rows = [(row["step"], row["seconds"]) for row in self.metrics if "seconds" in row]
        steps = [(end - start, after - before) for (before, start), (after, end) in zip(rows, rows[1:], strict=False)]
        return statistics.median_low(seconds / count for seconds, count in steps if count > 0) if steps else None

    @property
    def epochs(self) -> float | None:
        """Epochs done."""
        return self.metrics[-1].get("epoch") if self.metrics else None
