"""What the numbers among the settings may be: a table, so that each is refused in the same words before anything loads.

What is not here is checked where it is used, with what else it depends on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Range(NamedTuple):
    """From `low` to `high`, both included; never infinite, never NaN."""

    low: float
    high: float
    what: str  # in words, behind "it is"

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high


SMALLEST = math.ulp(0.0)  # the least number above 0
BELOW_ONE = math.nextafter(1.0, 0.0)
MOST = 1e18
SHARE = "a share between 0 and 1"
RANGES = {
    "model.learning_rate": Range(SMALLEST, 10.0, "the peak of the schedule, above 0 and at most 10, or auto"),
    "model.warmup_ratio": Range(0.0, BELOW_ONE, "a share of the steps, from 0 to below 1"),
    "model.min_lr_ratio": Range(0.0, 1.0, "a share of model.learning_rate, from 0 to 1"),
    "model.weight_decay": Range(0.0, MOST, "AdamW's decay, 0 or above (0.01 is usual)"),
    "model.replay_weight": Range(0.0, MOST, "the factor of a loss, 0 or above (0 is off)"),
    "model.fisher_tokens": Range(0, MOST, "a number of tokens, 0 or above (0 is off)"),
    "model.prior_tokens": Range(0.0, MOST, "a number of tokens, 0 or above (0 is off), or auto"),
    "model.l2_sp": Range(0.0, MOST, "a decay towards the base, 0 or above (0 is off)"),
    "model.rope_theta": Range(1.0, MOST, "the base of the rotary angles, from 1 on (1e6 is usual)"),
    "model.rms_norm_eps": Range(SMALLEST, 1.0, "what keeps a norm from dividing by 0, such as 1e-6"),
    "model.max_forgetting": Range(0.0, MOST, "nats per token, 0 or above, or null for no bound"),
    "data.val_fraction": Range(SMALLEST, BELOW_ONE, SHARE),
    "data.system_ratio": Range(0.0, 1.0, SHARE),
    "data.empty_think_ratio": Range(0.0, 1.0, SHARE),
    "data.max_bad_ratio": Range(0.0, 1.0, SHARE),
    "data.max_overlap": Range(0.0, 1.0, SHARE),
    "data.pretrain_mb": Range(SMALLEST, MOST, "the size of the pretraining text in MB, above 0"),
    "data.replay_ratio": Range(0.0, 10.0, "replay tokens per chat token, from 0 (off) to 10"),
    "data.replay_in_chat": Range(0.0, 1.0, SHARE),
    "data.seed": Range(0, 2**32 - 1, "a seed, from 0 to 4294967295"),
    "data.max_length": Range(2, MOST, "a number of tokens, from 2 on"),
    "data.measure_documents": Range(1, MOST, "a number of documents, from 1 on"),
    "data.replay_documents": Range(1, MOST, "a number of documents, from 1 on"),
    "data.own_documents": Range(0, MOST, "a number that the base writes, 0 for none"),
    "data.own_chats": Range(0, MOST, "a number that the base writes, 0 for none"),
    "data.workers": Range(1, MOST, "a number of processes, from 1 on, or null for one per core"),
    "trainer.gradient_clip_val": Range(0.0, MOST, "what gradients are clipped to; 0 or null for no clipping"),
    "trainer.accumulate_grad_batches": Range(1, MOST, "micro-batches per optimizer step, from 1 on"),
}


def check_ranges(section: str, **settings: Any) -> None:
    """Refuse what is out of its range; None and words are somebody else's to judge.

    Args:
        section: `model`, `data` or `trainer`.
        settings: by their names there.

    Raises:
        ValueError: the first one, with its value and what it may be.
    """
    for name, value in settings.items():
        allowed = RANGES[f"{section}.{name}"]
        if isinstance(value, (int, float)) and not allowed.holds(value):
            raise ValueError(f"{section}.{name} is {value}; it is {allowed.what}")
