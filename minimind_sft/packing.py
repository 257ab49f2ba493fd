"""Tokenized documents in flat arrays: what a store is made of, and what is cheap to send to another process.

A list of spans of ids is thousands of Python objects a document; here a few hundred documents are nine arrays.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minimind_sft.strict_json import Rejected
from minimind_sft.tokenization import Document

SUPERVISED, OPTIONAL, ENDS_TURN = 1, 2, 4  # bits of a span's flags


def id_type(vocab_size: int) -> np.dtype:
    """The type of the ids of a store."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Packed(NamedTuple):
    """D documents of S spans and T tokens in all, and the rejections, that some lines became."""

    places: np.ndarray  # (D,) int32: which of the lines each document is
    tokens: np.ndarray  # (D,) int32
    spans: np.ndarray  # (D,) int32: spans that hold tokens
    takes_system: np.ndarray  # (D,) uint8: see `tokenization.Document`
    hashes: np.ndarray  # (D,) uint64: of the tokens
    ids: np.ndarray  # (T,) of the store's type
    span_lengths: np.ndarray  # (S,) int32
    span_flags: np.ndarray  # (S,) uint8
    sources: list[str]  # (D,)
    rejected: list[tuple[int, str, str]]  # which of the lines, reason, detail

    def before(self, place: int) -> Packed:
        """What came of the lines before that one."""
        count = int(np.searchsorted(self.places, place))
        tokens, spans = int(self.tokens[:count].sum()), int(self.spans[:count].sum())
        return Packed(
            places=self.places[:count],
            tokens=self.tokens[:count],
            spans=self.spans[:count],
            takes_system=self.takes_system[:count],
            hashes=self.hashes[:count],
            ids=self.ids[:tokens],
            span_lengths=self.span_lengths[:spans],
            span_flags=self.span_flags[:spans],
            sources=self.sources[:count],
            rejected=[refusal for refusal in self.rejected if refusal[0] < place],
        )


def pack(made: Sequence[Document | Rejected], dtype: np.dtype) -> Packed:
    """What lines became, in their order, as arrays; ``dtype`` is that of the store's ids."""
    rejected = [(place, why.reason, why.detail) for place, why in enumerate(made) if isinstance(why, Rejected)]
    found = [(place, document) for place, document in enumerate(made) if isinstance(document, Document)]
    spans = [[span for span in document.spans if span.ids] for _, document in found]
    ids = [np.fromiter(itertools.chain.from_iterable([span.ids for span in those]), dtype) for those in spans]
    every = [span for those in spans for span in those]
    flags = [SUPERVISED * span.supervised | OPTIONAL * span.optional | ENDS_TURN * span.ends_turn for span in every]
    digests = [hashlib.blake2b(those.tobytes(), digest_size=8).digest() for those in ids]
    return Packed(
        places=np.array([place for place, _ in found], np.int32),
        tokens=np.array([len(those) for those in ids], np.int32),
        spans=np.array([len(those) for those in spans], np.int32),
        takes_system=np.array([document.takes_system for _, document in found], np.uint8),
        hashes=np.frombuffer(b"".join(digests), "<u8"),
        ids=np.concatenate(ids) if ids else np.zeros(0, dtype),
        span_lengths=np.array([len(span.ids) for span in every], np.int32),
        span_flags=np.array(flags, np.uint8),
        sources=[document.source or "" for _, document in found],
        rejected=rejected,
    )
