"""Who gets which document: training, validation, measuring or replay, by content and never two of them.

Equal documents are found by the hash of their tokens (`Store.hashes`): a conversation that stands in the files twice is
trained once, and one that is validated or measured on leaves training. Shares are drawn by hash as well, so a document
stays on its side of the split when the files grow, are put in another order, or are sampled.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minimind_sft.corpus import Store
from minimind_sft.documents import NOTHING_TO_LEARN, TOO_LONG_REASON, Documents
from minimind_sft.formats import PlainText, Rejected, parse
from minimind_sft.sampling import Line
from minimind_sft.system_prompts import SystemPrompts

DUPLICATE, IN_VALIDATION, IN_MEASURED = "duplicate", "in_validation", "in_measured"
VALIDATION = "validation"  # not a reason to reject: these are used


class Dealt(NamedTuple):
    """What the run's documents are for; None where there are none."""

    train: Documents | None
    validation: Documents | None
    measured: Documents | None
    replay: Documents | None = None  # text to replay and to read

    @property
    def rejected(self) -> dict[str, int]:
        """Lines of the sample that are used for nothing, counted by reason: with the documents of `train` and those
        that `split_off` counts, they make up the sample."""
        assert self.train is not None
        return {reason: count for reason, count in self.train.rejected.items() if reason != VALIDATION}

    @property
    def split_off(self) -> int:
        """How many documents of the sample are validated on (`val_fraction`)."""
        return 0 if self.train is None else len(self.train.left_out.get(VALIDATION, ()))

    def rejections(self) -> Iterator[dict[str, Any]]:
        """The lines that `rejected` counts, each with `file`, `line`, `reason` and `detail`."""
        assert self.train is not None
        store = self.train.store
        yield from store.rejections()
        for reason, numbers in self.train.left_out.items():
            if reason != VALIDATION:
                details = self._details(reason, numbers)
                for number, detail in zip(numbers.tolist(), details, strict=True):
                    file, line = store.meta["files"][store.line_files[number]], int(store.line_numbers[number])
                    yield {"file": file, "line": line, "reason": reason, "detail": detail}

    def _details(self, reason: str, numbers: np.ndarray) -> Iterator[str]:
        assert self.train is not None
        store, limit = self.train.store, self.train.max_length
        if reason in (NOTHING_TO_LEARN, TOO_LONG_REASON):
            what = "data.too_long is drop" if reason == TOO_LONG_REASON else "no supervised token within it"
            sizes = np.asarray(store.offsets)[numbers + 1] - np.asarray(store.offsets)[numbers]
            return (f"{size} tokens, data.max_length is {limit}: {what}" for size in sizes.tolist())
        if reason == DUPLICATE:
            others = np.setdiff1d(np.arange(len(store)), np.concatenate(list(self.train.left_out.values())))
            others = np.union1d(others, self.train.left_out.get(VALIDATION, others))
            for kept in (IN_VALIDATION, IN_MEASURED):
                others = np.union1d(others, self.train.left_out.get(kept, others))
            return _same_as(store, numbers, store, others)
        documents = self.validation if reason == IN_VALIDATION else self.measured
        assert documents is not None
        return _same_as(store, numbers, documents.store, np.arange(len(documents.store)))


def _same_as(store: Store, numbers: np.ndarray, other: Store, candidates: np.ndarray) -> Iterator[str]:
    """Which of the other store's documents each one equals."""
    hashes = np.asarray(other.hashes)[candidates]
    order = np.argsort(hashes, kind="stable")
    places = candidates[order[np.searchsorted(hashes[order], np.asarray(store.hashes)[numbers])]]
    return (f"the same as {other.where(int(place))}" for place in places)


def deal(
    train: Store | None,
    validation: Store | None,
    measured: Store | None,
    replay: Store | None = None,
    *,
    max_length: int,
    too_long: str = "truncate_right",
    val_fraction: float | None = None,
    prompts: SystemPrompts | None = None,
    repeats: np.ndarray | None = None,
) -> Dealt:
    """Deal the documents.

    Args:
        train, validation, measured, replay: the stores, None where there is none; nothing in `replay` is measured.
        max_length, too_long: see `Documents`; measured and replayed text is always cut on the right.
        val_fraction: share of the training documents, by content hash, to validate on; None for none.
        prompts: system prompts for training.
        repeats: (D,) bool, which of the D documents of `replay` are too like measured ones to be replayed.

    Raises:
        ValueError: nothing falls to validation; with `too_long` error, something is.
    """
    looked_at = {
        name: Documents(store, max_length=max_length, too_long=too_long if name == IN_VALIDATION else "truncate_right")
        for name, store in ((IN_MEASURED, measured), (IN_VALIDATION, validation))
        if store is not None
    }
    if IN_VALIDATION in looked_at and IN_MEASURED in looked_at:
        _leave_out_those_of(looked_at[IN_MEASURED], looked_at[IN_VALIDATION], IN_MEASURED)
    pool = None if train is None else Documents(train, max_length=max_length, too_long=too_long, prompts=prompts)
    if pool is not None:
        pool.leave_out(DUPLICATE, _repeated(pool))
        for reason, documents in looked_at.items():
            _leave_out_those_of(documents, pool, reason)
    if pool is not None and val_fraction is not None:
        chosen = _hashes(pool) < np.uint64(val_fraction * 2.0**64)
        if not chosen.any():
            raise ValueError(
                f"data.val_fraction {val_fraction:g} of {len(pool)} chats is none; raise it, or set data.val_path"
            )
        numbers = pool.index[chosen]
        looked_at[IN_VALIDATION] = Documents(pool.store, max_length=max_length, too_long=too_long, numbers=numbers)
        pool.leave_out(VALIDATION, chosen)
    spare = None if replay is None else Documents(replay, max_length=max_length)
    if spare is not None and repeats is not None:
        spare.leave_out(IN_MEASURED, repeats[spare.index])
    if spare is not None and IN_VALIDATION in looked_at:  # chats may stand among the text
        _leave_out_those_of(looked_at[IN_VALIDATION], spare, IN_VALIDATION)
    return Dealt(pool, looked_at.get(IN_VALIDATION), looked_at.get(IN_MEASURED), spare)


def _leave_out_those_of(theirs: Documents, ours: Documents, reason: str) -> None:
    """Leave out of ours, under a reason, what also stands in theirs: in the whole of a store that is theirs alone."""
    hashes = _hashes(theirs) if theirs.of_a_part else np.asarray(theirs.store.hashes)
    ours.leave_out(reason, np.isin(_hashes(ours), hashes))


def _hashes(documents: Documents) -> np.ndarray:
    return np.asarray(documents.store.hashes)[documents.index]


def _repeated(documents: Documents) -> np.ndarray:
    """(D,) bool: whether an earlier one is equal and learned from alike: of one chat, two lines may teach two
    answers."""
    hashes = _hashes(documents)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.ones(len(hashes), bool)
    repeated[first] = False
    masks: dict[int, set[bytes]] = {}
    for place in np.flatnonzero(repeated).tolist():
        original = int(first[group[place]])
        known = masks.setdefault(original, {_mask(documents, original)})
        if (mask := _mask(documents, place)) not in known:
            known.add(mask)
            repeated[place] = False
    return repeated


def _mask(documents: Documents, place: int) -> bytes:
    return documents.store.document(int(documents.index[place]))[1].tobytes()


# ---- by content, before anything is tokenized


# Most lines of pretraining text: one string or a few, without an escape. Where it matches, `parse` finds the same text.
_STRING = r'"([^"\\\x00-\x1f]+)"'
_PLAIN_TEXT = re.compile(rf'\{{"text": ?{_STRING}(?:, ?"source": ?{_STRING})?(?:, ?"parent": ?{_STRING})?\}}')


def content_hash(line: Line) -> bytes:
    """Of what a line says: of its text where it is a text, whatever else stands beside it and whatever white space
    stands around it.

    A line that `_PLAIN_TEXT` matches takes 2 us, any other text 20.
    """
    content = line.text
    if (plain := _PLAIN_TEXT.fullmatch(content)) and not plain[1].isspace():
        content = plain[1].strip()
    elif '"text"' in content:
        try:
            parsed = parse(content)
            content = parsed.text.strip() if isinstance(parsed, PlainText) else content
        except Rejected:
            pass
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def choose_by_hash(lines: Iterable[Line], count: int) -> list[Line]:
    """The `count` lines whose content hash is smallest, each content once: the same ones however the file is ordered
    or grows elsewhere."""
    chosen: dict[bytes, Line] = {}
    heap: list[tuple[int, bytes]] = []  # the largest hash first
    for line in lines:
        digest = content_hash(line)
        key = (-int.from_bytes(digest, "big"), digest)
        if digest in chosen or (len(heap) == count and key < heap[0]):
            continue
        chosen[digest] = line
        if len(heap) == count:
            del chosen[heapq.heappushpop(heap, key)[1]]
        else:
            heapq.heappush(heap, key)
    return [chosen[digest] for _, digest in sorted(heap, reverse=True)]


def without(lines: list[Line], known: Iterable[Line]) -> list[Line]:
    """The lines whose content is not that of a known line."""
    wanted = {content_hash(line): line for line in lines}
    for line in known:
        wanted.pop(content_hash(line), None)
    return list(wanted.values())
