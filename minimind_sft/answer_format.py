"""Whether a model's answers are well formed: do they end by themselves, do they go round in circles?

A model that forgot its manners, or that never had any, shows it here before anything is judged by content. Answers are
greedy, so two looks at one model agree. An answer *ends* when the model writes its end-of-turn within the tokens that
it is given; it *repeats* when some run of `RUN` tokens occurs `TIMES` times or more in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minimind_sft.chat import ChatTemplate
from minimind_sft.generate import generate
from minimind_sft.model import Transformer
from minimind_sft.probes import answer_text

RUN, TIMES = 4, 4


@dataclass(frozen=True)
class Answer:
    """One greedy answer."""

    text: str
    tokens: int  # the end of the turn included
    ended: bool
    repeats: bool


def answers(
    model: Transformer, template: ChatTemplate, prompts: Sequence[list[int]], *, max_new_tokens: int
) -> list[Answer]:
    """Answer every prompt greedily, many at once."""
    written = generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=template.stop_ids)
    return [
        Answer(answer_text(template, ids), len(ids), bool(ids) and ids[-1] in template.stop_ids, repeats(ids))
        for ids in written
    ]


def repeats(ids: Sequence[int]) -> bool:
    """Whether a run of `RUN` tokens occurs `TIMES` times or more; overlapping runs count."""
    runs = Counter(tuple(ids[start : start + RUN]) for start in range(len(ids) - RUN + 1))
    return max(runs.values(), default=0) >= TIMES


def shares(given: Sequence[Answer]) -> dict[str, float]:
    """`ended` and `repeats` as shares in [0, 1], and the mean number of `tokens`."""
    return {
        name: float(np.mean([getattr(answer, name) for answer in given])) for name in ("ended", "repeats", "tokens")
    }
