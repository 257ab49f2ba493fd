"""The guard: looks at every step before it is taken, and says which documents are behind a bad one.

A loss or gradient that is not finite stops the run before the weights change; the last checkpoint is then still good.
With `skip` the step is left out instead, until too many follow each other. A loss that jumps far above its running mean
is only noted: one bad document is worth knowing about, but no reason to stop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minimind_sft.strict_json import finite

NAMED = 8  # documents spelled out in a message; all of them are in the file
WARM = 20  # steps before a jump can be told from the start of training
MAX_OVERFLOWS = 24  # in a row; a gradient scaler that begins at 2^16 is at 1 after 16


class StepResult(NamedTuple):
    """What one optimizer step is like, before it is taken."""

    step: int  # from 1
    loss: float  # nats per supervised token of the window, over all ranks
    grad_norm: float  # before clipping
    learning_rate: float
    terms: dict[str, float] = {}  # what holds on, by name: nats before the weight
    weights: dict[str, float] = {}  # and the weight
    stopping: bool = False  # whether any process was asked to stop


class Guard:
    """Decides whether a step is taken.

    Args:
        folder: where the documents of bad steps are written; None for nowhere.
        speaks: whether it says what it saw: of several processes, one is enough.
        on_nonfinite: `stop`, or `skip` the step.
        max_skipped: steps skipped in a row after which the run stops all the same.
        spike_ratio: note a loss above this multiple of its running mean; None for never.
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
        spike_ratio: float | None = None,
        speaks: bool = True,
    ) -> None:
        if spike_ratio is not None and not spike_ratio > 1.0:
            raise ValueError(f"spike_ratio is {spike_ratio}; it is a multiple of the running mean and must be above 1")
        self.folder, self.on_nonfinite, self.max_skipped = folder, on_nonfinite, max_skipped
        self.spike_ratio, self.speaks = spike_ratio, speaks
        self.skipped = 0  # in a row
        self.overflows = 0  # in a row: steps that the gradient scaler leaves out
        self._mean, self._seen = 0.0, 0

    def takes(self, result: StepResult, documents: Callable[[], list[str]], *, scaled: bool = False) -> bool:
        """Whether to take the step.

        Args:
            result: the step.
            documents: the window's documents as `file:line`, asked for only when the step is bad.
            scaled: a gradient scaler is at work, which leaves out steps with overflowing gradients itself, and lowers
                its scale until they fit; if they still do not after many, the gradient is no number at any scale.

        Raises:
            ValueError: the step is not finite, and is not to be skipped.
        """
        self.overflows = self.overflows + 1 if scaled and not math.isfinite(result.grad_norm) else 0
        overflow_is_normal = scaled and self.overflows <= MAX_OVERFLOWS
        losses = {"loss": result.loss, **result.terms}
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if not bad and (overflow_is_normal or math.isfinite(result.grad_norm)):
            self.skipped = 0
            self._watch(result, documents)
            return True
        names = documents()
        self._note("nonfinite.jsonl", result, names)
        shown = {"loss": result.loss, **bad, "gradient norm": result.grad_norm}
        said = f"step {result.step}: {', '.join(f'{name} {value}' for name, value in shown.items())}"
        if self.on_nonfinite == "skip" and self.skipped < self.max_skipped:
            self.skipped += 1
            self._say(f"{said}: skipped ({self.skipped} in a row); documents {_listed(names)}")
            return False
        many = f" after {self.skipped} skipped in a row" if self.skipped else ""
        where = f"; all of them are in {self.folder / 'nonfinite.jsonl'}" if self.folder else ""
        raise ValueError(
            f"{said}{many}. The step was not taken, and the last checkpoint is good. It learns from {len(names)} "
            f"documents: {_listed(names)}{where}. Look at them, lower model.learning_rate, or set on_nonfinite to skip"
        )

    def _watch(self, result: StepResult, documents: Callable[[], list[str]]) -> None:
        if self.spike_ratio is not None and self._seen >= WARM and result.loss > self.spike_ratio * self._mean:
            names = documents()
            self._note("spikes.jsonl", result, names)
            self._say(
                f"step {result.step}: loss {result.loss:.4f} is {result.loss / self._mean:.1f} times its running mean; "
                f"documents {_listed(names)}"
            )
        self._seen += 1
        self._mean += (result.loss - self._mean) / min(self._seen, WARM)

    def _say(self, text: str) -> None:
        if self.speaks:
            print(text, flush=True)

    def _note(self, name: str, result: StepResult, documents: list[str]) -> None:
        if self.folder is None:
            return
        row = {**result._asdict(), "documents": documents}
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The running mean, so that a resumed run notes the same jumps."""
        return {"mean": self._mean, "seen": self._seen, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._seen, self.skipped = state["mean"], state["seen"], state["skipped"]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
