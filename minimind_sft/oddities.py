"""The rows of a store that are worth a look, found in the tokens: which ones, why, and by how much.

What goes wrong in chat data tends to show as an extreme: an answer of one token under a prompt of seven hundred, a
model that fell into a loop, a base64 image, a prompt that spells `<|im_end|>`. Everything is found from the store
alone, in pieces of a million tokens and mostly in NumPy: 1.5 s for 10 million tokens. `SCANNED_TOKENS` bounds it; the
sample is in random order, so its beginning stands for the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from minimind_sft.corpus import Store
from minimind_sft.packing import SUPERVISED
from minimind_sft.token_texts import TokenTexts

SCANNED_TOKENS = 20_000_000
_PIECE = 1 << 20  # tokens at once


class Extreme(NamedTuple):
    """The longest stretch of something."""

    length: int
    document: int  # the store's number
    text: str


class Scan(NamedTuple):
    """What was found in the first documents of a store.

    Attributes:
        documents: How many were looked at.
        repeated: The longest repetition of one token; None where no token follows itself.
        word: The longest run of ASCII without white space.
        hidden: Control strings spelled out in plain text, counted by (document, control string).
        silent: Documents with an answer that says nothing, counted by how many.
    """

    documents: int
    repeated: Extreme | None
    word: Extreme | None
    hidden: Counter[tuple[int, str]]
    silent: Counter[int]


def scan(store: Store, texts: TokenTexts, *, most_tokens: int = SCANNED_TOKENS) -> Scan:
    """Look for extremes in the first `most_tokens` tokens (at least one document)."""
    plain, says = texts.plain(), texts.says()
    documents, repeated, word, hidden, silent = 0, None, None, Counter[tuple[int, str]](), Counter[int]()
    for first, last in _pieces(store, most_tokens):
        ids = np.asarray(store.ids[store.offsets[first] : store.offsets[last]])
        starts = np.asarray(store.offsets[first : last + 1]) - store.offsets[first]
        same = ids[1:] == ids[:-1]
        same[starts[1:-1] - 1] = False  # of two documents
        at, length = _longest_run(same)
        if length and (repeated is None or length + 1 > repeated.length):
            document = first + int(np.searchsorted(starts, at, side="right")) - 1
            repeated = Extreme(length + 1, document, "".join(texts.of(ids[at : at + 1])))
        words = [plain[id] for id in ids.tolist()]
        data = b"\0".join([b"".join(words[a:b]) for a, b in zip(starts, starts[1:], strict=False)])
        letters = np.frombuffer(data, np.uint8)
        owner = _owner(letters, words, starts, first)
        at, length = _longest_run((letters > 32) & (letters < 127))
        if length and (word is None or length > word.length):
            word = Extreme(length, owner(at), data[at : at + length].decode())
        hidden.update((owner(at), control) for at, control in _spelled(data, texts.controls))
        silent.update(_silent(store, says, first, last))
        documents = last
    return Scan(documents, repeated, word, hidden, silent)


def silent_answers(store: Store, texts: TokenTexts, *, most_tokens: int = SCANNED_TOKENS) -> Counter[int]:
    """Documents with an answer that says nothing, counted by how many, in the first `most_tokens` tokens."""
    says = texts.says()
    return Counter(number for piece in _pieces(store, most_tokens) for number in _silent(store, says, *piece))


def _silent(store: Store, says: np.ndarray, first: int, last: int) -> list[int]:
    """The document of every run of supervised tokens none of which says anything, of documents `first` to `last`."""
    ids = np.asarray(store.ids[store.offsets[first] : store.offsets[last]])
    starts = np.asarray(store.offsets[first : last + 1]) - store.offsets[first]
    spans = slice(store.span_offsets[first], store.span_offsets[last])
    supervised = np.repeat((store.span_flags[spans] & SUPERVISED) != 0, store.span_lengths[spans])
    before = np.concatenate([[False], supervised[:-1]])
    before[starts[:-1]] = False
    begins = np.flatnonzero(supervised & ~before)
    if not len(begins):
        return []
    said = np.add.reduceat(supervised & says[ids], begins, dtype=np.int64)
    documents: list[int] = (first + np.searchsorted(starts, begins[said == 0], side="right") - 1).tolist()
    return documents


def _pieces(store: Store, most_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about `_PIECE` tokens."""
    offsets, first = np.asarray(store.offsets), 0
    end = max(1, int(np.searchsorted(offsets, most_tokens, side="right")) - 1) if len(store) else 0
    while first < end:
        last = int(np.searchsorted(offsets, offsets[first] + _PIECE, side="right")) - 1
        last = min(max(last, first + 1), end)
        yield first, last
        first = last


def _owner(letters: np.ndarray, words: list[bytes], starts: np.ndarray, first: int) -> Callable[[int], int]:
    """A function from a place in a piece's text to the number of its document."""
    ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
    begins = np.concatenate([[0], ends])[starts] + np.arange(len(starts))  # a NUL stands between two documents
    assert begins[-1] == len(letters) + 1
    return lambda at: first + int(np.searchsorted(begins, at, side="right")) - 1


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of True; (0, 0) for none."""
    breaks = np.concatenate([[-1], np.flatnonzero(~flags), [len(flags)]])
    gaps = np.diff(breaks) - 1
    longest = int(gaps.argmax())
    return (int(breaks[longest]) + 1, int(gaps[longest])) if gaps[longest] else (0, 0)


def _spelled(data: bytes, controls: list[str]) -> Iterator[tuple[int, str]]:
    """Places where a control string stands in a text; few beginnings are searched for, as Llama has 256 of them."""
    by_beginning: dict[bytes, list[bytes]] = {}
    for control in sorted(controls, key=len, reverse=True):
        by_beginning.setdefault(control.encode()[:2], []).append(control.encode())
    for beginning, candidates in by_beginning.items():
        wanted, at = tuple(candidates), data.find(beginning)
        while at >= 0:
            if data.startswith(wanted, at):
                yield at, next(control for control in candidates if data.startswith(control, at)).decode()
            at = data.find(beginning, at + 1)
