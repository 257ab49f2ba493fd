"""(seed, epoch) -> windows -> micro-batches.

A *window* is what one optimizer step learns from: the next `batch_size * accumulate * ranks` documents of the epoch's
order. It is dealt into exactly `accumulate` micro-batches per rank, also where the last window is short, so that
Lightning's accumulation stays in phase, and so that token counts are even: the longest document goes first, always to
the micro-batch that holds the fewest tokens (the LPT rule). Text to replay (`replay.py`) is dealt along with the chats.

Everything here is a pure function of (seed, epoch): no state to save, and a resumed run sees the same documents in
the same micro-batches. What is drawn at random per document (whether an empty think block stays, which system prompt is
put in front) is drawn while planning.

Shapes: D documents, W windows of an epoch.
"""

from __future__ import annotations

import heapq
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from minimind_sft.batching import MicroBatch, pack
from minimind_sft.dealing import IN_VALIDATION
from minimind_sft.documents import NO_PROMPT, NOTHING_TO_LEARN, Documents
from minimind_sft.ranges import check_ranges
from minimind_sft.replay import ReplayStream
from minimind_sft.report import rejected


class Share(NamedTuple):
    """What comes in one micro-batch: the numbers of documents, and of pieces to replay."""

    chats: list[int]
    replay: list[int]
    tokens: int


class Epoch:
    """One pass over the documents: their order, what was drawn for each, and its windows.

    Attributes:
        keep: (D,) whether a document keeps its empty think blocks.
        prompt: (D,) the number of the system prompt in front of it, or `NO_PROMPT`.
        replay: per window the pieces that are replayed; empty where none ever are.
        window_targets: (W,) supervised tokens of each window's chats, over all ranks.
        window_replay_targets: (W,) of its replay text, likewise.
        window_tokens: (W,) all its tokens.
    """

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan = plan
        documents = plan.documents
        count = len(documents)
        self.order = (
            np.random.default_rng([plan.seed, number, 0]).permutation(count) if plan.shuffle else np.arange(count)
        )
        self.keep = np.random.default_rng([plan.seed, number, 1]).random(count) < plan.empty_think_ratio
        self.prompt = self._draw_prompts(number)
        self.lengths, self.targets = documents.sizes(self.keep, self.prompt)
        starts = np.arange(0, count, plan.window_size)
        self.window_targets = np.add.reduceat(self.targets[self.order], starts)
        self.window_tokens = np.add.reduceat(self.lengths[self.order], starts)
        self.replay: list[np.ndarray] = []
        self.window_replay_targets = np.zeros(len(starts), np.int64)
        if plan.replay is not None:
            self.replay = plan.replay.windows(number, self.window_tokens, plan.most_tokens)
            self.window_replay_targets += [plan.replay.targets[window].sum() for window in self.replay]
            self.window_tokens += [plan.replay.lengths[window].sum() for window in self.replay]
        self.deal = lru_cache(maxsize=1)(self._deal)

    def _draw_prompts(self, number: int) -> np.ndarray:
        """(D,) the number of each document's system prompt, or `NO_PROMPT`."""
        documents, plan = self.plan.documents, self.plan
        prompt = np.full(len(documents), NO_PROMPT)
        if documents.prompts is not None and plan.system_ratio:
            drawn = np.random.default_rng([plan.seed, number, 3]).random(len(documents)) < plan.system_ratio
            which = np.random.default_rng([plan.seed, number, 4]).integers(len(documents.prompts.ids), size=len(prompt))
            prompt = np.where(drawn & documents.takes_prompt, which, NO_PROMPT)
        return prompt

    def _deal(self, window: int) -> list[Share]:
        """The window's `accumulate * ranks` micro-batches, the fullest first."""
        plan = self.plan
        chats = self.order[window * plan.window_size : (window + 1) * plan.window_size]
        replay, lengths = np.zeros(0, np.int64), self.lengths[chats]
        if plan.replay is not None:
            replay = self.replay[window]
            lengths = np.concatenate([lengths, plan.replay.lengths[replay]])
        members = np.concatenate([chats, replay]).tolist()
        heap: list[tuple[int, int]] = [(0, share) for share in range(plan.accumulate * plan.ranks)]
        shares = [Share([], [], 0) for _ in heap]
        for place in np.argsort(-lengths, kind="stable").tolist():
            tokens, share = heap[0]
            tokens += int(lengths[place])
            (shares[share].chats if place < len(chats) else shares[share].replay).append(members[place])
            shares[share] = shares[share]._replace(tokens=tokens)
            heapq.heapreplace(heap, (tokens, share))
        return sorted(shares, key=lambda share: share.tokens, reverse=True)


class Plan:
    """Which documents every rank sees in every micro-batch of every epoch.

    Args:
        documents: what there is to learn from.
        batch_size: documents per micro-batch in the mean; micro-batches are even in tokens, not in documents.
        accumulate: micro-batches per rank and window.
        ranks: processes.
        seed: of the order and of what is drawn per document.
        shuffle: a new order each epoch; else the order of the store, each time.
        empty_think_ratio: share of the documents, drawn anew each epoch, that keep their empty think blocks.
        system_ratio: share of the documents without a system prompt that get one, drawn anew each epoch.
        max_tokens_per_batch: bound on a micro-batch's tokens, or None.
        replay: text that is replayed beside the documents, or None.

    Raises:
        ValueError: nothing to learn from; a window that cannot be dealt within `max_tokens_per_batch`.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        batch_size: int,
        accumulate: int = 1,
        ranks: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        empty_think_ratio: float = 0.2,
        system_ratio: float = 0.2,
        max_tokens_per_batch: int | None = None,
        replay: ReplayStream | None = None,
    ) -> None:
        if not len(documents):
            lost = rejected(documents.rejected)
            said = f"nothing can be learned: no document is left to train on (rejected: {lost})"
            if documents.rejected.get(NOTHING_TO_LEARN):
                said += f"; none has a supervised token within data.max_length {documents.max_length}: raise it, or "
                said += "set data.too_long to truncate_left or truncate_turns"
            if documents.rejected.get(IN_VALIDATION):
                said += "; a chat that is validated on is not trained on: give data.val_path other chats, or set it to "
                said += "null and data.val_fraction to 0.05"
            raise ValueError(said)
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; it counts conversations and must be at least 1")
        check_ranges("data", empty_think_ratio=empty_think_ratio, system_ratio=system_ratio)
        self.documents, self.seed, self.shuffle = documents, seed, shuffle
        self.batch_size, self.accumulate, self.ranks = batch_size, accumulate, ranks
        self.window_size = batch_size * accumulate * ranks
        self.empty_think_ratio, self.system_ratio = empty_think_ratio, system_ratio
        self.max_tokens_per_batch, self.replay = max_tokens_per_batch, replay
        tokens, targets = documents.sizes(np.ones(len(documents), bool))
        self.most_tokens, self.most_targets = int(tokens.sum()), int(targets.sum())  # of an epoch, without prompts
        self.windows = math.ceil(len(documents) / self.window_size)
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> Epoch:
        epoch = Epoch(self, number)
        if self.max_tokens_per_batch is not None:
            self._check_bound(epoch)
        return epoch

    def _check_bound(self, epoch: Epoch) -> None:
        bound = self.max_tokens_per_batch
        assert bound is not None
        worst = max(range(self.windows), key=lambda window: epoch.deal(window)[0].tokens)
        need = epoch.deal(worst)[0].tokens
        if need <= bound:
            return
        longest = int(epoch.lengths.max())
        piece = 0 if self.replay is None else int(self.replay.lengths.max())
        factor = math.ceil(need / bound)
        if longest > bound:
            remedy = f"lower data.max_length (the longest document has {longest} tokens)"
        elif piece > bound:
            remedy = f"lower data.replay_length (the longest piece to replay has {piece} tokens)"
        elif self.batch_size > 1:
            size = max(1, self.batch_size // factor)
            accumulate = math.ceil(self.batch_size * self.accumulate / size)
            same = " (the same window)" if size * accumulate == self.batch_size * self.accumulate else ""
            remedy = f"raise trainer.accumulate_grad_batches to {accumulate} and lower data.batch_size to {size}{same}"
        else:
            remedy = "lower data.max_length, or data.replay_length where text is replayed"
        raise ValueError(
            f"data.max_tokens_per_batch is {bound}, but window {worst} needs a micro-batch of {need} tokens; "
            f"{remedy}, or raise data.max_tokens_per_batch"
        )

    def micro_batch(self, epoch_number: int, position: int, rank: int) -> MicroBatch:
        """What `rank` sees at `position` (counted in micro-batches) of an epoch."""
        epoch = self.epoch(epoch_number)
        window, share = divmod(position, self.accumulate)
        chats, replay, _ = epoch.deal(window)[share * self.ranks + rank]
        rows = [self.documents.row(number, bool(epoch.keep[number]), int(epoch.prompt[number])) for number in chats]
        return pack(
            rows,
            window_targets=int(epoch.window_targets[window]),
            window_tokens=int(epoch.window_tokens[window]),
            replay=None if self.replay is None else [self.replay.row(number) for number in replay],
            window_replay_targets=int(epoch.window_replay_targets[window]),
        )

    def window_documents(self, epoch_number: int, window: int) -> np.ndarray:
        """The store's numbers of a window's documents, for messages that name them."""
        start = window * self.window_size
        return self.documents.index[self.epoch(epoch_number).order[start : start + self.window_size]]
