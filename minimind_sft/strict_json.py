"""JSON that means one thing, or is refused by name.

What Python's `json` lets through and the rest of the program must never meet: an object that says two things (duplicate
keys), numbers that JSON does not have (NaN), text that UTF-8 cannot hold (lone surrogates), nesting that a recursive
function stumbles over. A chat costs 12 us here, 5 in plain `json`; the check for duplicate keys is the difference.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

BYTE_ORDER_MARK = "\ufeff"
_MAX_DEPTH = 100
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class Rejected(Exception):
    """A line that cannot be used.

    Attributes:
        reason: A short stable name to count by, such as `not_json` or `no_assistant_turn`.
        detail: The value that was met and what to do about it, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def load(text: str) -> Any:
    """Parse a JSON text; a byte order mark before it, which some editors put in front of a file, is no part of it.

    Raises:
        Rejected: `empty`, `not_json`, `duplicate_key`, `not_a_number`, `lone_surrogate` or `too_deep`.
    """
    if not text or text.isspace():
        raise Rejected("empty", "the line is blank")
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise Rejected("lone_surrogate", f"the line holds {found[0]!r}, which UTF-8 cannot hold; re-encode the file")
    try:
        row = _DECODER.decode(text.removeprefix(BYTE_ORDER_MARK))
    except RecursionError:
        raise Rejected("too_deep", f"the JSON is nested over {_MAX_DEPTH} levels deep; flatten it") from None
    except ValueError as error:
        raise Rejected("not_json", f"{error}; the line begins {text[:40]!r}") from None
    if "\\u" in text and _SURROGATE_ESCAPE.search(text) or text.count("[") + text.count("{") > _MAX_DEPTH:
        _inspect(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Rejected("duplicate_key", f"key {twice!r} stands twice in one object; keep one of them")
    return mapping


def _no_constant(name: str) -> NoReturn:
    raise Rejected("not_a_number", f"{name} is not JSON; write null or a string")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _inspect(row: Any) -> None:
    """Refuse lone surrogates, and nesting that later code (and other people's) would stumble over."""
    pending = [(row, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            if found := _SURROGATE.search(value):
                raise Rejected("lone_surrogate", f"half a character, {found[0]!r}; write both halves or remove it")
        elif isinstance(value, (dict, list)):
            if depth >= _MAX_DEPTH:
                raise Rejected("too_deep", f"the JSON is nested over {_MAX_DEPTH} levels deep; flatten it")
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending += [(item, depth + 1) for item in inner]


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have, for whoever writes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def describe(value: Any) -> str:
    """What was met, for a message: its kind and its beginning."""
    kind = {"NoneType": "missing or null", "dict": "an object", "list": "a list", "bool": "a boolean",
            "str": "a string", "int": "a number", "float": "a number"}[type(value).__name__]
    if value is None:
        return kind
    text = json.dumps(value, ensure_ascii=False)
    return f"{kind}, {text if len(text) <= 60 else text[:57] + '...'}"
