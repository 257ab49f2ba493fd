"""System prompts for a share of the chats that have none, without tokenizing a chat twice.

With every template looked at, a system message changes nothing but how the rendering begins: it stands in front, or
in the place of the template's own default prompt. Whether that holds for the template at hand is found out here, by
rendering probe chats with and without each prompt; then a chat with a prompt is the prompt's ids and the chat's own
ids behind those that it replaces. A template for which it does not hold is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minimind_sft.chat import ChatTemplate
from minimind_sft.files import resolve
from minimind_sft.formats import Conversation, Rejected

_QUESTIONS = ("Hi", "\n\nHow are you? ", " 3 + 4", "你好", "<think>\n", ".")
_CANARY = "Answer in verse."
_Tokens = list[tuple[int, bool]]  # ids, and whether each one is supervised
_ANSWERS = ("Fine.", "\n1", "<think>\nHm.\n</think>\n\n7")


class SystemPrompts(NamedTuple):
    """What stands at the beginning of a chat with each prompt.

    Attributes:
        texts: the prompts.
        ids: per prompt, what the rendering begins with.
        replaced: how many ids at the beginning of a chat without a system message these replace.
        extra: (P + 1,) ids that each prompt adds; the last is 0, for no prompt (-1).
    """

    texts: list[str]
    ids: list[list[int]]
    replaced: int
    extra: np.ndarray


def read_prompts(prompts: str | list[str]) -> list[str]:
    """The prompts that `data.system_prompts` names: a list of them, or a file with one a line.

    Raises:
        ValueError: for a file that is not there or not UTF-8, or a setting without a prompt.
    """
    if isinstance(prompts, str):
        try:
            prompts = resolve(prompts).read_text(encoding="utf-8-sig").split("\n")  # as everywhere: no other line ends
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"data.system_prompts: {error}. Name a text file with one prompt a line, or give a list"
            ) from error
    found = list(dict.fromkeys(line.strip() for line in prompts if line.strip()))
    if not found:
        raise ValueError("data.system_prompts holds no prompt; set it to null for none")
    return found


def find_prompts(template: ChatTemplate, texts: list[str]) -> SystemPrompts:
    """Find out how chats begin with each prompt.

    Args:
        template: tokenizer and chat template.
        texts: the prompts.

    Raises:
        ValueError: a system message does more in this template than to begin the rendering.
    """
    pairs = {text: _pairs(template, text) for text in [_CANARY, *texts]}
    if all(plain == prompted for plain, prompted in pairs[_CANARY]):
        raise ValueError("data.system_prompts: the chat template drops system messages; set it to null")
    begin = max(_where_the_rest_begins(template, *chats[0]) for chats in pairs.values())
    common = pairs[_CANARY][0][0][:begin]
    prefixes = {}
    for text, chats in pairs.items():
        plain, prompted = chats[0]
        prefixes[text] = [id for id, _ in prompted[: len(prompted) - (len(plain) - begin)]]
        front = [(id, False) for id in prefixes[text]]
        if any(chat[:begin] != common or front + chat[begin:] != with_it for chat, with_it in chats):
            raise ValueError(
                "data.system_prompts: in this chat template a system message does more than to stand at the beginning "
                f"of a chat ({text[:40]!r} changes what follows). Write the prompts into the chats themselves"
            )
    ids = [prefixes[text] for text in texts]
    return SystemPrompts(texts, ids, begin, np.array([*(len(prefix) - begin for prefix in ids), 0], np.int64))


def _pairs(template: ChatTemplate, text: str) -> list[tuple[_Tokens, _Tokens]]:
    """The probe chats, without and with a system prompt."""
    system = {"role": "system", "content": text}
    try:
        rendered = template.render_many(
            Conversation(chat) for messages in _probes() for chat in (messages, [system, *messages])
        )
    except Rejected as error:
        raise ValueError(f"data.system_prompts: the chat template takes no system message: {error}") from error
    tokens = [[(id, span.supervised) for span in spans for id in span.ids] for spans in rendered]
    return list(zip(tokens[::2], tokens[1::2], strict=True))


def _probes() -> list[list[dict[str, Any]]]:
    """Chats of one and two questions, which begin in different ways."""
    chats = [[(question, answer)] for question in _QUESTIONS for answer in _ANSWERS]
    chats += [[(_QUESTIONS[0], answer), (_QUESTIONS[1], _ANSWERS[0])] for answer in _ANSWERS]
    return [
        [
            message
            for question, answer in chat
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        ]
        for chat in chats
    ]


def _where_the_rest_begins(template: ChatTemplate, plain: _Tokens, prompted: _Tokens) -> int:
    """Where in a chat without the prompt begins what is the same with it: at a control token, as text on the two sides
    of one is encoded apart."""
    same = 0
    while same < min(len(plain), len(prompted)) and plain[-1 - same] == prompted[-1 - same]:
        same += 1
    begin = len(plain) - same
    controls = template.tokenizer.get_added_tokens_decoder()
    while begin < len(plain) and plain[begin][0] not in controls:
        begin += 1
    return begin
