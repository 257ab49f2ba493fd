"""Text to token ids, and never to a control token: the encoder knows no added tokens.

The general path is the `tokenizers` library without its added tokens. GPT-2's byte-level BPE, which MiniMind's
tokenizers of both generations are, takes a faster one with the same result: a regular expression cuts text into words
where the tokenizer would, and a dictionary, filled by the BPE model, holds each word's ids. Scripts without spaces
would fill it with clauses that never come again, so those are cut further, between any two characters that no token of
the vocabulary spans: BPE gives the same ids on either side of such a gap. A text with characters that Unicode
classified after version 3.2 (rare scripts; emoji are known) takes the general path, as libraries disagree on them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import chain, groupby
from operator import add
from typing import Any

from tokenizers import Tokenizer

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_MAX_WORDS = 2**16  # remembered at once; about 15 MB
_MAX_PAIRS = 2**19
_SPACES = {*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
_EMOJI = r"\U0001f300-\U0001f6ff\U0001f900-\U0001f9ff\U0001fa70-\U0001faff"  # blocks without letters and digits
_PROBE = (
    "Don't we'll  'tis 'S ²Ⅷx\n\n 12 345,6\t\r\n3.14!?　中文，的确是漏洞。北京２０24年 čeština рус 日本カナ 한글 "
    "e\u0301 <|im_end|><think>🙂❤\ufe0f ...   "
)


class TextEncoder:
    """Encodes people's text.

    Args:
        specification: The parsed `tokenizer.json`.
    """

    def __init__(self, specification: dict[str, Any]) -> None:
        model, added = specification["model"], specification["added_tokens"]
        plain = {**specification, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain["model"] = {**model, "dropout": None} if model["type"] == "BPE" else model
        self._tokenizer = Tokenizer.from_str(json.dumps(plain))
        self._forbidden = {token["id"] for token in added} if _may_forge(model, added) else set()
        contents = sorted((token["content"] for token in added), key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, contents)) + ")")
        self._words: _Words | None = None
        if _is_gpt2(specification) and not self._forbidden:
            words = _Words(self._tokenizer.model, model["vocab"])
            self._words = words if words.encode(_PROBE) == self._general(_PROBE) else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            ValueError: The tokenizer makes a control token of plain text, however it is cut.
        """
        if self._words is not None:
            try:
                return self._words.encode(text)
            except _UnknownError:
                pass
        return self._general(text)

    def _general(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        parts = self._control.split(text)  # every second one is a control string: letter by letter
        pieces = [piece for index, part in enumerate(parts) for piece in (part if index % 2 else [part])]
        ids = [id for piece in pieces for id in self._tokenizer.encode(piece, add_special_tokens=False).ids]
        if not self._forbidden.isdisjoint(ids):
            raise ValueError(f"the tokenizer makes a control token of the plain text {text[:60]!r}; it cannot be used")
        return ids


def _may_forge(model: dict[str, Any], added: list[dict[str, Any]]) -> bool:
    """Whether the model alone could produce an added token: yes, unless it is a BPE whose merges never do."""
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return True
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in model["merges"]}
    texts = [text for token in added for text in (token["content"], _letters(token["content"]))]
    return any(text in made or len(text) == 1 for text in texts)


def _is_gpt2(specification: dict[str, Any]) -> bool:
    model, splitter = specification["model"], specification.get("pre_tokenizer") or {}
    return (
        specification.get("normalizer") is None
        and all(splitter.get(name) == value for name, value in _GPT2.items())
        and model["type"] == "BPE"
        and not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"))
        and set(_byte_letters().values()) <= set(model["vocab"])
    )


class _UnknownError(Exception):
    """A character that this module does not classify."""


class _Units(dict[str, list[int]]):
    """Stretches of text that BPE takes whole, and their ids, worked out when first met."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._tokenize = model.tokenize

    def __missing__(self, unit: str) -> list[int]:
        ids = [token.id for token in self._tokenize(_letters(unit))]
        self.keep(unit, ids)
        return ids

    def keep(self, unit: str, ids: list[int]) -> None:
        if len(self) >= _MAX_WORDS:
            self.clear()
        if len(unit) < 64:
            self[unit] = ids


class _Words(_Units):
    """Words, as `_patterns` cuts them, and their ids."""

    def __init__(self, model: Any, vocabulary: Iterable[str]) -> None:
        super().__init__(model)
        words, self._unknown = _patterns()
        self._findall = words.findall
        self._pairs = _joined_pairs(vocabulary)
        self._units = _Units(model)

    def encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self.__getitem__, self._findall(text))))

    def __missing__(self, word: str) -> list[int]:
        if self._unknown.match(word):
            raise _UnknownError
        if word.isascii() or max(word) > "\uffff":
            return super().__missing__(word)
        ids: list[int] = []
        start = 0
        for end, pair in enumerate(map(add, word, word[1:]), 1):
            if pair not in self._pairs:
                ids += self._units[word[start:end]]
                start = end
        ids += self._units[word[start:]]
        if len(word) <= 4:  # a longer one is a clause, and hardly comes again
            self.keep(word, ids)
        return ids


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


def _joined_pairs(vocabulary: Iterable[str]) -> set[str] | _Everything:
    """Every two characters that stand side by side in a token, or may: a token can hold part of a character."""
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    pairs: set[str] = set()
    torn: set[tuple[bytes, bytes]] = set()
    for token in vocabulary:
        data = bytes(byte_of[letter] for letter in token if letter in byte_of)
        starts = [index for index, byte in enumerate(data) if byte & 0xC0 != 0x80]
        for start, end in zip(starts, [*starts[1:], len(data)], strict=False):
            left, right = data[max((s for s in starts if s < start), default=0) : start], data[start:end]
            if left:
                try:
                    pairs.add(left.decode() + right.decode())
                except UnicodeDecodeError:
                    torn.add((left, right))
    for left, right in torn:
        before, after = _characters(left), _characters(right)
        if len(pairs) + len(before) * len(after) > _MAX_PAIRS:
            return _Everything()
        pairs.update(a + b for a in before for b in after)
    return pairs


def _characters(part: bytes) -> list[str]:
    """The characters of the basic plane that begin, or end, with these bytes of one."""
    bits = 0
    for byte in part[1:] if part[0] >= 0xC0 else part:
        bits = bits << 6 | byte & 0x3F
    if part[0] < 0x80:
        return [chr(part[0])]
    if part[0] < 0xC0:  # an end
        return list(map(chr, range(bits, 0x10000, 64 ** len(part))))
    size = 2 if part[0] < 0xE0 else 3 if part[0] < 0xF0 else 4
    missing = 6 * (size - len(part))
    start = ((part[0] & (0xFF >> size + 1)) << 6 * (len(part) - 1) | bits) << missing
    return list(map(chr, range(start, min(start + (1 << missing), 0x10000))))


def _letters(text: str) -> str:
    """A text's bytes as GPT-2 writes them."""
    return text.encode().decode("latin-1").translate(_byte_letters())


@cache
def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it prints, else from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte if byte in printing else 256 + rest.index(byte)) for byte in range(256)}


@cache
def _classes() -> dict[str, list[str]]:
    """The basic plane's characters: S white space, L letters, N numbers, O others, ? those that are left alone."""
    classes: dict[str, list[str]] = {kind: [] for kind in "SLNO?"}
    for code in range(0x10000):
        char = chr(code)
        then, now = unicodedata.ucd_3_2_0.category(char), unicodedata.category(char)
        kinds = {category[0] if category[0] in "LN" else "O" for category in (then, now)}
        if code in _SPACES:
            kinds = {"S"}
        elif then in ("Cn", "Cs") or now[0] == "Z" or len(kinds) > 1:
            kinds = {"?"}
        classes[kinds.pop()].append(char)
    return classes


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """GPT-2's pattern for words, in which each character class is spelled out; and what it takes for unknown."""
    space, letter, number, other = (_ranges(_classes()[kind]) for kind in "SLNO")
    other += _EMOJI
    unknown = f"[^{space}{letter}{number}{other}]+"
    words = (f" ?[{letter}]+| ?[{number}]+|'(?:[stmd]|re|ve|ll)| ?[{other}]+"
             f"|[{space}]+(?![^{space}])|[{space}]+|{unknown}")
    return re.compile(words), re.compile(unknown)


def _ranges(chars: list[str]) -> str:
    """Sorted characters as the inside of a regular expression's character set."""
    runs = [list(run) for _, run in groupby(enumerate(map(ord, chars)), lambda pair: pair[1] - pair[0])]
    return "".join(f"\\u{run[0][1]:04x}-\\u{run[-1][1]:04x}" for run in runs)
