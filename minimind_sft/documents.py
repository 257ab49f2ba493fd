"""A store seen through the settings: which documents can be learned from, and which of their tokens.

Cutting to `max_length`, leaving out an empty think block and putting a system prompt in front happen here, not in the
store, so that none of them needs a new tokenization. Lengths and targets of all documents are computed at once from
their spans: 0.2 s a million documents.

What is too long is treated as `too_long` says. The mask stays with its tokens whatever is cut; the first token that is
left has no past and is never a target.

    truncate_right   the first `max_length` tokens, as the original
    truncate_turns   as many whole turns of the assistant as fit; text, which has no turns, is cut on the right
    truncate_left    the last `max_length` tokens
    drop             nothing of it
    error            an error that names it

Shapes: D documents, S spans, L tokens of one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minimind_sft.corpus import Store
from minimind_sft.packing import ENDS_TURN, OPTIONAL, SUPERVISED
from minimind_sft.system_prompts import SystemPrompts

TOO_LONG = ("truncate_right", "truncate_turns", "truncate_left", "drop", "error")
NOTHING_TO_LEARN = "nothing_to_learn"  # reasons by which documents are left out
TOO_LONG_REASON = "too_long"
NO_PROMPT = -1
TOGETHER = 256  # tokens from which documents fill a pass by themselves

_UNBOUNDED = np.iinfo(np.int32).max


class Extent(NamedTuple):
    """What is used of each document: its tokens from `start` to `stop`, of which `targets` are supervised, (D,)."""

    start: np.ndarray
    stop: np.ndarray
    targets: np.ndarray
    whole: np.ndarray  # tokens before cutting


class Documents:
    """The documents of a store that can be learned from.

    Args:
        store: the tokenized documents.
        max_length: most tokens of a document.
        too_long: what becomes of a longer one, one of `TOO_LONG`.
        numbers: the store's numbers of the documents to choose from; None for all.
        prompts: system prompts that may be put in front, or None.

    Attributes:
        index: (D,) the store's numbers of the documents that hold a target, in the store's order.
        left_out: the numbers of the other ones, by reason.

    Raises:
        ValueError: for settings that make no sense; with `too_long` error, for a document that is.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_length: int,
        too_long: str = "truncate_right",
        numbers: np.ndarray | None = None,
        prompts: SystemPrompts | None = None,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"data.max_length is {max_length}; a document needs at least 2 tokens to have a target")
        assert too_long in TOO_LONG
        self.store, self.max_length, self.too_long, self.prompts = store, max_length, too_long, prompts
        self.index = np.arange(len(store)) if numbers is None else numbers
        self._of_store = numbers is None
        self.left_out: dict[str, np.ndarray] = {}
        if too_long in ("drop", "error"):
            long = self._all().whole > max_length
            if too_long == "error" and long.any():
                self._refuse(int(np.flatnonzero(long)[0]), int(long.sum()))
            self.leave_out(TOO_LONG_REASON, long)
        self.leave_out(NOTHING_TO_LEARN, self._all().targets == 0)

    @property
    def of_a_part(self) -> bool:
        """Whether they were chosen from a store that holds others' as well."""
        return not self._of_store

    def __len__(self) -> int:
        return len(self.index)

    def leave_out(self, reason: str, which: np.ndarray) -> None:
        """Leave documents out under a reason; `which` is (D,) bool over `index`."""
        if which.any():
            self.left_out[reason] = self.index[which]
            self.index = self.index[~which]

    @property
    def fingerprint(self) -> str:
        """A hash of which documents these are, and in which order."""
        return hashlib.blake2b(np.asarray(self.store.hashes)[self.index].tobytes(), digest_size=8).hexdigest()

    @property
    def rejected(self) -> dict[str, int]:
        """Lines and documents that are not used, counted by reason; of a part of a store, those of that part."""
        left_out = {reason: len(numbers) for reason, numbers in self.left_out.items()}
        return (self.store.rejected if self._of_store else {}) | left_out

    @property
    def nothing_to_learn(self) -> np.ndarray:
        """The store's numbers of the documents without a target within `max_length`."""
        return self.left_out.get(NOTHING_TO_LEARN, np.zeros(0, np.int64))

    @property
    def cut(self) -> int:
        """How many of the documents are longer than `max_length`."""
        return int((self._all().whole > self.max_length).sum())

    @property
    def lost(self) -> int:
        """How many documents are left out because they are longer than `max_length`."""
        useless = self.nothing_to_learn
        whole = self.extents(useless, np.ones(len(useless), bool), None).whole
        return len(self.left_out.get(TOO_LONG_REASON, ())) + int((whole > self.max_length).sum())

    @property
    def targets_lost(self) -> float:
        """Share of the supervised tokens that `max_length` costs, in [0, 1]."""
        lost = [self.left_out[reason] for reason in (TOO_LONG_REASON, NOTHING_TO_LEARN) if reason in self.left_out]
        everything = np.concatenate([self.index, *lost])
        keep = np.ones(len(everything), bool)
        uncut = float(self.extents(everything, keep, None, max_length=_UNBOUNDED).targets.sum())
        return 1.0 - float(self._all().targets.sum()) / max(1.0, uncut)

    @property
    def takes_prompt(self) -> np.ndarray:
        """(D,) bool: whether a system prompt may be put in front: the chat has none, nor tools, and even the longest
        prompt leaves it a target, and with `drop` and `error` all its tokens."""
        if self.prompts is None:
            return np.zeros(len(self), bool)
        takes = np.asarray(self.store.takes_system)[self.index] != 0
        longest = np.where(takes, int(np.argmax(self.prompts.extra[:-1])), NO_PROMPT)
        with_longest = self.extents(self.index, np.ones(len(self), bool), longest)
        takes &= with_longest.targets > 0
        return takes & (with_longest.whole <= self.max_length) if self.too_long in ("drop", "error") else takes

    def sizes(self, keep_optional: np.ndarray, prompt: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of every document.

        Args:
            keep_optional: (D,) bool, whether a document's optional spans stay.
            prompt: (D,) the number of the system prompt put in front, or `NO_PROMPT`; None for none anywhere.

        Returns:
            lengths (D,) and targets (D,), int64, of what is used.
        """
        extent = self.extents(self.index, keep_optional, prompt)
        return extent.stop - extent.start, extent.targets

    def first(self, tokens: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Rows of the first documents, until they have so many tokens; short ones together."""
        rows, held = [], 0
        for number, length in enumerate(self.lengths_of_first(tokens).tolist()):
            rows.append(self.row(number, True))
            held += length
            if held >= TOGETHER:
                yield rows
                rows, held = [], 0
        if rows:
            yield rows

    def lengths_of_first(self, tokens: int) -> np.ndarray:
        """Tokens of each of the first documents, as many of these as it takes to have so many."""
        lengths, _ = self.sizes(np.ones(len(self), bool))
        before = lengths.cumsum() - lengths
        return lengths[before < tokens]

    def row(self, number: int, keep_optional: bool, prompt: int = NO_PROMPT) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) and supervised flags (L,) of what is used of document `number` of `index`."""
        ids, flags = self.whole(int(self.index[number]), prompt)
        if not keep_optional and (flags & OPTIONAL).any():
            stays = (flags & OPTIONAL) == 0
            ids, flags = ids[stays], flags[stays]
        if len(ids) > self.max_length:
            extent = self.extents(
                self.index[number : number + 1], np.array([keep_optional]), np.array([prompt], np.int64)
            )
            ids, flags = (values[int(extent.start[0]) : int(extent.stop[0])] for values in (ids, flags))
        return ids.astype(np.int64), (flags & SUPERVISED) != 0

    def whole(self, number: int, prompt: int = NO_PROMPT) -> tuple[np.ndarray, np.ndarray]:
        """All token ids and their spans' flags of the store's document `number`, with a system prompt in front."""
        ids, flags = self.store.document(number)
        if prompt != NO_PROMPT:
            assert self.prompts is not None
            prefix, rest = self.prompts.ids[prompt], self.prompts.replaced
            ids = np.concatenate([np.asarray(prefix, ids.dtype), ids[rest:]])
            flags = np.concatenate([np.zeros(len(prefix), flags.dtype), flags[rest:]])
        return ids, flags

    def _all(self) -> Extent:
        return self.extents(self.index, np.ones(len(self.index), bool), None)

    def extents(
        self, index: np.ndarray, keep: np.ndarray, prompt: np.ndarray | None, max_length: int | None = None
    ) -> Extent:
        """What is used of the store's documents `index`, after leaving out optional spans and putting prompts in front.

        Args:
            index: (D,) the store's numbers.
            keep: (D,) bool, whether a document's optional spans stay.
            prompt: (D,) as in `sizes`.
            max_length: in place of the attribute.
        """
        limit = self.max_length if max_length is None else max_length
        spans, owner = self.store.spans_of(index)  # (S,) numbers of spans, (S,) which of `index` each one belongs to
        flags = self.store.span_flags[spans]
        size = self.store.span_lengths[spans].astype(np.int64)
        size[((flags & OPTIONAL) != 0) & ~keep[owner]] = 0
        count = np.bincount(owner, minlength=len(index))
        if prompt is not None and self.prompts is not None:
            opened = prompt != NO_PROMPT
            size[(count.cumsum() - count)[opened]] += self.prompts.extra[prompt[opened]]
        whole = np.bincount(owner, size, len(index)).astype(np.int64)
        end = np.cumsum(size) - (whole.cumsum() - whole)[owner]  # where each span ends in its document
        start, stop = np.zeros(len(index), np.int64), np.minimum(whole, limit)
        if self.too_long == "truncate_left":
            start, stop = whole - stop, whole
        elif self.too_long == "truncate_turns":
            ends = (flags & ENDS_TURN) != 0
            fits = ends & (end <= limit)
            last = np.zeros(len(index), np.int64)
            np.maximum.at(last, owner[fits], end[fits])
            stop = np.where((whole > limit) & (np.bincount(owner[ends], minlength=len(index)) > 0), last, stop)
        used = np.minimum(end, stop[owner]) - np.maximum(end - size, start[owner] + 1)  # nothing predicts a first token
        targets = np.where((flags & SUPERVISED) != 0, used, 0).clip(min=0)
        return Extent(start, stop, np.bincount(owner, targets, len(index)).astype(np.int64), whole)

    def _refuse(self, place: int, count: int) -> None:
        tokens = int(self._all().whole[place])
        raise ValueError(
            f"{self.store.where(int(self.index[place]))} has {tokens} tokens, more than data.max_length = "
            f"{self.max_length}, and data.too_long is error ({count} such in all). Shorten or remove them, raise "
            f"data.max_length, or set data.too_long to {', '.join(TOO_LONG[:4])}"
        )
