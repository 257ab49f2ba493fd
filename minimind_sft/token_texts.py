"""What every token id of a tokenizer stands for, in bytes: of byte-level vocabularies and of SentencePiece's."""

from __future__ import annotations

import codecs
import re

import numpy as np
from tokenizers import Tokenizer

from minimind_sft.words import byte_letters


class TokenTexts:
    """The text of every token id.

    Attributes:
        controls: The strings of the control tokens.
        is_control: (V,) whether an id is a control token.
        bytes: by id, of what it stands for, in UTF-8; of some tokens only part of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values())
        self.controls = sorted(added.values())
        self.is_control = np.zeros(size, bool)
        self.is_control[list(added)] = True
        as_bytes = _byte_level if "ByteLevel" in repr(tokenizer.decoder) else _sentencepiece
        self.bytes = [b""] * size
        for token, id in vocabulary.items():
            self.bytes[id] = added[id].encode() if id in added else as_bytes(token)

    def of(self, ids: np.ndarray) -> list[str]:
        """The texts of consecutive tokens; a character made of several tokens stands with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [text for id in ids.tolist() if (text := decoder.decode(self.bytes[id]))]
        return [*texts, rest] if (rest := decoder.decode(b"", final=True)) else texts

    def plain(self) -> list[bytes]:
        """By id, the bytes of what is people's or the template's plain text; a NUL for a control token."""
        return [b"\0" if control else text for text, control in zip(self.bytes, self.is_control, strict=True)]

    def says(self) -> np.ndarray:
        """(V,) whether an id is more than white space or a control token."""
        return np.array([bool(text.strip(b"\0 \t\r\n")) for text in self.plain()])


def _byte_level(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token) if _BYTES.keys() >= set(token) else token.encode()


_BYTES = {letter: byte for byte, letter in byte_letters().items()}


def _sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
