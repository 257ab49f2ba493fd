"""Plans: all about a chat's spans that chats of one shape share.

A plan is a skeleton with its control strings looked up and its own text encoded. What is left to do per chat is to put
texts in their places and to encode these, so a plan pays as soon as two chats share it; 150 plans cover 6,000 chats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from minimind_sft.skeleton import JSON_OPEN, MARK, OPEN, Skeleton, Slot, json_text


class Text(NamedTuple):
    """Text to be encoded as one: strings, slots (int), and slots as JSON (slot, options)."""

    parts: tuple[Any, ...]


class PlannedSpan(NamedTuple):
    """A span whose ids are known in part."""

    supervised: bool
    optional: bool
    ends_turn: bool
    items: list[list[int] | Text]

    def texts(self, slots: list[Slot]) -> Iterator[str]:
        """The span's texts to be encoded, filled in, in order."""
        for item in self.items:
            if isinstance(item, Text):
                yield "".join([
                    slots[part].value if isinstance(part, int) else part if isinstance(part, str)
                    else json_text(slots[part[0]].value, part[1]) for part in item.parts
                ])

    def ids(self, encoded: Iterator[list[int]]) -> list[int]:
        """The span's ids, taking those of its texts off `encoded`."""
        first, *rest = self.items
        ids = next(encoded) if isinstance(first, Text) else first[:]
        for item in rest:
            ids += next(encoded) if isinstance(item, Text) else item
        return ids


class Plan(NamedTuple):
    """How to fill chats of one shape.

    Attributes:
        spans: In order.
        dropped: The fields that the template drops, each as role and field.
    """

    spans: list[PlannedSpan]
    dropped: list[str]

    def texts(self, slots: list[Slot]) -> Iterator[str]:
        """The texts to be encoded, filled in, in order."""
        for span in self.spans:
            yield from span.texts(slots)


def planned_items(
    text: str,
    skeleton: Skeleton,
    *,
    control: re.Pattern[str],
    ids: dict[str, int],
    encode: Callable[[str], list[int]],
) -> list[list[int] | Text]:
    """Marked text as ids where they are known, and texts to be filled.

    Args:
        text: A stretch of the skeleton's text.
        skeleton: Where its marks lead.
        control: Matches a control string, as the group `token`.
        ids: The control strings' ids.
        encode: Encodes all other text.
    """
    items: list[list[int] | Text] = []
    position = 0
    for match in [*control.finditer(text), None]:
        parts = _parts(text[position : match.start() if match else len(text)], skeleton)
        known = all(isinstance(part, str) for part in parts)
        items.append(encode("".join(parts)) if known else Text(tuple(parts)))
        if match:
            items.append([ids[match["token"]]])
            position = match.end()
    merged: list[list[int] | Text] = []
    for item in items:
        if merged and isinstance(item, list) and isinstance(merged[-1], list):
            merged[-1] += item
        elif item:
            merged.append(item)
    return merged


def dropped_fields(skeleton: Skeleton, slots: list[Slot], roles: list[str]) -> list[str]:
    """The fields of which a slot does not occur in the skeleton."""
    used = {skeleton.slot_of(mark) for mark in MARK.finditer(skeleton.text)}
    return sorted({"tools" if slot.message < 0 else f"{roles[slot.message]} {slot.field}"
                   for number, slot in enumerate(slots) if number not in used})


def _parts(text: str, skeleton: Skeleton) -> list[Any]:
    """Marked text as strings, slots, and slots as JSON."""
    parts: list[Any] = []
    position = 0
    for mark in MARK.finditer(text):
        number = int(mark[2])
        parts.append(text[position : mark.start()])
        parts.append(number if mark[1] == OPEN else skeleton.jsons[number] if mark[1] == JSON_OPEN
                     else skeleton.tags[number])
        position = mark.end()
    return [part for part in [*parts, text[position:]] if part != ""]
