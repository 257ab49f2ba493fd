"""Replay: how much pretraining text, and which, goes into every window beside the chats.

Documents are replayed in pieces. A step has room for a few hundred to a few thousand tokens of replay: as whole
documents these are three or four subjects, and the step holds on to those; as pieces of 128 tokens, a dozen. The
base reads the same piece, so what it says of it is as good a target as what it says of the whole.

The pieces of the pool are read as one endless stream, pass after pass, each in an order of its own. A window takes
the pieces that begin in its stretch of the stream, and the stretches are as long as the ratio asks: over an epoch
the replay text makes up its share of the tokens to within a piece, though a single window may be a piece off.
Everything is a pure function of (seed, epoch), so that a resumed run replays the same text.

The base has seen this text (arXiv 2403.08763 replays 1 to 5 % to keep continual pretraining from forgetting; arXiv
2605.26097 a quarter of the tokens for small models under SFT).

Shapes: D documents of the pool, P pieces of them, W windows of an epoch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from minimind_sft.documents import Documents
from minimind_sft.replay_chat import ChatFrame, ReplayRow

USER_SHARES = 0.25, 0.75  # of a piece in a chat, how much the user gives: between these
SHORTEST = 8  # tokens that a piece must be allowed to have


class Pieces(NamedTuple):
    """Of each piece its document, and which of that one's tokens it holds, (P,)."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, longest: int | None) -> Pieces:
        """Documents of these lengths (D,), each in as few equal pieces as are at most `longest` tokens long; None for
        whole documents."""
        parts = np.ones(len(lengths), np.int64) if longest is None else -(-lengths // longest)
        document = np.arange(len(lengths)).repeat(parts)
        part = np.arange(len(document)) - (parts.cumsum() - parts)[document]
        start, stop = (lengths[document] * end // parts[document] for end in (part, part + 1))
        return cls(document, start, stop)


class ReplayStream:
    """Pretraining text to be replayed, dealt to windows.

    Args:
        documents: the pool.
        ratio: tokens of replay per token of chat; above 0.
        seed: of the order of every pass, and of which pieces come in a chat.
        piece_length: most tokens of a piece; None to replay whole documents.
        frame: the chat that a piece is put into; None for none ever is.
        in_chat: share of the pieces that are.

    Attributes:
        lengths: (P,) tokens that the model reads.
        targets: (P,) tokens that something is asked of.
        tokens: of one pass over the pool, as the base reads them.

    Raises:
        ValueError: an empty pool, or a ratio that is not above 0.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        ratio: float,
        seed: int,
        piece_length: int | None = None,
        frame: ChatFrame | None = None,
        in_chat: float = 0.0,
    ) -> None:
        if not ratio > 0.0:
            raise ValueError(f"data.replay_ratio is {ratio}; it is replay tokens per chat token, above 0 (0 is off)")
        if piece_length is not None and piece_length < SHORTEST:
            raise ValueError(
                f"data.replay_length is {piece_length}; it is tokens of a piece, at least {SHORTEST}, or null for "
                "whole documents"
            )
        if not len(documents):
            raise ValueError(
                "there is no text to replay: every document of data.pretrain_path is measured or validated on, or more "
                "like such text than data.max_overlap allows. Give more text, lower data.measure_documents, or set "
                "data.replay_ratio to 0"
            )
        self.documents, self.ratio, self.seed, self.frame = documents, ratio, seed, frame
        self._pieces = Pieces.of(documents.sizes(np.ones(len(documents), bool))[0], piece_length)
        self._raw_lengths = self._pieces.stop - self._pieces.start
        self.tokens, self.lengths = int(self._raw_lengths.sum()), self._raw_lengths
        first, self.targets = self._read()
        draws = np.random.default_rng([seed, 0, 6])
        self._in_chat = draws.random(len(self.lengths)) < in_chat
        self._shares = draws.uniform(*USER_SHARES, len(self.lengths))
        if frame is not None:
            self.lengths = self._raw_lengths + self._in_chat * [frame.extra(id) for id in first.tolist()]
        self._pass = lru_cache(maxsize=2)(self._order)

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """The first token of every piece (P,), and how many of its tokens are targets (P,)."""
        rows = [self.documents.row(number, True) for number in range(len(self.documents))]
        ids, supervised = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        starts = self._raw_lengths.cumsum() - self._raw_lengths  # the pieces, one behind the other, are the documents
        supervised[starts] = False  # nothing predicts a first token
        return ids[starts], np.add.reduceat(supervised, starts, dtype=np.int64)

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces (P,) of a pass in order, and where in the pass each one begins (P,)."""
        order = np.random.default_rng([self.seed, number, 5]).permutation(len(self.lengths))
        lengths = self._raw_lengths[order]
        return order, lengths.cumsum() - lengths

    def between(self, start: int, stop: int) -> np.ndarray:
        """The pieces that begin at the stream's tokens `start` to `stop`, in order."""
        found = [np.zeros(0, np.int64)]
        for number in range(start // self.tokens, -(-stop // self.tokens)):
            order, begins = self._pass(number)
            first, last = np.searchsorted(begins, [start - number * self.tokens, stop - number * self.tokens])
            found.append(order[first:last])
        return np.concatenate(found)

    def row(self, number: int) -> ReplayRow:
        """What the model and the base read of a piece."""
        document, start, stop = (int(values[number]) for values in self._pieces)
        ids, supervised = (tokens[start:stop] for tokens in self.documents.row(document, True))
        if self.frame is None or not self._in_chat[number]:
            return ReplayRow(ids, supervised, ids, supervised)
        return self.frame.around(ids, supervised, float(self._shares[number]))

    def windows(self, epoch: int, chat_tokens: np.ndarray, epoch_tokens: int) -> list[np.ndarray]:
        """What every window of an epoch replays.

        Args:
            epoch: from 0.
            chat_tokens: (W,) tokens of each window's chats.
            epoch_tokens: about the chat tokens of any epoch; decides where in the stream each one begins.

        Returns:
            W arrays of pieces.
        """
        begin = epoch * int(self.ratio * epoch_tokens)
        stops = begin + np.floor(self.ratio * np.cumsum(chat_tokens)).astype(np.int64)
        return [self.between(int(start), int(stop)) for start, stop in zip([begin, *stops[:-1]], stops, strict=True)]
