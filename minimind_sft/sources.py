"""Paths to bytes: what the user names in, checked files read as chunks of lines out. No torch.

Compressed input (gzip, zstd) and Parquet are recognised by their first bytes, which cannot begin UTF-8 text or JSON,
and not by the name. Only a ``.json`` may be a JSON array; one that begins otherwise holds lines. Whatever a file holds
is read as lines: those of a text, an array's elements (`arrays.py`), a table's rows (`parquet.py`).

A file is read twice (once to choose lines, once to fetch them), so that it need not be in memory; the price is that a
change between the passes must be an error, which size and modification time show, and that a pipe cannot be an input.
"""

import glob
import gzip
import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from minimind_sft.arrays import array_blocks, is_one_array, kind_of
from minimind_sft.parquet import MAGIC as PARQUET
from minimind_sft.parquet import parquet_blocks
from minimind_sft.streams import stream_of, zstd_blocks

MEBIBYTE = 1024 * 1024
CHUNK = 1 << 20  # bytes read at a time: a quarter of it costs a fifth more time per byte, in calls
BUFFER = CHUNK + 3  # and what is left of the piece before: at most three bytes of a code point
JSON = (".json", ".json.gz", ".json.zst")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", *JSON, ".parquet")  # what a folder is searched for
TABLES = (".csv", ".tsv", ".xlsx", ".xls")  # not read, and never lines of JSON
UNITS = {"array": "element", "parquet": "row"}
ARCHIVE = b"PK\x03\x04"
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def expand(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a path, a glob, a folder or a list of them names, in the order given.

    A glob's and a folder's files come sorted by name. Of a folder these are ``*.jsonl`` and ``*.json``, plain, ``.gz``
    or ``.zst``, and ``*.parquet``, in any case of letters, but no ``.json`` that is one object: it describes the
    others, as a manifest does. Folders below it are not searched, and refused where they hold lines or tables.

    Raises:
        ValueError: where a value names no file, an empty one, one of a kind that is not read or of a name that is no
            text, a folder of folders, or one with a link to nothing.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("no input file is given: name a file, a glob, a folder or a list of them")
    files = [file for value in given for file in _expand_one(value)]
    for file in files:
        if _undecodable(str(file)):
            said = ascii(str(file))
            raise ValueError(f"the name of {said} is not UTF-8, as of a file from an old archive: rename it")
        if file.is_file() and file.stat().st_size == 0:
            raise ValueError(
                f"{file} is empty (0 bytes): was its download or export cut off? Make it again or leave it out"
            )
        if file.suffix.lower() in TABLES:
            raise ValueError(
                f"{file} is a {file.suffix} file; what is read are JSON lines, .json arrays and .parquet: export it as "
                "one of these (pandas: read_csv(...).to_json(..., orient='records', lines=True))"
            )
    return files


def _expand_one(value: str | Path) -> list[Path]:
    path = Path(value).expanduser()
    if not str(value).strip():
        raise ValueError(f"{str(value)!r} is not a path: name a file, a glob, a folder or a list of them")
    if path.is_dir():
        named = sorted(entry for entry in path.iterdir() if entry.name.lower().endswith(SUFFIXES))
        for entry in named:
            if entry.is_symlink() and not entry.exists():
                raise ValueError(f"{entry} is a link to {os.readlink(entry)}, which is not there: mend or remove it")
        files = [entry for entry in named if entry.is_file()]
        found = [entry for entry in files if Source.of(entry).layout != "object"]
        for deeper in sorted(path.glob("[!.]*/**/*")):
            name = deeper.name.lower()
            if name.endswith(SUFFIXES) and not name.endswith(JSON) and deeper.is_file():
                raise ValueError(
                    f"{path} has more in folders below it, such as {deeper}, which its name does not take in: name "
                    f"'{path}/**/*.jsonl' for all of them, or a list of folders and files"
                )
        if files and not found:
            raise ValueError(
                f"{path}: every .json in this folder is a single object, and these are taken to describe others; put "
                "chats into one file, a line each, or name the files in a list"
            )
        if not found:
            raise ValueError(
                f"{path} is a folder without {', '.join('*' + suffix for suffix in SUFFIXES)}: name the file"
            )
        return found
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise ValueError(f"{value} does not exist (searched from {Path.cwd()}): check the path")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))
    if not found:
        raise ValueError(f"{value} matches no file (searched from {Path.cwd()}): check the pattern")
    return found


def _undecodable(name: str) -> bool:
    """Whether a file's name holds bytes that are no UTF-8, which Python keeps as lone surrogates."""
    return any("\udc80" <= letter <= "\udcff" for letter in name)


@dataclass(frozen=True)
class Source:
    """A file as it was when first seen."""

    path: Path
    size: int
    mtime_ns: int
    codec: str  # "plain", "gzip" or "zstd"
    layout: str  # "lines", "array", "object" or "parquet"; "misnamed" is an array whose name says lines

    @classmethod
    def of(cls, path: Path) -> "Source":
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(
                f"{path} is not a regular file, and it has to be read twice: save its content to a file first"
            )
        with path.open("rb") as file:
            head = file.read(4)
        if head == ARCHIVE:
            raise ValueError(
                f"{path} is an archive, as files of weights are, not JSON lines: name a file of chats or text, or "
                "unpack it"
            )
        codec = next((name for magic, name in MAGIC.items() if head.startswith(magic)), "plain")
        layout = "parquet" if head == PARQUET else "lines"
        source = cls(path=path, size=found.st_size, mtime_ns=found.st_mtime_ns, codec=codec, layout=layout)
        as_json = path.name.lower().endswith(JSON)
        if layout == "parquet" and not as_json:
            return source
        with path.open("rb", buffering=0) as raw, source._damage_named():
            content = source._decompressed(cast(BinaryIO, raw))
            if as_json:
                return replace(source, layout=kind_of(content))
            return replace(source, layout="misnamed") if is_one_array(content) else source

    @property
    def seekable(self) -> bool:
        """Whether a line lies in the file as it is read, so that it can be sought there."""
        return (self.codec, self.layout) == ("plain", "lines")

    @property
    def unit(self) -> str:
        """What is read as a line, for messages."""
        return UNITS.get(self.layout, "line")

    def check_unchanged(self) -> None:
        """Raises ValueError where the file is no longer the one that was first seen."""
        found = self.path.stat() if self.path.exists() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.changed()

    def changed(self) -> ValueError:
        """The error to raise where the file turns out to be another."""
        return ValueError(f"{self.path} changed while it was being read: wait until it is complete and start again")

    def lines(self, raw: BinaryIO) -> BinaryIO:
        """The lines of ``raw``, this file opened unbuffered, as a stream. One object is a ValueError: it holds none."""
        if self.layout == "object":
            raise ValueError(
                f"{self.path} is one JSON object, not an array of rows: take the list out of it (of `data`, say: "
                f"`jq -c '.data[]' {self.path.name} > rows.jsonl`), or name a file with one object a line .jsonl"
            )
        if self.layout == "misnamed":
            raise ValueError(
                f"{self.path} is one JSON array, and by its name it has one object a line: give it a name in .json, "
                "and its elements are the lines"
            )
        if self.layout == "parquet":
            return stream_of(parquet_blocks(self.path, raw), CHUNK)
        content = self._decompressed(raw)
        return stream_of(array_blocks(self.path, content, CHUNK), CHUNK) if self.layout == "array" else content

    def _decompressed(self, raw: BinaryIO) -> BinaryIO:
        if self.codec == "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
        return stream_of(zstd_blocks(self.path, raw), CHUNK) if self.codec == "zstd" else raw

    def read(self, stream: BinaryIO, size: int) -> bytes:
        """Up to ``size`` bytes of `lines`, none only at the end. Damaged data is a ValueError that names the file."""
        with self._damage_named():
            return stream.read(size)

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = f"{self.path} is damaged or cut off ({self.codec}: {error})"
            raise ValueError(f"{what}: download or compress it again") from error

    def pieces(self, buffer: bytearray, *, progress: Callable[[int], None] | None = None) -> Iterator[int]:
        """The lines, in pieces at the front of ``buffer``; yields their sizes. No code point or ``\\r\\n`` is split.

        Args:
            buffer: of `BUFFER` bytes; the caller must be done with a piece before it asks for the next.
            progress: called with the number of bytes read from disk.
        """
        view, held = memoryview(buffer), 0
        with self.path.open("rb", buffering=0) as raw:
            stream = self.lines(cast(BinaryIO, raw))
            while True:
                with self._damage_named():
                    read = stream.readinto(view[held : held + CHUNK])  # type: ignore[attr-defined]
                if not read:
                    break
                if raw.tell() > self.size:  # or a file that is being written to might never end
                    raise self.changed()
                size = held + read
                keep = size - _unfinished(buffer, size)
                if keep:
                    yield keep
                held = size - keep
                buffer[:held] = buffer[keep:size]
                if progress is not None:
                    progress(raw.tell())
        if held:
            yield held
        self.check_unchanged()


def _unfinished(buffer: bytearray, size: int) -> int:
    """How many of ``size`` bytes, at the end, belong to a code point or ``\\r\\n`` that the next may finish."""
    if buffer[size - 1] == 0x0D:
        return 1
    for back in range(1, min(3, size) + 1):
        byte = buffer[size - back]
        if byte >= 0xC0:
            return back if 2 + (byte >= 0xE0) + (byte >= 0xF0) > back else 0
        if byte < 0x80:
            return 0
    return 0


class Digests(threading.Thread):
    """SHA-256 of files as they lie on disk, computed beside other work on them.

    Reading and hashing leave the interpreter lock alone, so a second core does all of it. Reading the file once more
    costs a seventh of hashing it, and nothing waits for anything, as it would if one reader fed both.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__(daemon=True)
        self._sources, self._digests = sources, list[str]()
        self._error: Exception | None = None
        self._cancelled = False
        self.start()

    def run(self) -> None:
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        try:
            for source in self._sources:
                digest = hashlib.sha256()
                with source.path.open("rb", buffering=0) as file:
                    while not self._cancelled and file.tell() < source.size and (size := file.readinto(buffer)):
                        digest.update(view[:size])
                source.check_unchanged()
                self._digests.append(digest.hexdigest())
        except Exception as error:
            self._error = error

    def cancel(self) -> None:
        """Stop soon; there will be no result."""
        self._cancelled = True

    def result(self) -> list[str]:
        """Waits for the end. Raises ValueError where a file changed, OSError where it cannot be read."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._digests
