"""Text to token ids and never to a control token."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer


class TextEncoder:
    """Encodes people's text: no string in it is a control or added token.

    Args:
        specification: The parsed `tokenizer.json`.
    """

    def __init__(self, specification: dict[str, Any]) -> None:
        plain = {**specification, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain["model"] = {**specification["model"], "dropout": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(plain))

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
