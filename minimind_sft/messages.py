"""What jsonargparse says of a value that it refuses, in words; its own messages name every type that it has tried.

    Parser key "data.max_mb": Does not validate against any of the Union subtypes Subtypes: [<class 'float'>, ...
    data.max_mb is 'foo'; it takes a number or null
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_KEY = r"(?:Parser key \"(?P<key>[^\"]+)\": )?"
_ONE = re.compile(_KEY + r"Expected an? (?P<kinds>.+?)\. Got value: (?P<value>.*)")
_UNION = re.compile(
    _KEY + r".*?Does not validate against any of the Union subtypes Subtypes: \[(?P<kinds>.*?)\] Errors:"
    r"(?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)"
)
_WORDS = {"NoneType": "null", "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
_LIST_OF_CLASSES = "a list of classes, as in [{class_path: my_file.MyTerm, init_args: {weight: 0.1}}]"


def plainly(message: str) -> str:
    """One line: the key, the value, and what the key takes or what is wrong with the value; other messages as they
    are."""
    message = " ".join(message.split())
    found = _UNION.search(message) or _ONE.fullmatch(message)
    if found is None:
        more = "; where it begins with a minus, write --key=value"
        return message + (more if message.endswith("expected one argument") else "")
    reasons = [reason.strip() for reason in re.split(r"(?:^| )- ", found.groupdict().get("errors") or "")]
    reasons = [plainly(reason) for reason in reasons if reason and not reason.startswith("Expected a")]
    if reasons:
        return ": ".join(filter(None, [found["key"], "; ".join(reasons)]))
    return f"{found['key'] or 'a value'} is {found['value']!r}; it takes {_kinds(found['kinds'])}"


def nearest_setting(key: str, known: Sequence[str]) -> str:
    """What to add to a message about an unknown key: the known one that it comes nearest to, whole or in its last part;
    empty where none is near."""
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = near or difflib.get_close_matches(key.split(".")[-1], [name.split(".")[-1] for name in known], 1, 0.6)
    return f". The nearest setting is {near[0]}" if near else ""


def _kinds(kinds: str) -> str:
    """Types as jsonargparse lists them -> "a number or null"."""
    words: list[str] = []
    for kind in re.split(r", (?![^\[]*\])", kinds):
        if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            words += choices[1].split(", ")
        elif kind.startswith("list[") and kind.endswith("Term]"):
            words.append(_LIST_OF_CLASSES)
        else:
            name = re.sub(r"^<class '(?:[\w.]*\.)?(\w+)'>$", r"\1", kind)
            words.append(_WORDS.get(name, name))
    return ", ".join(words[:-2] + [" or ".join(words[-2:])])
