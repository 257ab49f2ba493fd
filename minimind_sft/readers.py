"""Lines by their place: the bytes of a line, by seeking where that can be done, else from what was kept. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO, cast

from minimind_sft.sources import Source

OPEN_FILES = 64  # inputs open at a time


class Readers(dict[int, Callable[[int, int], bytes]]):
    """By file, a function from (size, offset) to bytes; of those not seekable, the next of the lines that were kept."""

    def __init__(self, sources: Sequence[Source], fetch: Callable[[int], bytearray]) -> None:
        super().__init__()
        self._sources, self._fetch, self._opened = sources, fetch, dict[int, BinaryIO]()

    def __missing__(self, file: int) -> Callable[[int, int], bytes]:
        if not self._sources[file].seekable:
            self[file] = _in_turn(memoryview(self._fetch(file)))
            return self[file]
        if len(self._opened) == OPEN_FILES:
            self.__exit__()
        stream = self._opened[file] = cast(BinaryIO, self._sources[file].path.open("rb", buffering=0))
        self[file] = partial(os.pread, stream.fileno()) if hasattr(os, "pread") else partial(_seek_and_read, stream)
        return self[file]

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for file, stream in self._opened.items():
            stream.close()
            del self[file]
        self._opened.clear()


def _in_turn(kept: memoryview) -> Callable[[int, int], bytes]:
    position = 0

    def read(size: int, offset: int) -> bytes:
        nonlocal position
        position += size
        return bytes(kept[position - size : position])

    return read


def _seek_and_read(stream: BinaryIO, size: int, offset: int) -> bytes:
    """`os.pread` where there is none (Windows)."""
    stream.seek(offset)
    return stream.read(size)
