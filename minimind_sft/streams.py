"""Blocks of bytes to a stream: what is made in pieces (zstd frames, rows) is read like an open file. No torch.

Whoever makes bytes is a generator, which keeps its state in local variables; nobody has to write `readinto` again.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast


class Blocks(io.RawIOBase):
    """Blocks of bytes of any size, end to end, as a stream that holds no more than one of them."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._ready = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._ready = memoryview(block)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def stream_of(blocks: Iterator[bytes], size: int) -> BinaryIO:
    """Blocks as a stream whose ``read`` gives all that was asked for; it is read in steps of ``size`` bytes."""
    return cast(BinaryIO, io.BufferedReader(Blocks(blocks), size))


def zstd_blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """All frames of a zstd file; the package's reader stops after the first, and at a cut-off end without a word.

    Raises:
        EOFError: for damaged data.
        ValueError: where the package is missing.
    """
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path} is zstd-compressed: `pip install zstandard` (the extra zst), or run `zstd -d` on it"
        ) from None
    frame, unread = None, b""  # the frame that is open; compressed bytes past the end of the one before
    while block := unread or raw.read(1 << 14):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            content = frame.decompress(block)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        unread = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
        yield content
    if frame is not None:
        raise EOFError("the last frame is incomplete")
