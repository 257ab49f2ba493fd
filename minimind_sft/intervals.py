"""How often a run logs, looks at the model and saves, and how much a look between the first and the last reads.

A look costs a forward pass over all that is measured on: with 1,000 documents of text and 500 chats, as much as 8 to 11
steps of the original's 128 chats (measured: 115 s a look, 10.8 to 14.8 s a step). The first look and the last read
everything, so that what is reported is exact. Those between may together cost `LIVE_COST` of the training time: where
runs are long they are made rarely, and where they are so short that less than one an epoch would be left, they read a
part of the documents instead, always the same ones, and their change since step 0 is added to the base's reading of
everything (`Reading.moved`). Which reading is the best is decided by these documents alone, at the last step as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minimind_sft.evaluation import affordable_interval, evaluation_tokens

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule

LIVE_COST = 0.05
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Intervals:
    """Optimizer steps between two lines of the log, two readings, two checkpoints; and the share of the documents that
    a reading between the first and the last is taken on."""

    log_every: int
    val_every: int
    save_every: int
    live_share: float = 1.0

    @classmethod
    def resolve(
        cls, data: SFTDataModule, *, total_steps: int, log_every: int, val_every: int | None, save_every: int | None
    ) -> Intervals:
        """Fill in what was left open.

        A checkpoint every 100 steps or quarter of an epoch; a reading as often as costs about 5 % of the time, at most
        with every checkpoint and at least once an epoch, then of as many documents as cost that much. Whoever sets
        `val_every` gets whole readings.

        Raises:
            ValueError: an interval below 1.
        """
        for name, value in (("log", log_every), ("val", val_every), ("save", save_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}_every_steps is {value}; it counts optimizer steps and must be at least 1")
        windows, tokens = data.plan.windows, evaluation_tokens(data.evaluation)
        save = save_every or max(1, min(100, windows // 4))
        if val_every is not None:
            return cls(log_every, val_every, save)
        step_tokens = float(data.plan.epoch(0).window_tokens.mean())
        val = min(max(affordable_interval(tokens, step_tokens, LIVE_COST), save), windows)
        return cls(log_every, val, save, live_share(tokens, (total_steps - 1) // val, total_steps * step_tokens))


def live_share(evaluation: int, looks: int, trained: float) -> float:
    """Share of the documents that `looks` looks may read for `LIVE_COST` of the time.

    Args:
        evaluation: tokens that a whole look reads.
        looks: how many there are between the first and the last.
        trained: tokens of the whole run; one costs as much as three looked at.
    """
    affordable = 3 * LIVE_COST * trained / max(1, evaluation * looks)
    return min(1.0, max(LEAST_SHARE, affordable))
