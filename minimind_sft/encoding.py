"""Text to token ids, and never to a control token: the encoder knows no added tokens.

The general path is the `tokenizers` library without its added tokens. Many texts at once, under GPT-2's byte-level BPE
(MiniMind's tokenizers of both generations), go through `words.py`, which has the same result at a fraction of the time.
A tokenizer whose model alone could produce a control token (its merges build one, say) has its ids checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from minimind_sft.words import Words, byte_letters, letters

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_FEW = 1000  # characters, below which NumPy does not pay
_MANY = 2**18  # characters at once: 30 MB of arrays
_PROBE = (
    "Don't we'll  'tis 'S ²Ⅷx\n\n 12 345,6\t\r\n3.14!?　中文，的确是漏洞。北京２０24年 čeština рус 日本カナ 한글 "
    "e\u0301 <|im_end|><think>🙂❤\ufe0f ...   "
)


class TextEncoder:
    """Encodes people's text.

    Args:
        specification: The parsed `tokenizer.json`.
        controls: The strings of the added tokens, and their ids.
    """

    def __init__(self, specification: dict[str, Any], *, controls: dict[str, int]) -> None:
        model = specification["model"]
        plain = {**specification, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain["model"] = {**model, "dropout": None} if model["type"] == "BPE" else model
        self._tokenizer = Tokenizer.from_str(json.dumps(plain))
        self._forbidden = set(controls.values()) if _may_forge(model, controls) else set()
        contents = sorted(controls, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, contents)) + ")")
        self._words: Words | None = None
        if _is_gpt2(specification) and not self._forbidden:
            words = Words(self._tokenizer.model, model["vocab"])
            self._words = words if words.encode([_PROBE]) == [self.encode(_PROBE)] else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            ValueError: The tokenizer makes a control token of plain text, however it is cut.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        parts = self._control.split(text)  # every second one is a control string: letter by letter
        pieces = [piece for index, part in enumerate(parts) for piece in (part if index % 2 else [part])]
        ids = [id for piece in pieces for id in self._tokenizer.encode(piece, add_special_tokens=False).ids]
        if not self._forbidden.isdisjoint(ids):
            raise ValueError(f"the tokenizer makes a control token of the plain text {text[:60]!r}; it cannot be used")
        return ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        if self._words is None:
            return [self.encode(text) for text in texts]
        encoded: list[list[int]] = []
        batch: list[str] = []
        size = 0
        for text in [*texts, None]:
            if batch and (text is None or size + len(text) > _MANY):
                found = self._words.encode(batch) if _FEW < size <= _MANY else [None] * len(batch)
                encoded += [self.encode(t) if ids is None else ids for t, ids in zip(batch, found, strict=True)]
                batch, size = [], 0
            if text is not None:
                batch.append(text)
                size += len(text)
        return encoded


def _may_forge(model: dict[str, Any], controls: Iterable[str]) -> bool:
    """Whether the model alone could produce an added token: yes, unless it is a BPE whose merges never do."""
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return True
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in model["merges"]}
    texts = [text for control in controls for text in (control, letters(control))]
    return any(text in made or len(text) == 1 for text in texts)


def _is_gpt2(specification: dict[str, Any]) -> bool:
    model, splitter = specification["model"], specification.get("pre_tokenizer") or {}
    return (
        specification.get("normalizer") is None
        and all(splitter.get(name) == value for name, value in _GPT2.items())
        and model["type"] == "BPE"
        and not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"))
        and set(byte_letters().values()) <= set(model["vocab"])
    )
