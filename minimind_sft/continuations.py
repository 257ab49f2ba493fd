"""The second half of a document, asked for as a chat.

Raw text can stay intact while the chat mode forgets: the model still continues a page, but not when a user asks for
it. So each document is cut near its middle, at the end of a line or sentence. The base reads the raw document; the
tuned model reads, in its chat template, a user who asks to continue the first half. Both are scored on the same tokens:
those of the second half, encoded apart from the first.

White space at the cut stays with the first half. The end of the turn is not scored: the raw document has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minimind_sft.chat import DOCUMENT_FRAMES, ChatTemplate
from minimind_sft.formats import Rejected
from minimind_sft.scoring import Row

INSTRUCTION = {"en": "Continue this text:\n\n", "zh": "请接着往下写：\n\n"}
MIN_TOKENS = 8  # of each half
_BREAKS = (re.compile(r"[\n。！？；]+\s*|[.!?;]+\s+"), re.compile(r"\s+"))
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


class Continuations(NamedTuple):
    """Rows for `scoring.score`, and the documents that they are from.

    Attributes:
        places: (D,) of the documents that could be cut.
        raw: D rows: the document.
        chat: D rows: the prompt of the chat and the second half.
    """

    places: np.ndarray
    raw: list[Row]
    chat: list[Row]


def continuations(
    texts: Sequence[str], template: ChatTemplate, *, document_format: str, max_length: int
) -> Continuations:
    """Cut documents and ask for their second halves.

    Args:
        texts: the documents; those too short for two halves of `MIN_TOKENS` tokens, or that the
            template refuses, are left out.
        template: tokenizer and chat template.
        document_format: how pretraining framed a text, see `ChatTemplate.document`.
        max_length: tokens of a row at most; of a longer document, the beginning is used.
    """
    places, raw, chat = [], [], []
    for place, text in enumerate(texts):
        lead, text = _without_frame(text, template, document_format)
        instruction = INSTRUCTION["zh" if 3 * len(_CHINESE.findall(text)) > len(text) else "en"]
        room = max_length - len(template.prompt([{"role": "user", "content": instruction}]))
        first, second = halves(_shortened(text, template, room))
        head, tail = template.encode_text(first), template.encode_text(second)
        if min(len(head), len(tail)) < MIN_TOKENS:
            continue
        try:
            prompt = template.prompt([{"role": "user", "content": instruction + first.rstrip()}])
        except Rejected:  # the template cannot say this text; there are enough others
            continue
        places.append(place)
        raw.append(_row(lead + head, tail))
        chat.append(_row(prompt, tail))
    return Continuations(np.array(places, np.int64), raw, chat)


def halves(text: str) -> tuple[str, str]:
    """Cut a text after the line or sentence whose end is nearest to its middle; else at white space; else there.

    Only the middle half of the text is looked at.
    """
    quarter, middle = len(text) // 4, len(text) // 2
    for pattern in _BREAKS:
        ends = [found.end() for found in pattern.finditer(text) if quarter <= found.end() <= len(text) - quarter]
        if ends:
            end = min(ends, key=lambda end: abs(end - middle))
            return text[:end], text[end:]
    return text[:middle], text[middle:]


def _without_frame(text: str, template: ChatTemplate, document_format: str) -> tuple[list[int], str]:
    """The ids that pretraining put before a document, and the text without any frame."""
    first = None
    if document_format == "minimind2":  # the markers are in the text
        controls = {token.content: id for id, token in template.tokenizer.get_added_tokens_decoder().items()}
        lead = next((token for token in controls if text.startswith(token)), "")
        tail = next((token for token in controls if text.endswith(token)), "")
        text, first = text.removeprefix(lead).removesuffix(tail), controls.get(lead)
    elif DOCUMENT_FRAMES[document_format][0]:  # text by the base may stand behind another token
        first = template.opening_id(document_format, template.vocab_size)
    return [] if first is None else [first], text


def _shortened(text: str, template: ChatTemplate, room: int) -> str:
    """The beginning of a text that is at most about `room` tokens long; its halves may come out a token longer."""
    if room < 2 * MIN_TOKENS:
        return ""
    while (length := len(template.encode_text(text))) > room:
        text = text[: int(len(text) * min(0.95, room / length))]
    return text


def _row(context: list[int], targets: list[int]) -> Row:
    ids = np.array(context + targets, np.int64)
    return ids, np.arange(len(ids)) >= len(context)
