"""Where things lie: paths as a user writes them, the cache folder, and what is known of an input file.

A path in a YAML means the current folder first and then the project's, so that `configs/sft.yaml` runs from anywhere.
Hashing gigabytes at every start would cost a second each, so the hash of a file is remembered with its size, inode
and times of change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimind_sft.sources import BUFFER, CHUNK, Source, expand

PROJECT = Path(__file__).resolve().parents[1]


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/minimind_sft`, or `~/.cache/minimind_sft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimind_sft"


def resolve(path: str | Path) -> Path:
    """A path against the current folder, then against the project; unchanged where neither has it."""
    path = Path(path).expanduser()
    if path.is_absolute() or _there(path) or not _there(PROJECT / path):
        return path
    return PROJECT / path


def in_full(given: Any) -> Any:
    """What a setting names, for a record that may be read from another folder: a path, a list, a source of a mixture.

    Where the project has something of the same name, a path is written from the root on, so that the one is not taken
    for the other; all others stay as they are, and a folder of work can be moved.
    """
    if isinstance(given, list):
        return [in_full(entry) for entry in given]
    if isinstance(given, dict):
        return given | {"path": in_full(given["path"])}
    if not isinstance(given, str) or Path.cwd() == PROJECT or not _there(PROJECT / given):
        return given
    return str(resolve(given).absolute())


def _there(pattern: Path) -> bool:
    if pattern.exists():
        return True
    root = Path(pattern.anchor) if pattern.is_absolute() else Path()
    relative = pattern.relative_to(root) if pattern.is_absolute() else pattern
    return any(sign in str(pattern) for sign in "*?[") and next(root.glob(str(relative)), None) is not None


def write_whole(path: Path, text: str | Iterable[str], *, called: str | None = None) -> None:
    """Write a file of text whole or not at all.

    Args:
        path: where to; what is there is replaced.
        text: all of it, or its pieces as they come.
        called: what the user knows the file by, for messages; None for its path.

    Raises:
        ValueError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines([text] if isinstance(text, str) else text)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{called or path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


class Facts(NamedTuple):
    """What a file holds."""

    sha256: str  # of the bytes on disk
    text_bytes: int  # of its lines, uncompressed; an array's or table's as they are read


def unwritable_cache(cache: Path, error: OSError) -> ValueError:
    """What to raise where the cache folder cannot be written."""
    return ValueError(f"cannot write the cache folder {cache} ({error.strerror}); set data.cache_dir to another")


class Files:
    """Input files by name, with their facts remembered in the cache folder."""

    def __init__(self, cache: Path) -> None:
        self.memory = cache / "files.json"

    def expand(self, paths: str | Path | Sequence[str], key: str) -> list[Path]:
        """The files that a setting names, in order.

        Raises:
            ValueError: naming the setting `key`, where nothing is there.
        """
        wanted = [paths] if isinstance(paths, (str, Path)) else list(paths)
        try:
            return expand([str(resolve(path)) for path in wanted])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def facts(self, paths: Sequence[Path]) -> list[Facts]:
        """SHA-256 and size of the text of each; read again only where a file has changed.

        Raises:
            ValueError: a file that cannot be read to its end, or a cache folder that cannot be written.
        """
        identities = [_identity(path) for path in paths]
        known, found = self._load(), {}
        try:
            for path, identity in zip(paths, identities, strict=True):
                if identity not in known:
                    known[identity] = found[identity] = list(_read_facts(path))
        finally:
            if found:
                self._keep(found)
        return [Facts(*known[identity]) for identity in identities]

    def _keep(self, found: dict[str, Any]) -> None:
        # two processes may write at the same time: the later one wins, and the other reads its files again
        cache, temporary = self.memory.parent, self.memory.with_suffix(f".{os.getpid()}.tmp")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._load() | found), encoding="utf-8")
            os.replace(temporary, self.memory)
        except OSError as error:
            raise unwritable_cache(cache, error) from error

    def _load(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.memory.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"


def _read_facts(path: Path) -> Facts:
    source, sha256 = Source.of(path), sha256_file(path)
    size = source.size if source.seekable else sum(source.pieces(bytearray(BUFFER)))
    return Facts(sha256, size)


def sha256_files(paths: Iterable[str | Path]) -> str:
    """Hex SHA-256 of a file, or of several end to end, read in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
    return digest.hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    return sha256_files([path])


def sync(path: Path) -> None:
    """Force a file that was written to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename outlive a power cut; not every file system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
