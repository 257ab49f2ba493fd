"""Jinja chat templates, rendered so that what people wrote stays apart from what the template wrote.

A rendered string alone cannot tell a template's `<|im_end|>` from one that a user typed. So people's text never enters
the template: each stretch of it is replaced by a slot, a short private mark that any Jinja operation carries along
whole, and the render is a *skeleton*: the template's own text, with slots. What a template may look at stays in the
open: white space at the ends of a text, and the strings that the template's source searches for or splits at (in
MiniMind's and Qwen's, `</think>`). Of these, a string that holds a control token stays open in assistant content only,
and only where the template acts on it: where hiding it changes nothing else in the output, the template merely passes
it through, and it is text.

Chats of one shape (the same roles and fields, ordinary text) share one skeleton, so Jinja runs once per shape and not
once per chat. Tool schemas and call arguments are sealed: a template can only hand them to `tojson`; for one that reads
inside them, they are opened, with a slot in the place of every string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.meta

from minimind_sft.sandbox import BEGIN, END, compile_template, looked_at
from minimind_sft.skeleton import (
    CLOSE,
    JSON_OPEN,
    MARK,
    OPEN,
    STRAY,
    TAG_OPEN,
    CutError,
    Jsons,
    Outline,
    Sealed,
    Skeleton,
    Slot,
    Touched,
)

_SPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
_PLAIN_KEY = re.compile(r"[A-Za-z_$][\w$.-]*")
_FIELDS = ("content", "reasoning_content", "tool_calls")


class Template:
    """A compiled chat template.

    Args:
        source: The Jinja source.
        controls: Every string that the tokenizer turns into one added token.
        variables: What the template may use besides the chat, such as `bos_token`.

    Raises:
        ValueError: The source is not a template.
    """

    def __init__(self, source: str, *, controls: Iterable[str], variables: dict[str, Any]) -> None:
        self._render, tree = compile_template(source, tojson=self._tojson)
        self.undeclared = jinja2.meta.find_undeclared_variables(tree)
        self._variables = variables
        self._seals = True
        self.changes_tools = False  # whether it rewrites them, so that chats with tools are refused
        self._jsons: Jsons = []
        self._control = either(controls)
        searched, self._stripped, whole, self._constants = looked_at(tree)
        self._whole = {text for text in whole if not self._control.search(text)}
        self._look_for(searched)

    def _look_for(self, searched: set[str]) -> None:
        live = {text for text in searched if self._control.search(text)}
        self._tag = either(live)
        self._quiet = either(searched - live) if searched - live else None
        self._strip = "".join(self._stripped) + _SPACE if self._stripped - set(_SPACE) else None

    def widen(self) -> None:
        """Leave every string that the source holds in the open: for a template that searches for a variable."""
        self._look_for(self._constants)

    # ---- from a chat to what the template may see of it

    def outline(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[Outline, list[Slot]]:
        """What the template can see of a chat, hashable, and the slots for what it cannot."""
        if self.changes_tools and (tools or any(message.get("tool_calls") for message in messages)):
            raise CutError("the chat template rewrites tools and calls, so that no one can tell whose text it is; use "
                           "another template for chats with tools")
        slots: list[Slot] = []
        seen: list[Any] = [None if tools is None else tuple([self._object(tool, slots, -1, "tools") for tool in tools])]
        for index, message in enumerate(messages):
            role = message["role"]
            content = self._open(message["content"], slots, index, "content", role == "assistant")
            reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
            if reasoning is None and calls is None:
                seen.append((role, content))
                continue
            if reasoning is not None:
                reasoning = self._open(reasoning, slots, index, "reasoning_content", False)
            if calls is not None:
                calls = self._opened(calls, slots, index, "tool_calls")
            seen.append((role, content, reasoning, calls))
        return tuple(seen), slots

    def _open(self, text: str, slots: list[Slot], message: int, field: str, tags: bool) -> str:
        if not text or text in self._whole:
            return text
        if tags and self._tag.search(text):
            parts = self._tag.split(text)
            shown = [self._open(part, slots, message, field, False) for part in parts]
            found = [*self._tag.findall(text), ""]
            return "".join(piece for pair in zip(shown, found, strict=True) for piece in pair)
        if self._quiet is not None and self._quiet.search(text):
            start = len(slots)
            shown = [self._hide(part, slots, message, field) for part in self._quiet.split(text)]
            found = [*self._quiet.findall(text), ""]
            opened = "".join(piece for pair in zip(shown, found, strict=True) for piece in pair)
            if not self._control.search(opened):
                return opened
            del slots[start:]
        return self._hide(text, slots, message, field)

    def _hide(self, text: str, slots: list[Slot], message: int, field: str) -> str:
        middle = text.strip(self._strip)
        if not middle:
            return text
        slots.append(Slot(middle, message, field))
        mark = f"{OPEN}{len(slots) - 1}{CLOSE}"
        if len(middle) == len(text):
            return mark
        left = len(text) - len(text.lstrip(self._strip))
        return f"{text[:left]}{mark}{text[left + len(middle) :]}"

    def _object(self, value: dict[str, Any], slots: list[Slot], message: int, field: str) -> Any:
        if not self._seals:
            return self._opened(value, slots, message, field)
        slots.append(Slot(value, message, field))
        return ("sealed", len(slots) - 1)

    def _opened(self, value: Any, slots: list[Slot], message: int, field: str) -> Any:
        """A JSON value as nested tuples, its strings opened, the arguments of calls sealed."""
        if isinstance(value, str):
            return self._open(value, slots, message, field, False)
        if isinstance(value, list):
            return ("list", tuple([self._opened(item, slots, message, field) for item in value]))
        if not isinstance(value, dict):
            return ("json", json.dumps(value))
        items = []
        for key, item in value.items():
            if not _PLAIN_KEY.fullmatch(key) or self._control.search(key):
                slots.append(Slot(key, message, field))
                key = f"{OPEN}{len(slots) - 1}{CLOSE}"
            sealed = key == "arguments" and isinstance(item, dict)
            items.append((key, (self._object if sealed else self._opened)(item, slots, message, field)))
        return ("dict", tuple(items))

    # ---- from there to the skeleton

    def skeleton(self, outline: Outline, flags: dict[str, Any]) -> Skeleton:
        """Render an outline.

        Args:
            outline: From `outline`, of this template.
            flags: Such as `add_generation_prompt`.

        Raises:
            Touched: The template reads inside tools or arguments: make the outline again, it will be an opened one.
            jinja2.TemplateError: The template refuses the chat.
            CutError: The template takes people's text apart.
        """
        tools, *messages = outline
        shown = [dict(zip(("role", *_FIELDS), map(_rebuilt, message), strict=False)) for message in messages]
        for message in shown:
            for field in _FIELDS[1:]:
                if message.get(field, "") is None:
                    del message[field]
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]  # gpt-oss's name, as the ecosystem passes it
        tags: list[str] = []
        text, jsons = self._marked(shown, tools, flags)
        for message in shown:
            position = 0
            while message["role"] == "assistant" and (match := self._tag.search(message["content"], position)):
                # Hide one control string: if nothing else in the output depends on it, the template passed it through.
                content, position = message["content"], match.end()
                mark = f"{TAG_OPEN}{len(tags)}{CLOSE}"
                tags.append(match[0])
                message["content"] = f"{content[: match.start()]}{mark}{content[match.end() :]}"
                hidden, hidden_jsons = self._marked(shown, tools, flags)
                if mark in hidden and _without_tags(hidden, tags) == _without_tags(text, tags):
                    text, jsons, position = hidden, hidden_jsons, match.start() + len(mark)
                else:
                    message["content"] = content
                    tags.pop()
        if STRAY.search(MARK.sub("", text)):
            raise CutError("the chat template cuts the text of messages into pieces, so that no one can tell them from "
                           "its own; use a template that passes the text on whole")
        return Skeleton(text, jsons, tags)

    def _marked(self, messages: list[dict[str, Any]], tools: Any, flags: dict[str, Any]) -> tuple[str, Jsons]:
        self._jsons = []
        return self._run(messages, None if tools is None else [_rebuilt(tool) for tool in tools], flags), self._jsons

    def _run(self, messages: list[dict[str, Any]], tools: list[Any] | None, flags: dict[str, Any]) -> str:
        try:
            return self._render(messages=messages, tools=tools, documents=None, **(self._variables | flags))
        except Touched:
            self._seals = False
            raise
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template is a stranger's code: whatever it raises is its refusal
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
                separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        layout = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        if isinstance(value, Sealed):
            self._jsons.append((value._slot, {"ensure_ascii": ensure_ascii, **layout}))
            return f"{JSON_OPEN}{len(self._jsons) - 1}{CLOSE}"

        def inside(match: re.Match[str]) -> str:
            self._jsons.append((int(match[1]), {"ensure_ascii": ensure_ascii}))
            return f"{JSON_OPEN}{len(self._jsons) - 1}{CLOSE}"

        text = json.dumps(value, ensure_ascii=ensure_ascii, **layout)  # type: ignore[arg-type]
        left, right = (re.escape(json.dumps(mark, ensure_ascii=ensure_ascii)[1:-1]) for mark in (OPEN, CLOSE))
        return re.sub(f"{left}([0-9]+){right}", inside, text)

    def plain(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, flags: dict[str, Any]) -> str:
        """Render with people's text in the open, as everyone else does: to compare with."""
        shown = [{**message, "thinking": message["reasoning_content"]} if "reasoning_content" in message else message
                 for message in messages]
        return re.sub(f"[{BEGIN}{END}]", "", self._run(shown, tools, flags))


def either(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; one that matches nothing where there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


def _without_tags(text: str, tags: list[str]) -> str:
    return re.sub(f"{TAG_OPEN}([0-9]+){CLOSE}", lambda match: tags[int(match[1])], text)


def _rebuilt(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, held = value
    if kind == "sealed":
        return Sealed(held)
    if kind == "json":
        return json.loads(held)
    if kind == "list":
        return [_rebuilt(item) for item in held]
    return {key: _rebuilt(item) for key, item in held}
