"""What is left of a chat when people's text is taken out: the types that rendering works with.

A *slot* holds a stretch of people's text. A *skeleton* is a rendered template with a mark for each slot. A parsed JSON
object goes into a template *sealed*, so that it can be passed on whole but not be read.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NoReturn

from minimind_sft.sandbox import BEGIN, END

# Marks are Unicode noncharacters: no template's source holds them, and people's text never stands beside them.
OPEN, JSON_OPEN, TAG_OPEN, CLOSE = "\ufdd0\ufdd1\ufdd2\ufdd3"
MARK = re.compile(f"([{OPEN}{JSON_OPEN}{TAG_OPEN}])([0-9]+){CLOSE}")
STRAY = re.compile(f"[{OPEN}{JSON_OPEN}{TAG_OPEN}{CLOSE}]")

Jsons = list[tuple[int, dict[str, Any]]]
Outline = tuple[Any, ...]  # hashable: everything about a chat that a template can see


class Slot(NamedTuple):
    """A stretch of people's text (or a sealed object), and the message and field it stands in (-1: the tools)."""

    value: Any
    message: int
    field: str


class Skeleton(NamedTuple):
    """A rendered template.

    Attributes:
        text: The template's own text, with marks: OPEN n CLOSE is slot n; JSON_OPEN n CLOSE is `jsons[n]`; TAG_OPEN n
            CLOSE is `tags[n]`; BEGIN and END enclose what `{% generation %}` does.
        jsons: (slot, options of `tojson`); the slot's value goes in as JSON, or as the inside of a JSON string.
        tags: Control strings in assistant content that the template passed through: people's text.
    """

    text: str
    jsons: Jsons
    tags: list[str]

    def slot_of(self, mark: re.Match[str]) -> int | None:
        """The slot that a mark stands for; None for a tag."""
        number = int(mark[2])
        return number if mark[1] == OPEN else self.jsons[number][0] if mark[1] == JSON_OPEN else None

    def value(self, mark: re.Match[str], slots: list[Slot]) -> str:
        """What a mark stands for."""
        number = int(mark[2])
        if mark[1] == OPEN:
            return slots[number].value
        if mark[1] == TAG_OPEN:
            return self.tags[number]
        slot, options = self.jsons[number]
        return json_text(slots[slot].value, options)

    def filled(self, slots: list[Slot]) -> str:
        """The rendered text, people's text in its place."""
        return MARK.sub(lambda mark: self.value(mark, slots), re.sub(f"[{BEGIN}{END}]", "", self.text))


class Touched(Exception):
    """A template read inside a sealed object."""


class CutError(ValueError):
    """A template does not pass people's text on whole."""


class Sealed(dict[str, Any]):
    """An object that a template can only hand to `tojson`."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self._slot = slot

    def _touched(self, *_: Any, **__: Any) -> NoReturn:
        raise Touched

    __getitem__ = __iter__ = __contains__ = __len__ = __eq__ = __str__ = __repr__ = _touched
    get = keys = values = items = copy = _touched
    __hash__ = None

    def __bool__(self) -> bool:
        return True


def json_text(value: Any, options: dict[str, Any]) -> str:
    """A slot's value as `tojson` writes it: an object whole, a string without its quotes."""
    text = json.dumps(value, **options)
    return text[1:-1] if isinstance(value, str) else text
