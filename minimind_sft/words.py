"""GPT-2 style byte-level BPE over many texts at once, in NumPy, with the ids that the `tokenizers` library gives.

Texts are laid end to end as code points. A table gives each its kind (white space, letter, number, other), and changes
of kind give the words that GPT-2's pattern cuts. Scripts without spaces make clauses that never come again, so words
are cut further, between any two characters that no token of the vocabulary spans: BPE gives the same ids on either side
of such a gap. The pieces that are left do come again (12,000 different ones in 8,000 Chinese and English chats), so
their ids are looked up, by a 64-bit hash; the BPE model is asked only for a piece not met before. The odds that two of
100,000 pieces share a hash are 3 in 10 billion.

A text with a character that Unicode classified after version 3.2 (rare scripts; emoji are known) is left to the
library, because libraries disagree on those. Shapes: N characters, P pieces.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SPACE, _LETTER, _NUMBER, _OTHER, _UNKNOWN, _GAP = range(6)
_GAP_CHARACTER = "\U0010ffff"  # stands between texts; unknown where it stands in one
_WHITE = {*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
_EMOJI = [(0x1F300, 0x1F700), (0x1F900, 0x1FA00), (0x1FA70, 0x1FB00)]  # blocks without letters and digits
_CODES = 2**17  # code points from here on are unknown
_MAX_PAIRS = 2**19
_MAX_PIECES = 2**17  # remembered at once; about 25 MB
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2 ** 64


class Words:
    """Encodes texts.

    Args:
        model: The `tokenizers` BPE model.
        vocabulary: Its tokens.
    """

    def __init__(self, model: Any, vocabulary: Iterable[str]) -> None:
        self._tokenize = model.tokenize
        self._pairs = _joined_pairs(vocabulary)
        self._maybe = np.zeros(2**21, bool)  # a quick no for most pairs
        self._maybe[_bucket(self._pairs, 21)] = True
        self._code_hashes = np.random.default_rng(0).integers(0, 2**64, _CODES, dtype=np.uint64)
        self._powers = self._inverses = np.ones(1, np.uint64)
        self._forget()

    def _forget(self) -> None:
        self._index_of: dict[int, int] = {}
        self._slots = np.zeros(2**18, np.int64)  # the index of the latest piece with that bucket
        self._hashes = np.zeros(1, np.uint64)  # piece 0 has no ids: a gap
        self._begins = np.zeros(2, np.int64)
        self._ids = np.zeros(0, np.int64)

    def encode(self, texts: list[str]) -> list[list[int] | None]:
        """The ids of each text; None for one with unknown characters."""
        joined = _GAP_CHARACTER.join([*texts, ""])
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)  # (N,)
        kinds = _kinds()[np.minimum(codes, _CODES)]
        gaps = np.cumsum([len(text) + 1 for text in texts]) - 1
        kinds[gaps] = _GAP
        starts = np.flatnonzero(self._cuts(codes, kinds))  # (P,)
        pieces = self._look_up(joined, codes, kinds, starts)
        lengths = self._begins[pieces + 1] - self._begins[pieces]
        ends = np.cumsum(lengths)
        where = np.arange(ends[-1]) + np.repeat(self._begins[pieces] - ends + lengths, lengths)
        ids = self._ids[where].tolist()
        unknown = set(np.searchsorted(gaps, np.flatnonzero(kinds == _UNKNOWN)).tolist())
        bounds = [0, *ends[np.searchsorted(starts, gaps)].tolist()]
        return [None if text in unknown else ids[bounds[text] : bounds[text + 1]] for text in range(len(texts))]

    def _cuts(self, codes: Array, kinds: Array) -> Array:
        """Where pieces begin, as booleans. (N,)"""
        cuts = np.ones(len(codes), bool)
        cuts[1:] = (kinds[1:] != kinds[:-1]) | (kinds[1:] == _GAP)
        # The last white space before a word stands alone, and is part of the word where it is a blank.
        words = 1 + np.flatnonzero((kinds[:-1] == _SPACE) & (kinds[1:] != _SPACE) & (kinds[1:] != _GAP))
        cuts[words - 1] = True
        cuts[words[codes[words - 1] == 32]] = False
        # An apostrophe on its own takes s, t, m, d, re, ve or ll from the word behind it.
        for mark in np.flatnonzero((codes[:-1] == 39) & cuts[:-1] & (kinds[1:] == _LETTER)).tolist():
            behind = "".join(map(chr, codes[mark + 1 : mark + 3].tolist()))
            size = 1 if behind[:1] in "stmd" else 2 if behind in ("re", "ve", "ll") else 0
            if size:
                cuts[mark + 1], cuts[mark + 1 + size] = False, True
        inside = np.flatnonzero((kinds[1:] == _LETTER) & (kinds[:-1] == _LETTER) & ((codes[1:] | codes[:-1]) > 127))
        cuts[1 + inside[~self._joined(codes[inside] * _CODES + codes[inside + 1])]] = True
        return cuts

    def _joined(self, pairs: Array) -> Array:
        found = self._maybe[_bucket(pairs, 21)]
        maybe = pairs[found]
        at = np.minimum(np.searchsorted(self._pairs, maybe), len(self._pairs) - 1)
        found[found] = self._pairs[at] == maybe
        return found

    def _look_up(self, joined: str, codes: Array, kinds: Array, starts: Array) -> Array:
        """The index of each piece. (P,)"""
        if len(self._index_of) > _MAX_PIECES or len(self._ids) > 16 * _MAX_PIECES:
            self._forget()
        if len(self._powers) < len(codes):
            for name, base in (("_powers", _BASE), ("_inverses", pow(_BASE, -1, 2**64))):
                factors = np.full(len(codes), base, np.uint64)
                factors[0] = 1
                setattr(self, name, np.cumprod(factors))
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(self._code_hashes[np.minimum(codes, _CODES - 1)] * self._powers[: len(codes)], out=sums[1:])
        ends = np.append(starts[1:], len(codes))
        hashes = (sums[ends] - sums[starts]) * self._inverses[starts]
        slots = _bucket(hashes, 18)
        pieces = self._slots[slots]
        pieces[kinds[starts] >= _UNKNOWN] = 0
        missed = np.flatnonzero((self._hashes[pieces] != hashes) & (kinds[starts] < _UNKNOWN))
        if len(missed):
            different, first, inverse = np.unique(hashes[missed], return_index=True, return_inverse=True)
            first = missed[first]
            spans = zip(starts[first].tolist(), ends[first].tolist(), strict=True)
            found = self._learn(different.tolist(), [joined[start:end] for start, end in spans])
            self._slots[slots[first]] = found
            pieces[missed] = found[inverse]
        return pieces

    def _learn(self, hashes: list[int], texts: list[str]) -> Array:
        """The index of each piece, known (its slot was taken by another) or new."""
        found, new, ids, ends = [], [], [], []
        for hash, text in zip(hashes, texts, strict=True):
            index = self._index_of.get(hash)
            if index is None:
                index = self._index_of[hash] = len(self._index_of) + 1
                new.append(hash)
                ids += [token.id for token in self._tokenize(letters(text))]
                ends.append(len(ids))
            found.append(index)
        self._hashes = np.append(self._hashes, np.array(new, np.uint64))
        self._begins = np.append(self._begins, len(self._ids) + np.array(ends, np.int64))
        self._ids = np.append(self._ids, np.array(ids, np.int64))
        return np.array(found)


def letters(text: str) -> str:
    """A text's bytes as GPT-2 writes them."""
    return text.encode().decode("latin-1").translate(byte_letters())


@cache
def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it prints, else from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte if byte in printing else 256 + rest.index(byte)) for byte in range(256)}


def _bucket(hashes: Array, bits: int) -> Array:
    return (hashes.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(64 - bits)).astype(np.int64)


@cache
def _kinds() -> Array:
    """The kind of each code point below _CODES, and behind them that of all others."""
    kinds = np.full(_CODES + 1, _UNKNOWN, np.uint8)
    then, now = unicodedata.ucd_3_2_0.category, unicodedata.category
    kind_of = {"L": _LETTER, "N": _NUMBER}
    for code in range(0x10000):
        old, new = then(chr(code)), now(chr(code))
        kind = kind_of.get(new[0], _OTHER)
        if code in _WHITE:
            kinds[code] = _SPACE
        elif old not in ("Cn", "Cs") and new[0] != "Z" and kind == kind_of.get(old[0], _OTHER):
            kinds[code] = kind
    for start, end in _EMOJI:
        kinds[start:end] = _OTHER
    return kinds


def _joined_pairs(vocabulary: Iterable[str]) -> Array:
    """Every two characters that stand side by side in a token, or may: a token can hold part of one. Sorted."""
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    pairs: set[tuple[bytes, bytes]] = set()
    for token in vocabulary:
        data = bytes(byte_of[letter] for letter in token if letter in byte_of)
        starts = [index for index, byte in enumerate(data) if byte & 0xC0 != 0x80]
        bounds = [*([0] if starts[:1] != [0] else []), *starts, len(data)]
        parts = [data[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        pairs.update(zip(parts, parts[1:], strict=False))
    keys = [np.add.outer(_characters(left) * _CODES, _characters(right)).ravel() for left, right in pairs]
    if sum(map(len, keys)) > _MAX_PAIRS:
        raise ValueError("too many pairs")
    return np.unique(np.concatenate([np.zeros(1, np.int64), *keys]))


def _characters(part: bytes) -> Array:
    """The characters of the basic plane that are, begin with, or end with these bytes."""
    if part[0] < 0x80:
        return np.array([part[0]])
    bits = 0
    for byte in part[1:] if part[0] >= 0xC0 else part:
        bits = bits << 6 | byte & 0x3F
    if part[0] < 0xC0:  # an end
        return np.arange(bits, 0x10000, 64 ** len(part))
    size = 2 if part[0] < 0xE0 else 3 if part[0] < 0xF0 else 4
    missing = 6 * (size - len(part))
    start = ((part[0] & (0xFF >> size + 1)) << 6 * (len(part) - 1) | bits) << missing
    return np.arange(min(start, 0x10000), min(start + (1 << missing), 0x10000))
