"""One line of any chat format in; a `Conversation`, a `PlainText`, or `Rejected` with a reason out.

Every format ends in one shape: messages with `role` (system, user, assistant, tool), `content` (a string), `train` (a
bool) and, where an assistant message has them, `reasoning_content` (a string) and `tool_calls` (parsed). What cannot be
used is refused here, under a short stable reason to count by and with a sentence for people. The format is told by the
keys of each line, so a file may mix them.

    minimind    {"conversations": [{"role": "user", "content": "..."}, ...]}; `tools`, `tool_calls` as JSON strings
    openai      {"messages": [...], "tools": [...]}; content may be a list of text parts, `weight` 0 or 1
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "system": "...", "tools": "..."}
    alpaca      {"instruction": "...", "input": "...", "output": "...", "history": [["q", "a"], ...], "system": "..."}
    completion  {"prompt": "...", "completion" or "response": "..."}; both may be lists of messages
    text        {"text": "...", "source": "...", "parent": "..."}; every token is supervised
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minimind_sft.strict_json import Rejected, describe, load

FORMATS = ("minimind", "openai", "sharegpt", "alpaca", "completion", "text")
ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {role: role for role in ROLES} | {
    "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool",
    "function_response": "tool", "ipython": "tool",
}
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")


@dataclass(slots=True)
class Conversation:
    """A chat.

    Attributes:
        messages: Each with `role`, `content`, `train`, and where present `reasoning_content` and `tool_calls`.
        tools: Tool schemas, parsed; None where the chat has none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(slots=True)
class PlainText:
    """A document of raw text, with the row's `source` and `parent` where it names them."""

    text: str
    source: str | None = None
    parent: str | None = None


def parse(text: str, *, format: str = "auto") -> Conversation | PlainText:
    """Read one line.

    Args:
        text: The line, decoded; white space around it is ignored.
        format: One of `FORMATS`, or `auto` to tell it by the line's keys.

    Raises:
        Rejected: The line cannot be used.
        ValueError: `format` is not a format.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format {format!r} is not known; choose one of auto, {', '.join(FORMATS)}")
    row = load(text)
    if not isinstance(row, dict):
        raise Rejected("not_an_object", f"the line is {describe(row)}; each line must be one JSON object")
    return _READERS[_detect(row) if format == "auto" else format](row)


def _detect(row: dict[str, Any]) -> str:
    """The format by the keys that hold something, or else by all of them."""
    filled = {key: value for key, value in row.items() if value is not None}
    if (found := _told(filled) or _told(row)) is not None:
        return found
    keys = ", ".join(sorted(map(str, row))[:8]) or "none"
    raise Rejected("unknown_format", f"keys are {keys}; expected conversations, messages, instruction + output, "
                                     "prompt + completion, or text")


def _told(row: dict[str, Any]) -> str | None:
    if "conversations" in row:
        turns = row["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "minimind"
    if "messages" in row:
        return "openai"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "completion"
    return "text" if "text" in row else None


# ---- one reader per format


def _read_messages(row: dict[str, Any]) -> Conversation:
    key = "messages" if row.get("messages") is not None else "conversations"
    turns = row.get(key)
    if isinstance(turns, list):
        turns = _system(row) + turns
    return _conversation(turns, where=key, tools=row.get("tools"))


def _system(row: dict[str, Any]) -> list[Any]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _read_sharegpt(row: dict[str, Any]) -> Conversation:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise Rejected("not_a_list", f"conversations is {describe(turns)}; it must be a list of messages")
    messages = _system(row)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Rejected("not_an_object", f"message {number} is {describe(turn)}; it must be an object")
        message = {key: value for key, value in turn.items() if key not in ("from", "value")}
        message |= {"role": turn.get("from"), "content": turn.get("value")}
        if turn.get("from") == "function_call":
            message |= {"content": "", "tool_calls": turn.get("value")}
        messages.append(message)
    return _conversation(messages, where="conversations", tools=row.get("tools"))


def _read_alpaca(row: dict[str, Any]) -> Conversation:
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Rejected("bad_history", "history must be a list of [question, answer] pairs")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question, extra = row.get("instruction"), row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise Rejected("content_not_a_string", f"input is {describe(extra)}; write it as a string")
    if extra and isinstance(question, str):
        question = f"{question}\n{extra}" if question else extra
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row.get("output")}]
    return _conversation(messages, where="instruction, output", tools=row.get("tools"))


def _read_completion(row: dict[str, Any]) -> Conversation:
    prompt, answer = row.get("prompt"), row.get("completion", row.get("response"))
    messages = _system(row)
    messages += prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    messages += answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return _conversation(messages, where="prompt, completion", tools=row.get("tools"))


def _read_text(row: dict[str, Any]) -> PlainText:
    text = row.get("text")
    if not isinstance(text, str):
        raise Rejected("content_not_a_string", f"text is {describe(text)}; write it as a string")
    if not text or text.isspace():
        raise Rejected("empty", "text is blank")
    return PlainText(text, _name(row.get("source")), _name(row.get("parent")))


def _name(value: Any) -> str | None:
    """Of a source or a parent: text, a number such as an id, or whatever else tells one from another."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


_READERS: dict[str, Callable[[dict[str, Any]], Conversation | PlainText]] = {
    "minimind": _read_messages, "openai": _read_messages, "sharegpt": _read_sharegpt, "alpaca": _read_alpaca,
    "completion": _read_completion, "text": _read_text,
}


# ---- what all chats share


def _conversation(turns: Any, *, where: str, tools: Any) -> Conversation:
    if not isinstance(turns, list):
        raise Rejected("not_a_list", f"{where} is {describe(turns)}; it must be a list of messages")
    if not turns:
        raise Rejected("empty", f"{where} holds no message")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Rejected("not_an_object", f"message {number} is {describe(turn)}; it must be an object")
        message = _message(turn, number)
        messages.append(message)
        if message["role"] == "system" and turn.get("tools"):  # MiniMind keeps the schemas here, as a JSON string
            tools = turn["tools"]
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no_assistant_turn", f"{len(messages)} messages and none is the assistant's: nothing to learn")
    return Conversation(messages, _objects(tools, "bad_tools", "tools") or None)


def _message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    named = turn.get("role")
    role = _ROLE_NAMES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Rejected("bad_role", f"message {number}: role is {describe(named)}; use one of {', '.join(ROLES)}")
    named_calls = turn.get("tool_calls") or turn.get("function_call")  # the second is OpenAI's former name of one
    calls = _tool_calls(named_calls, number) if role == "assistant" and named_calls else None
    content = turn.get("content")
    if not isinstance(content, str):
        content = "" if content is None and calls else _text_parts(content, f"message {number} ({role}): content")
    message: dict[str, Any] = {"role": role, "content": content, "train": _train(turn, number)}
    if calls:
        message["tool_calls"] = calls
    if role == "assistant":
        for name in _REASONING_NAMES:
            if (reasoning := turn.get(name)) is not None:
                message["reasoning_content"] = _text_parts(reasoning, f"message {number} ({role}): {name}")
                break
    return message


def _text_parts(content: Any, where: str) -> str:
    """A string as it is, or the text of a list of text parts, one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Rejected("content_not_a_string", f"{where} is {describe(content)}; write it as a string")
    texts: list[Any] = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
                        for part in content]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise Rejected("content_not_text", f"{where} has a part that is not text, {describe(wrong[0])}; remove it")
    return "".join(texts)


def _train(turn: dict[str, Any], number: int) -> bool:
    train = turn.get("weight") if turn.get("train") is None else turn["train"]
    if train is None or train in (True, False):  # 1 and 0 are equal to these
        return train is None or bool(train)
    raise Rejected("bad_train", f"message {number}: train or weight is {describe(train)}; write true or false")


def _tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    where = f"message {number}: tool_calls"
    calls = _objects(value, "bad_tool_calls", where)
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("bad_tool_calls", f"{where}: a call without a name that is a string")
        if not isinstance(function.get("arguments"), (dict, str)):
            raise Rejected("bad_tool_calls", f"{where}: arguments of {function['name'][:40]!r} must be an object or a "
                                             "string")
    return calls


def _objects(value: Any, reason: str, where: str) -> list[dict[str, Any]]:
    """A list of objects, or a JSON string of one; a single object counts as a list of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = load(value)
        except Rejected as error:
            raise Rejected(reason, f"{where} is a string that is not JSON ({error.reason}); write it as JSON") from None
    if isinstance(value, dict):
        value = [value]
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Rejected(reason, f"{where} must be a list of objects")
    return value
