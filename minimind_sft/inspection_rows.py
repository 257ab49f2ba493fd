"""A store as epoch 0 of `fit` sees it, row by row: which tokens are used, learned, left out and cut.

What is drawn per epoch (which empty think blocks stay) is drawn as `fit` draws it, so the rows shown are those trained
on; the numbers are those of `batching.Plan`, found again from the tokens of a single row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minimind_sft.batching import Documents, Plan
from minimind_sft.corpus import OPTIONAL, SUPERVISED, Store
from minimind_sft.oddities import TokenTexts

USED, LEFT_OUT, CUT = "used", "left out", "cut"
NOTHING_TO_LEARN = "nothing_to_learn"


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
    """One document: where it came from, its tokens, and how many are used, learned and cut."""

    number: int  # in the sample, from 1
    where: str
    used: int
    supervised: int
    cut: int
    pieces: list[Piece]


class View:
    """A store as epoch 0 of `fit` sees it.

    Args:
        store: The tokenized sample.
        texts: What its ids stand for.
        max_length, batch_size, accumulate, seed, shuffle, empty_think_ratio, max_tokens_per_batch: As in `fit`.

    Attributes:
        documents: Those that can be learned from.
        plan: The plan of `fit` on one process; None where there is nothing to learn.
        keep: (D,) whether a document keeps its empty think blocks in epoch 0.
        lengths: (D,) tokens of every document in epoch 0, before cutting.
        refusal: Why `fit` would refuse to plan; None where it would not.
    """

    def __init__(
        self,
        store: Store,
        texts: TokenTexts,
        *,
        max_length: int,
        batch_size: int = 16,
        accumulate: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        empty_think_ratio: float = 0.2,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.store, self.texts = store, texts
        self.documents = Documents(store, max_length=max_length)
        self.keep = np.ones(len(store), bool)
        self.plan: Plan | None = None
        self.refusal: str | None = None if len(self.documents) else "no row has a supervised token within max_length"
        for bound in (max_tokens_per_batch, None) if len(self.documents) else ():
            self.plan = Plan(
                self.documents,
                batch_size=batch_size,
                accumulate=accumulate,
                seed=seed,
                shuffle=shuffle,
                empty_think_ratio=empty_think_ratio,
                max_tokens_per_batch=bound,
            )
            try:
                self.keep[self.documents.index] = self.plan.epoch(0).keep
                break
            except ValueError as error:  # the bound is too tight, which is no reason not to look
                self.refusal = str(error)
        self.lengths = self._lengths()

    def _lengths(self) -> np.ndarray:
        spans, owner = self.store.spans_of(np.arange(len(self.store)))
        left_out = ((self.store.span_flags[spans] & OPTIONAL) != 0) & ~self.keep[owner]
        less = np.bincount(owner[left_out], self.store.span_lengths[spans[left_out]], len(self.store))
        return np.diff(self.store.offsets) - less.astype(np.int64)

    def row(self, number: int) -> Row:
        """Document `number` of the store, token by token."""
        ids, flags = self.store.document(number)
        left_out = ((flags & OPTIONAL) != 0) & (not self.keep[number])
        cut = ~left_out & (np.cumsum(~left_out) > self.documents.max_length)
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
        return Row(number + 1, self.store.where(number), len(used), targets, int(cut.sum()), pieces)

    def beginning(self, number: int) -> str:
        """The first words of a document."""
        return "".join(self.texts.of(self.store.document(number)[0][:60]))


def rejected_rows(view: View, reason: str) -> Iterator[tuple[str, str]]:
    """`file:line` and detail of every row that ends under `reason`: one of the rejections, `cut` or `nothing_to_learn`.

    Raises:
        ValueError: No row does.
    """
    store, lengths, limit = view.store, view.lengths, view.documents.max_length
    if reason in store.rejected:
        return ((f"{r['file']}:{r['line']}", r["detail"]) for r in store.rejections() if r["reason"] == reason)
    ends = {
        CUT: (np.flatnonzero(lengths > limit), f"{limit} used"),
        NOTHING_TO_LEARN: (view.documents.nothing_to_learn, f"none supervised in the first {limit}"),
    }
    if reason in ends and len(ends[reason][0]):
        rows, what = ends[reason]
        return ((store.where(n), f"{lengths[n]} tokens, {what}") for n in rows.tolist())
    here = ", ".join([*store.rejected, *(name for name, (rows, _) in ends.items() if len(rows))])
    here = here or "none: every token of every row is used"
    raise ValueError(f"--where {reason}: no row ends so; reasons here are {here}")
