"""A JSON array to lines: its elements, one a line, as a stream in bounded memory. No torch.

In come the bytes of a file such as ``[{...}, {...}]``, in pieces; out come the same bytes, in which every comma of the
array is a line break, and no element has one. So whatever reads JSON lines reads arrays: element n is line n, and a
broken one is a line that `strict_json` refuses by name. What happens to the bytes of an element:

- a line break between values becomes a space, and of white space between values only the first byte stays;
- a line break within a string, where JSON has none, becomes a vertical tab, which JSON does not have there either:
  otherwise a broken element would be mended in silence.

An element of one line is thus written as it is. Nothing is parsed: which bytes lie within strings, and how deep the
brackets are, is numpy over a piece and a few bits of state between pieces: 0.2 GB/s on one core, whatever the content.
A ``}`` too many spoils its element alone. One that is missing, or a quote, leaves the array open to the end of the
file: an error that says where the element begins. A comma too many is a blank line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

HEAD = 1 << 16  # bytes that are looked at to tell an array
QUOTE, BACKSLASH, END = b'"\\]'
OPENS, CLOSES, COMMA, WHITE = 1, 2, 4, 8
KINDS = bytearray(256)  # what each byte is outside strings
for _kind, _bytes in ((OPENS, b"[{"), (CLOSES, b"]}"), (COMMA, b","), (WHITE, b" \t\n\r")):
    for _byte in _bytes:
        KINDS[_byte] = _kind


def kind_of(content: BinaryIO) -> str:
    """What a ``.json`` file is: an "array"; "object", where it is a single one; else "lines".

    Args:
        content: from its beginning, decompressed.
    """
    head = _head(content)
    if not head.startswith(b"{"):
        return "array" if head.startswith(b"[") else "lines"
    return "object" if _is_all(head, content) else "lines"


def is_one_array(content: BinaryIO) -> bool:
    """Whether a file of lines, by its name, is a single array of objects instead; as a line may be an array, too.

    Args:
        content: from its beginning, decompressed.
    """
    head = _head(content)
    return head.startswith(b"[") and head[1:].lstrip().startswith(b"{") and _is_all(head, content)


def _head(content: BinaryIO) -> bytes:
    return content.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()


def _is_all(head: bytes, content: BinaryIO) -> bool:
    """Whether the value that a file begins with is not on a line of its own among others."""
    first, newline, rest = head.replace(b"\r", b"\n").partition(b"\n")
    return _goes_on(first.rstrip()) if rest.strip() else not _more(content, ended=bool(newline))


def _goes_on(line: bytes) -> bool:
    """Whether a value that begins on this line needs another one: its end is missing, and not in mid-string."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.decode(errors="replace"))
    except (UnicodeDecodeError, RecursionError):
        pass
    return False


def _more(content: BinaryIO, *, ended: bool) -> bool:
    """Whether anything follows the line at hand, which may have ended already."""
    while piece := content.read(HEAD):
        if not ended:
            _, newline, piece = piece.replace(b"\r", b"\n").partition(b"\n")
            ended = bool(newline)
        if ended and piece.strip():
            return True
    return False


def array_blocks(path: Path, content: BinaryIO, size: int) -> Iterator[bytes]:
    """The elements of an array as lines, in blocks.

    Args:
        path: of the file, for messages.
        content: from its beginning, decompressed; an array by `kind_of`.
        size: bytes to read at a time.

    Raises:
        ValueError: the array is not closed, or something follows it.
    """
    elements, position, held = _Elements(), 1, b""
    while content.read(1) not in (b"[", b""):  # a byte order mark and white space
        position += 1
    while not elements.closed and (piece := content.read(size)):
        piece = held + piece
        held = piece[-1:] if (len(piece) - len(piece.rstrip(b"\\"))) % 2 else b""  # it escapes what is still to come
        piece = piece[: len(piece) - len(held)]
        if piece:
            position += len(piece)
            yield elements.feed(piece, position - len(piece))
    if not elements.closed:
        raise ValueError(
            f"{path}: the array is not closed; element {elements.count:,}, which begins at byte {elements.begins:,}, "
            "is the last one found. Is the file cut off, or is a bracket or a quote missing in that element?"
        )
    rest, at = piece[len(piece) - (position - elements.end) :] + held, elements.end
    while not (stripped := rest.lstrip()) and (piece := content.read(size)):
        at, rest = at + len(rest), piece
    if stripped:
        raise ValueError(
            f"{path}: the array ends at byte {elements.end:,}, after {elements.count:,} elements, but at byte "
            f"{at + len(rest) - len(stripped):,} more follows: {stripped[:20]!r}. Is a `]` too many?"
        )


class _Elements:
    """What is known of the array so far, and the bytes that its next piece becomes.

    Attributes:
        count: elements begun; the last of them begins at byte ``begins`` of the file.
        closed: whether the array's end is found; byte ``end`` comes after it.
    """

    def __init__(self) -> None:
        self.count, self.begins, self.closed, self.end = 1, 1, False, 0
        self._depth, self._inside, self._white = 1, 0, False  # brackets, whether in a string, in white space

    def feed(self, piece: bytes, position: int) -> bytes:
        """The lines of a piece that ends in no escape; it lies at byte ``position`` of the file."""
        units = np.frombuffer(piece, dtype=np.uint8)  # (N,)
        inside = self._strings(units)
        kinds = np.frombuffer(piece.translate(KINDS), dtype=np.uint8) * (inside ^ 1)
        places = np.flatnonzero((kinds & (OPENS | CLOSES | COMMA)) != 0)  # (P,)
        before = self._depths(kinds[places])  # (P,)
        last = places[(units[places] == END) & (before == 1)][:1]
        size = int(last[0]) if last.size else units.size
        commas = places[(kinds[places] == COMMA) & (before == 1) & (places < size)]
        if last.size:
            self.closed, self.end = True, position + size + 1
        if commas.size:
            self.count, self.begins = self.count + commas.size, position + int(commas[-1]) + 1
        lines = units[:size].copy()
        for mark in (0x0A, 0x0D):
            if mark in piece:
                breaks = np.flatnonzero(lines == mark)
                lines[breaks] = np.where(inside[breaks], 0x0B, 0x20)
        lines[commas] = 0x0A
        return self._shrunk(lines, kinds[:size] == WHITE)

    def _strings(self, units: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N,) 1 where a byte lies in a string, its first quote included."""
        turns = units == QUOTE
        slashes = np.flatnonzero(units == BACKSLASH)
        if slashes.size:
            runs = slashes - np.arange(slashes.size)  # the same along a run of them
            in_run = np.arange(slashes.size) - np.searchsorted(runs, runs)
            turns[slashes[in_run % 2 == 0] + 1] = False  # the first of a run escapes, the second is escaped
        quotes = np.flatnonzero(turns)  # (Q,)
        parts = (np.arange(quotes.size + 1) + self._inside).astype(np.uint8) & 1  # outside, inside, outside, ...
        self._inside = int(parts[-1])
        return np.repeat(parts, np.diff(quotes, prepend=0, append=units.size))

    def _depths(self, marks: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(P,) how many brackets are open before each mark, the array's own included; no ``}`` closes that one."""
        depths = np.empty(marks.size + 1, dtype=np.int64)
        depths[0] = self._depth
        np.cumsum((marks == OPENS).astype(np.int64) - (marks == CLOSES), out=depths[1:])
        depths[1:] += self._depth
        depths += np.maximum(0, np.maximum.accumulate(1 - depths))  # held at 1 from below
        self._depth = int(depths[-1])
        return depths[:-1]

    def _shrunk(self, lines: NDArray[np.uint8], white: NDArray[np.bool_]) -> bytes:
        """Of white space, which ``white`` marks, the first byte of each run."""
        again = white.copy()
        again[1:] &= white[:-1]
        again[:1] &= self._white
        self._white = bool(white[-1]) if white.size else self._white
        return (lines[~again] if again.any() else lines).tobytes()
