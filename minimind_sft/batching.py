"""Documents -> Batch: chats, whole, end to end in one row, without padding; `cu_seqlens` says where each begins.

Pieces of text to replay lie behind the chats in the same row, so that one forward pass serves both. What comes together
is decided in `windows.py`.

Shapes: D documents, N tokens of a micro-batch, M of them targets, R targets of replay text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minimind_sft.replay_chat import ReplayRow

if TYPE_CHECKING:  # only a finished Batch needs torch
    from torch import Tensor

IGNORE = -100


class Batch(NamedTuple):
    """Whole documents end to end, in one row of N tokens.

    `labels[t]` is the target for `input_ids[t]` (already shifted), or -100; a document's last label is always -100.
    """

    input_ids: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, from 0 in each document
    cu_seqlens: Tensor  # (D + 1,) int32
    max_length: int


class Replayed(NamedTuple):
    """The replay text of a micro-batch, behind its chats. The base reads it by itself, without a chat around it."""

    targets: Tensor  # (R,) int64: where batch.labels counts for the replay text
    window_targets: int  # of the whole window, over all micro-batches and ranks
    base: Batch
    base_targets: Tensor  # (R,) int64: where base.labels counts; the same tokens in the same order


class MicroBatch(NamedTuple):
    """One rank's share of a window between two calls of backward."""

    batch: Batch
    targets: Tensor  # (M,) int64: where batch.labels counts for the chats; found on the host, not asked of the device
    window_targets: int  # supervised tokens of the whole window, over all micro-batches and ranks
    window_tokens: int = 1  # all its tokens, likewise
    target_bytes: int = 0  # bytes of text behind the targets; counted for evaluation only
    source: int = 0  # which source of the text all of it is from; told for evaluation only
    replay: Replayed | None = None

    @property
    def has_documents(self) -> bool:
        """Whether there is anything but the one token that a rank without documents gets."""
        return len(self.targets) > 0 or self.replay is not None and len(self.replay.targets) > 0


Row = tuple[np.ndarray, np.ndarray]  # token ids (L,), and whether each one is supervised (L,)


def pack(
    chats: list[Row],
    *,
    window_targets: int = 0,
    window_tokens: int = 0,
    replay: list[ReplayRow] | None = None,
    window_replay_targets: int = 0,
) -> MicroBatch:
    """Lay documents end to end.

    Args:
        chats: what is learned. No rows give one token without a target, so that a rank without documents still takes
            part in every collective call.
        window_targets, window_tokens: see `MicroBatch`; 0 stands for these rows' own number.
        replay: what is replayed; None where nothing ever is.
        window_replay_targets: see `Replayed`.
    """
    nobody = [(np.zeros(1, np.int64), np.zeros(1, bool))]
    chats = chats or nobody
    batch, targets = _end_to_end(chats + [(row.ids, row.supervised) for row in replay or []])
    start = sum(len(ids) for ids, _ in chats)
    learned = int((targets < start).sum())
    replayed = None
    if replay is not None:
        base = _end_to_end([(row.base_ids, row.base_supervised) for row in replay] or nobody)
        replayed = Replayed(targets[learned:], window_replay_targets, *base)
    return MicroBatch(
        batch, targets[:learned], window_targets or learned, window_tokens or len(batch.labels), replay=replayed
    )


def _end_to_end(rows: list[Row]) -> tuple[Batch, Tensor]:
    """Documents in one row, and where its labels count."""
    import torch

    lengths = [len(ids) for ids, _ in rows]
    ends = np.cumsum([0, *lengths])
    input_ids = np.empty(ends[-1], np.int64)
    labels = np.full(ends[-1], IGNORE, np.int64)
    positions = np.empty(ends[-1], np.int64)
    for start, (ids, supervised) in zip(ends, rows, strict=False):
        end = start + len(ids)
        input_ids[start:end] = ids
        labels[start : end - 1] = np.where(supervised[1:], ids[1:], IGNORE)
        positions[start:end] = np.arange(len(ids))
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_length=max(lengths),
    )
    return batch, torch.from_numpy(np.flatnonzero(labels != IGNORE))


def in_order(lengths: np.ndarray, *, max_tokens: int) -> list[list[int]]:
    """Documents for evaluation, by falling length, in groups of at most `max_tokens` tokens (or one document)."""
    groups: list[list[int]] = []
    tokens = max_tokens + 1
    for document in np.argsort(-lengths, kind="stable").tolist():
        if tokens + lengths[document] > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(document)
        tokens += int(lengths[document])
    return groups
