"""A store as epoch 0 of `fit` sees it, row by row: which tokens are used, learned, left out and cut.

What is drawn per epoch (which empty think blocks stay, which system prompt stands in front) is drawn as `fit` draws it,
so the rows shown are those trained on; the numbers are those of `windows.Plan`, found again from the tokens of a
single row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minimind_sft.dealing import VALIDATION, Dealt
from minimind_sft.documents import NO_PROMPT
from minimind_sft.packing import OPTIONAL, SUPERVISED
from minimind_sft.token_texts import TokenTexts
from minimind_sft.windows import Plan

USED, LEFT_OUT, CUT = "used", "left out", "cut"


class Piece(NamedTuple):
    """Consecutive tokens that are treated alike; a control token is a piece of its own.

    Attributes:
        tokens: The text of each; a character made of several tokens stands with the last of them.
        supervised: Whether they are targets.
        control: Whether it is a control token.
        state: `used`, `left out` (an empty think block that epoch 0 does not keep) or `cut`.
    """

    tokens: list[str]
    supervised: bool
    control: bool
    state: str


class Row(NamedTuple):
    """One document: where it came from, its tokens, how many are used, learned and cut, and why it is not trained on
    (None where it is)."""

    number: int  # in the sample, from 1
    where: str
    used: int
    supervised: int
    cut: int
    pieces: list[Piece]
    not_trained: str | None = None


class View:
    """A store as epoch 0 of `fit` sees it.

    Args:
        dealt: The tokenized sample, and who gets which of its documents.
        texts: What its ids stand for.
        batch_size, accumulate, seed, shuffle, empty_think_ratio, system_ratio, max_tokens_per_batch: As in `fit`.

    Attributes:
        documents: Those that are trained on.
        plan: The plan of `fit` on one process; None where there is nothing to learn.
        keep: (D,) whether a document of the store keeps its empty think blocks in epoch 0.
        prompt: (D,) the number of the system prompt in front of it, or `NO_PROMPT`.
        lengths: (D,) tokens of every document in epoch 0, before cutting.
        refusal: Why `fit` would refuse to plan; None where it would not.
    """

    def __init__(
        self,
        dealt: Dealt,
        texts: TokenTexts,
        *,
        batch_size: int = 16,
        accumulate: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        empty_think_ratio: float = 0.2,
        system_ratio: float = 0.2,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        assert dealt.train is not None
        self.dealt, self.documents, self.store, self.texts = dealt, dealt.train, dealt.train.store, texts
        everything = np.arange(len(self.store))
        self.keep, self.prompt = np.ones(len(self.store), bool), np.full(len(self.store), NO_PROMPT)
        self.plan: Plan | None = None
        self.refusal: str | None = None
        for bound in (max_tokens_per_batch, None):
            try:
                self.plan = Plan(
                    self.documents,
                    batch_size=batch_size,
                    accumulate=accumulate,
                    seed=seed,
                    shuffle=shuffle,
                    empty_think_ratio=empty_think_ratio,
                    system_ratio=system_ratio,
                    max_tokens_per_batch=bound,
                )
                self.keep[self.documents.index] = self.plan.epoch(0).keep
                self.prompt[self.documents.index] = self.plan.epoch(0).prompt
                break
            except ValueError as error:  # nothing to learn, or the bound is too tight: no reason not to look
                self.refusal = str(error)
                if len(self.documents) and bound is None:
                    raise  # a setting that makes no sense
        self._extent = self.documents.extents(everything, self.keep, self.prompt)
        self.lengths = self._extent.whole

    def row(self, number: int) -> Row:
        """Document `number` of the store, token by token."""
        ids, flags = self.documents.whole(number, int(self.prompt[number]))
        left_out = ((flags & OPTIONAL) != 0) & (not self.keep[number])
        place = np.cumsum(~left_out) - 1
        cut = ~left_out & ((place < self._extent.start[number]) | (place >= self._extent.stop[number]))
        supervised = (flags & SUPERVISED) != 0
        control = self.texts.is_control[ids]
        used = np.flatnonzero(~left_out & ~cut)
        kind = np.stack([supervised, control, left_out, cut])  # (4, L)
        edges = np.flatnonzero((kind[:, 1:] != kind[:, :-1]).any(0) | control[1:]) + 1
        pieces = [
            Piece(
                self.texts.of(ids[a:b]),
                bool(supervised[a]),
                bool(control[a]),
                LEFT_OUT if left_out[a] else CUT if cut[a] else USED,
            )
            for a, b in itertools.pairwise([0, *edges.tolist(), len(ids)])
        ]
        targets = int(supervised[used[1:]].sum())  # nothing predicts a first token
        why = next((reason for reason, numbers in self.documents.left_out.items() if number in numbers), None)
        return Row(number + 1, self.store.where(number), len(used), targets, int(cut.sum()), pieces, why)

    def beginning(self, number: int) -> str:
        """The first words of a document."""
        return "".join(self.texts.of(self.store.document(number)[0][:60]))


def rejected_rows(view: View, reason: str) -> Iterator[tuple[str, str]]:
    """`file:line` and detail of every row that ends under `reason`: one of the rejections, `validation` or `cut`.

    Raises:
        ValueError: No row does.
    """
    store, limit = view.store, view.documents.max_length
    if reason in view.dealt.rejected:
        return ((f"{r['file']}:{r['line']}", r["detail"]) for r in view.dealt.rejections() if r["reason"] == reason)
    ends = {
        CUT: (np.flatnonzero(view.lengths > limit), f"at most {limit} used"),
        VALIDATION: (view.documents.left_out.get(VALIDATION, np.zeros(0, np.int64)), "validated on"),
    }
    if reason in ends and len(ends[reason][0]):
        rows, what = ends[reason]
        return ((store.where(n), f"{view.lengths[n]} tokens, {what}") for n in rows.tolist())
    here = ", ".join([*view.dealt.rejected, *(name for name, (rows, _) in ends.items() if len(rows))])
    here = here or "none: every token of every row is used"
    raise ValueError(f"--where {reason}: no row ends so; reasons here are {here}")
