"""Chats to token ids, each supervised or not: the only place that knows the chat format.

In comes a `Conversation`; out come spans of ids. The tokenizer's own template renders (`rendering.py`), its control
tokens are the only ones there are, and all other text goes through an encoder that knows none (`encoding.py`).

Supervised is what the model has to write: everything after the generation header (`<|im_start|>assistant\\n`) up to and
including the end of the turn (`<|im_end|>` and the newline after it), for every assistant turn. Both strings are
learned from the template itself, when it is loaded, by rendering a probe; a template with `{% generation %}` markers is
taken at its word. They are looked for in the template's text only, so nothing that anyone writes opens or closes a
span. Text is encoded apart on the two sides of every boundary, so what inference feeds (`prompt`) is an exact prefix of
what training saw, whatever the answer begins with.

The work per chat is filling a plan, which all chats of one shape share, and encoding its texts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tokenizers import Tokenizer

from minimind_sft.encoding import TextEncoder
from minimind_sft.formats import Conversation, Rejected
from minimind_sft.rendering import (
    BEGIN,
    END,
    JSON_OPEN,
    MARK,
    OPEN,
    Outline,
    Skeleton,
    Slot,
    Template,
    Touched,
    either,
    json_text,
)

CODE_VERSION = 1  # part of every cache key: raise it when the ids that come out change
DOCUMENT_FORMATS = ("minimind3", "minimind2", "bare")
_THINKING_FLAGS = ("enable_thinking", "open_thinking", "thinking")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")
_MAX_PLANS = 4096

# Chats that a template has to render in slots as it does in the open.
_TEXT = " \n He said: {\"a\": '<b>&</b>'}\n\n\tÜber 12 % — 你好，世界。\\n " * 3
_SYSTEM, _USER = {"role": "system", "content": _TEXT}, {"role": "user", "content": _TEXT}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, _TEXT]}}}
_TOOL = {"type": "function", "function": {"name": "f", "description": _TEXT, "parameters": {"type": "object"}}}
_PROBES: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    ([_USER, {"role": "assistant", "content": _TEXT}] * 2, None),
    ([_SYSTEM, _USER, {"role": "assistant", "content": _TEXT, "reasoning_content": _TEXT}], None),
    ([_USER, {"role": "assistant", "content": f"<think>\n{_TEXT}\n</think>\n\n{_TEXT}"}] * 2, None),
    ([_SYSTEM, _USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": _TEXT},
      {"role": "assistant", "content": _TEXT}], [_TOOL]),
]


class Span(NamedTuple):
    """Consecutive tokens of a document.

    Attributes:
        ids: Token ids.
        supervised: Whether they are targets.
        optional: Whether they are an empty think block, which may be left out.
    """

    ids: list[int]
    supervised: bool
    optional: bool = False


class _Segment(NamedTuple):
    """A stretch of marked text and what becomes of it; `message` is the assistant message that it is the turn of."""

    text: str
    supervised: bool = False
    optional: bool = False


class _Text(NamedTuple):
    """Text to be encoded as one: strings, slots (int), and slots as JSON (slot, options)."""

    parts: tuple[Any, ...]


class _Plan(NamedTuple):
    """How to fill chats of one shape: per span, lists of ids and texts; and the fields that the template drops."""

    spans: list[tuple[bool, bool, list[list[int] | _Text]]]
    dropped: list[str]


class ChatTemplate:
    """A tokenizer and its chat template.

    Attributes:
        tokenizer: The tokenizer as it was shipped; control strings in its input become control tokens.
        vocab_size: The largest id plus one.
        bos_id, eos_id: As the tokenizer's configuration names them; None where it names none.
        stop_ids: The ids at which generation ends.
        fingerprint: SHA-256 over all that decides the ids that come out.
        dropped: How many chats lost what to the template, by name.
    """

    def __init__(self, specification: str, template: str, *, variables: dict[str, Any]) -> None:
        self.tokenizer = Tokenizer.from_str(specification)
        parsed = json.loads(specification)
        self._controls = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        self._control = _control_pattern(parsed["added_tokens"])
        self._encoder = TextEncoder(parsed)
        self._template = Template(template, controls=self._controls, variables=variables)
        self._plans: dict[Any, _Plan] = {}
        self.dropped: Counter[str] = Counter()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id = (self._controls.get(variables.get(name, "")) for name in ("bos_token", "eos_token"))
        known = json.dumps([specification, template, variables, CODE_VERSION])
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()
        if not self._is_faithful():
            self._template.widen()
            if not self._is_faithful():
                raise ValueError("the chat template changes the text of messages, beyond stripping white space off it "
                                 "and splitting it, so that no one can tell whose it is; use one that does not")
        self._learn_boundaries()

    @classmethod
    def from_folder(cls, folder: Path | str) -> ChatTemplate:
        """Read a tokenizer folder: tokenizer.json, tokenizer_config.json, and chat_template.jinja where there is one.

        Raises:
            ValueError: The folder has no tokenizer or no chat template, or one that cannot be used.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; data.tokenizer must name a folder that holds it and "
                             "tokenizer_config.json, as save_pretrained writes them")
        config = _read_json(folder / "tokenizer_config.json")
        template = _template_source(folder, config)
        variables = {name: value["content"] if isinstance(value, dict) else value
                     for name, value in config.items() if name.endswith("_token")}
        variables = {name: value for name, value in variables.items() if isinstance(value, str)}
        try:
            return cls(file.read_text(encoding="utf-8"), template, variables=variables)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    # ---- the rest of the program's interface

    def render(self, conversation: Conversation, *, supervise: str = "all") -> list[Span]:
        """The spans of one conversation; see `render_many`."""
        return self.render_many([conversation], supervise=supervise)[0]

    def render_many(self, conversations: Iterable[Conversation], *, supervise: str = "all") -> list[list[Span]]:
        """The spans of each conversation; concatenated, their ids are the conversation's.

        Args:
            conversations: From `formats.parse`. A message with `train` false is context.
            supervise: `all` assistant turns, or the `last`.

        Raises:
            Rejected: The template refuses a conversation (`template_refused`).
        """
        plans, texts = [], []
        for conversation in conversations:
            plan, slots = self._plan(conversation.messages, conversation.tools, supervise=supervise)
            self.dropped.update(plan.dropped)
            plans.append(plan)
            texts += _filled(plan, slots)
        encoded = iter(self._encoder.encode_many(texts))
        return [
            [Span(_joined(items, encoded), supervised, optional) for supervised, optional, items in plan.spans]
            for plan in plans
        ]

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, thinking: bool = False
    ) -> list[int]:
        """What inference feeds: the messages and the header of the answer to come."""
        flags = {"add_generation_prompt": True} | {flag: thinking for flag in self._thinking_flags}
        plan, slots = self._plan(messages, tools, flags=flags)
        encoded = iter(self._encoder.encode_many(_filled(plan, slots)))
        return [id for _, _, items in plan.spans for id in _joined(items, encoded)]

    def document(self, text: str, *, format: str) -> list[Span]:
        """Raw text as the family's pretraining framed it; every token is supervised, save the first, which has no past.

        Args:
            text: The document.
            format: `minimind3`: `<|im_start|>` text `<|im_end|>`. `minimind2`: the text holds these markers itself, and
                they are live. `bare`: the text alone.
        """
        if format not in DOCUMENT_FORMATS:
            raise ValueError(f"data.document_format {format!r} is not known; choose from {', '.join(DOCUMENT_FORMATS)}")
        if format == "minimind3":
            if self.bos_id is None or self.eos_id is None:
                raise ValueError("data.document_format minimind3 needs a tokenizer with a bos_token and an eos_token")
            return [Span([self.bos_id], False), Span(self.encode_text(text), True), Span([self.eos_id], True)]
        ids = self.encode_text(text) if format == "bare" else self.tokenizer.encode(text, add_special_tokens=False).ids
        return [Span(ids[:1], False), Span(ids[1:], True)]

    def encode_text(self, text: str) -> list[int]:
        """The ids of people's text: no string in it is a control token."""
        return self._encoder.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    # ---- plans

    def _plan(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, supervise: str = "all",
              flags: dict[str, Any] | None = None) -> tuple[_Plan, list[Slot]]:
        context = [index for index, message in enumerate(messages) if not message.get("train", True)]
        if supervise == "last":
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            context = sorted({*context, *answers[:-1]})
        flags = flags or {"add_generation_prompt": False}
        outline, slots = self._template.outline(messages, tools)
        key = (outline, tuple(context), tuple(flags.values()))
        plan = self._plans.get(key)
        if plan is None:
            try:
                skeleton = self._template.skeleton(outline, flags)
            except Touched:
                return self._plan(messages, tools, supervise=supervise, flags=flags)
            except jinja2.TemplateError as error:
                raise Rejected("template_refused", f"the chat template says: {error}") from None
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._compile(skeleton, outline, slots, set(context))
        return plan, slots

    def _compile(self, skeleton: Skeleton, outline: Outline, slots: list[Slot], context: set[int]) -> _Plan:
        spans: list[tuple[bool, bool, list[list[int] | _Text]]] = []
        answers = [index for index, message in enumerate(outline[1:]) if message[0] == "assistant"]
        for segment in self._segments(skeleton, slots, answers, context):
            if segment.text:
                spans.append((segment.supervised, segment.optional, self._items(segment.text, skeleton)))
        used = {int(match[2]) if match[1] == OPEN else skeleton.jsons[int(match[2])][0]
                for match in MARK.finditer(skeleton.text) if match[1] in (OPEN, JSON_OPEN)}
        lost = {f"{'tools' if slot.message < 0 else outline[1 + slot.message][0] + ' ' + slot.field}"
                for number, slot in enumerate(slots) if number not in used}
        return _Plan(spans, sorted(lost))

    def _segments(self, skeleton: Skeleton, slots: list[Slot], answers: list[int], context: set[int]) -> list[_Segment]:
        """Cut marked text at the boundaries of turns, and within turns where a prompt may end."""
        text, turns = self._turns(skeleton.text)
        segments, position = [], 0
        for number, (start, end) in enumerate(turns):
            mark = next((mark for mark in MARK.finditer(text, start, end) if mark[1] == OPEN), None)
            message = slots[int(mark[2])].message if mark else None
            if message is None and len(turns) == len(answers):
                message = answers[number]
            supervised = message not in context
            segments.append(_Segment(text[position:start]))
            head = next((tail for tail in self._tails if text.startswith(tail, start)), "")
            segments.append(_Segment(text[start : start + len(head)], supervised, head in self._blocks))
            segments.append(_Segment(text[start + len(head) : end], supervised))
            position = end
        return [*segments, _Segment(text[position:])]

    def _turns(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Marked text without BEGIN and END, and where the assistant's turns lie in it."""
        if BEGIN in text:
            parts = re.split(f"[{BEGIN}{END}]", text)
            edges = list(accumulate(map(len, parts)))
            return "".join(parts), [(edges[i], edges[i + 1]) for i in range(0, len(parts) - 1, 2)]
        turns, position = [], 0
        while (found := text.find(self._header, position)) >= 0:
            start = found + len(self._header)
            following = text.find(self._header, start)
            limit = len(text) if following < 0 else following
            found = text.find(self._end, start, limit)
            position = limit if found < 0 else found + len(self._end)
            turns.append((start, position))
        return text, turns

    def _items(self, text: str, skeleton: Skeleton) -> list[list[int] | _Text]:
        """Marked text as ids where they are known, and texts to be filled."""
        items: list[list[int] | _Text] = []
        position = 0
        for match in [*self._control.finditer(text), None]:
            parts = _parts(text[position : match.start() if match else len(text)], skeleton)
            if all(isinstance(part, str) for part in parts):
                ids = self.encode_text("".join(parts))
                if items and isinstance(items[-1], list):
                    items[-1].extend(ids)
                else:
                    items.append(ids)
            else:
                items += [_Text(tuple(parts)), []]
            if match:
                last = items[-1]
                assert isinstance(last, list)
                last.append(self._controls[match["token"]])
                position = match.end()
        return [item for item in items if item]

    # ---- what is learned from the template

    def _is_faithful(self) -> bool:
        """Whether a few chats, filled in, are what the template makes of them in the open."""
        for messages, tools in _PROBES:
            flags = {"add_generation_prompt": False}
            try:
                plain = self._template.plain(messages, tools, flags)
            except (jinja2.TemplateError, TypeError, ValueError):
                continue  # not every template takes tools or a system prompt
            outline, slots = self._template.outline(messages, tools)
            try:
                skeleton = self._template.skeleton(outline, flags)
            except Touched:
                outline, slots = self._template.outline(messages, tools)
                skeleton = self._template.skeleton(outline, flags)
            if skeleton.filled(slots) != plain:
                return False
        return True

    def _learn_boundaries(self) -> None:
        """Find the generation header, the end of a turn, and what may follow the header, by rendering a probe."""
        flags = self._template.undeclared.intersection(_THINKING_FLAGS)
        self._thinking_flags = sorted(flags)
        probe = [{"role": role, "content": f"probe {number}", "train": True}
                 for number, role in enumerate(("user", "assistant", "user", "assistant"))]
        text = re.sub(f"[{BEGIN}{END}]", "", self._probe(probe, {}))
        marks = list(MARK.finditer(text))
        if [int(mark[2]) for mark in marks] != [0, 1, 2, 3]:
            raise ValueError("the chat template does not render two questions and two answers in order")
        between, after = text[marks[1].end() : marks[2].start()], text[marks[3].end() :]
        self._end = _common_prefix([between, after])
        if not self._control.search(self._end):
            raise ValueError("the chat template does not end the assistant's turns with a control token, so nothing "
                             f"would teach the model to stop (it writes {after!r}); add eos_token")
        lead = text[marks[2].end() : marks[3].start()]
        asked = self._probe(probe[:1], {})
        prompts = {self._probe(probe[:1], {"add_generation_prompt": True} | {flag: value for flag in flags})
                   .removeprefix(asked) for value in (True, False)}
        header = _common_prefix(sorted(prompts)) or lead
        self._header = header.split("<think>")[0].removeprefix(self._end)
        if not self._header or self._header not in lead:
            raise ValueError(f"the chat template's generation prompt {header!r} is not how answers begin ({lead!r})")
        heads = {prompt.removeprefix(self._header) for prompt in prompts} | {lead.split(self._header)[-1]}
        self._tails = sorted((head for head in heads if head), key=len, reverse=True)
        self._blocks = {head for head in heads if _EMPTY_THINK.fullmatch(head)}
        first = self._control.search(self._end)
        assert first is not None
        self.stop_ids = tuple(dict.fromkeys(
            [self._controls[first["token"]], *([] if self.eos_id is None else [self.eos_id])]))

    def _probe(self, messages: list[dict[str, Any]], flags: dict[str, Any]) -> str:
        outline, _ = self._template.outline(messages, None)
        try:
            return self._template.skeleton(outline, {"add_generation_prompt": False} | flags).text
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses a question and an answer: {error}") from None


def _filled(plan: _Plan, slots: list[Slot]) -> list[str]:
    """The texts of a plan, filled in, in order."""
    texts = []
    for _, _, items in plan.spans:
        for item in items:
            if isinstance(item, _Text):
                texts.append("".join([
                    part if isinstance(part, str) else slots[part].value if isinstance(part, int)
                    else json_text(slots[part[0]].value, part[1]) for part in item.parts
                ]))
    return texts


def _joined(items: list[list[int] | _Text], encoded: Iterator[list[int]]) -> list[int]:
    ids: list[int] = []
    for item in items:
        ids += next(encoded) if isinstance(item, _Text) else item
    return ids


def _parts(text: str, skeleton: Skeleton) -> list[Any]:
    """Marked text as strings, slots, and slots as JSON."""
    parts: list[Any] = []
    position = 0
    for match in MARK.finditer(text):
        number = int(match[2])
        parts += [text[position : match.start()]] if match.start() > position else []
        parts.append(number if match[1] == OPEN else skeleton.jsons[number] if match[1] == JSON_OPEN
                     else skeleton.tags[number])
        position = match.end()
    return parts + ([text[position:]] if position < len(text) else [])


def _common_prefix(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    same = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same]


def _control_pattern(tokens: list[dict[str, Any]]) -> re.Pattern[str]:
    """Matches a control string with the white space that its token swallows; the string is the group `token`."""
    left, right = ([token["content"] for token in tokens if token.get(side)] for side in ("lstrip", "rstrip"))
    before = rf"(?:\s*(?={either(left).pattern}))?" if left else ""
    after = rf"(?:(?:{'|'.join(f'(?<={re.escape(text)})' for text in right)})\s*)?" if right else ""
    return re.compile(f"{before}(?P<token>{either(token['content'] for token in tokens).pattern}){after}")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str) or not template:
        raise ValueError(f"{folder} has no chat template; put one into tokenizer_config.json (chat_template) or "
                         "chat_template.jinja: a base model's tokenizer often lacks it, its chat model's has it")
    return template
