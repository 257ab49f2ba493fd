"""Lines to documents of token ids, or to the reasons why they are none.

A pure function of the lines, many at once, because the tokenizer is several times faster so.
"""

from __future__ import annotations

from typing import NamedTuple

from minimind_sft.chat import ChatTemplate, Span
from minimind_sft.formats import Conversation, PlainText, Rejected, parse


class Document(NamedTuple):
    """A line, tokenized."""

    spans: list[Span]
    source: str | None = None
    takes_system: bool = False


def tokenize(
    texts: list[str], template: ChatTemplate, *, format: str, document_format: str, supervise: str, reasoning: bool
) -> list[Document | Rejected]:
    """Lines to documents, or to the reasons why they are none, in order; see `corpus.build`."""
    parsed = [_parsed(text, format) for text in texts]
    chats = [entry for entry in parsed if isinstance(entry, Conversation)]
    raw = [entry for entry in parsed if isinstance(entry, PlainText)]
    rendered = iter(template.render_each(chats, supervise=supervise, reasoning=reasoning))
    framed = iter(template.documents([entry.text for entry in raw], format=document_format) if raw else [])
    made: list[Document | Rejected] = []
    for entry in parsed:
        if isinstance(entry, Conversation):
            spans = next(rendered)
            plain = not entry.tools and all(message["role"] != "system" for message in entry.messages)
            made.append(spans if isinstance(spans, Rejected) else Document(spans, takes_system=plain))
        else:
            made.append(Document(next(framed), entry.source) if isinstance(entry, PlainText) else entry)
    return made


def _parsed(text: str, format: str) -> Conversation | PlainText | Rejected:
    try:
        return parse(text, format=format)
    except Rejected as why:
        return why
