"""Lines -> tokenized documents, in a memory-mapped store that is cached on disk.

A store is a folder of flat arrays: the token ids of all documents end to end, the spans they are made of, and where
each document came from. Reading it costs no parsing and next to no memory, whatever its size; the second run with the
same data starts from it. Documents are stored whole: cutting to `max_length`, leaving out an empty think block and
putting a system prompt in front are views (`documents.py`), so that none needs a new tokenization.

The name of a store in the cache is a hash of everything that its content depends on: the bytes of the input files,
what was selected from them, the tokenizer with its template, the format options and `FORMAT_VERSION`. A stale store
is thus never found. It is built under a temporary name and then moved, so a killed build leaves nothing that could be
mistaken for a store.

Every line ends as a document or as a rejection with a reason: `len(store) + sum(store.rejected.values())` is the
number of lines that were taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind_sft.chat import ChatTemplate, Span
from minimind_sft.files import unwritable_cache
from minimind_sft.packing import ENDS_TURN, Packed, id_type, pack
from minimind_sft.sampling import Line
from minimind_sft.tokenization import Document
from minimind_sft.workers import Tokenization, packed_lines

FORMAT_VERSION = 3
_ARRAYS = {
    "offsets": "q",  # (D + 1,) where each document begins in ids
    "span_offsets": "q",  # (D + 1,) where each document's spans begin
    "span_lengths": "i",  # (S,) tokens
    "span_flags": "B",  # (S,) bits, see `packing.py`
    "line_files": "I",  # (D,) index into meta["files"]
    "line_numbers": "q",  # (D,) from 1
    "sources": "I",  # (D,) index into meta["sources"]
    "takes_system": "B",  # (D,) 1 where it is a chat with neither a system message nor tools
    "hashes": "Q",  # (D,) of the tokens: equal for conversations that are rendered alike
}


class Store:
    """Tokenized documents in a folder, read through a memory map.

    Attributes:
        ids: (T,) token ids of all documents, uint16 or uint32.
        offsets, span_offsets, span_lengths, span_flags, line_files, line_numbers, sources, takes_system, hashes: see
            `_ARRAYS`.
        rejected: lines that became no document, counted by reason.
        dropped: how many chats lost what to the template, by role and field.
        meta: what the builder noted (`files`, `sources`, and its own `note`).
    """

    offsets: np.ndarray
    span_offsets: np.ndarray
    span_lengths: np.ndarray
    span_flags: np.ndarray
    line_files: np.ndarray
    line_numbers: np.ndarray
    sources: np.ndarray
    takes_system: np.ndarray
    hashes: np.ndarray

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.rejected: dict[str, int] = self.meta["rejected"]
        self.dropped: dict[str, int] = self.meta["dropped"]
        for name in _ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        # an empty file cannot be mapped
        path, dtype = folder / "ids.bin", np.dtype(self.meta["dtype"])
        self.ids: np.ndarray = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.line_numbers)

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) and the flags of each token's span (L,)."""
        start, end = self.offsets[number], self.offsets[number + 1]
        first, last = self.span_offsets[number], self.span_offsets[number + 1]
        return self.ids[start:end], np.repeat(self.span_flags[first:last], self.span_lengths[first:last])

    def spans_of(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the spans of these documents (S,), in order, and which place in `index` owns each one (S,)."""
        first = np.asarray(self.span_offsets)[index]
        count = np.asarray(self.span_offsets)[index + 1] - first
        owner = np.repeat(np.arange(len(index)), count)
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        return first[owner] + within, owner

    @property
    def chats(self) -> int:
        """How many documents have a turn that ends; text has none."""
        ends = np.flatnonzero(np.asarray(self.span_flags) & ENDS_TURN)
        return len(np.unique(np.searchsorted(np.asarray(self.span_offsets), ends, side="right")))

    def where(self, number: int) -> str:
        """`file:line` of a document, for messages."""
        return f"{self.meta['files'][self.line_files[number]]}:{self.line_numbers[number]}"

    def rejections(self) -> Iterator[dict[str, Any]]:
        """Every rejected line: `file`, `line`, `reason`, `detail`."""
        with open(self.folder / "rejected.jsonl", encoding="utf-8") as file:
            for row in file:
                yield json.loads(row)


class _Writer:
    """Collects documents in a folder; see `build`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder, self.dtype = folder, id_type(vocab_size)
        self.arrays = {name: array(code) for name, code in _ARRAYS.items()}
        self.arrays["offsets"].append(0)
        self.arrays["span_offsets"].append(0)
        self.files: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.rejected: Counter[str] = Counter()
        self.ids = open(folder / "ids.bin", "wb")  # noqa: SIM115 (closed by finish)
        self.refusals = open(folder / "rejected.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def add(self, lines: list[Line], packed: Packed) -> None:
        """Append what came of some lines."""
        arrays = self.arrays
        for name, lengths in (("offsets", packed.tokens), ("span_offsets", packed.spans)):
            arrays[name].frombytes((arrays[name][-1] + np.cumsum(lengths, dtype=np.int64)).tobytes())
        for name in ("span_lengths", "span_flags", "takes_system", "hashes"):
            arrays[name].frombytes(getattr(packed, name).tobytes())
        taken = [lines[place] for place in packed.places.tolist()]
        arrays["line_files"].extend([self.files.setdefault(line.file, len(self.files)) for line in taken])
        arrays["line_numbers"].extend([line.number for line in taken])
        arrays["sources"].extend([self.sources.setdefault(source, len(self.sources)) for source in packed.sources])
        self.ids.write(packed.ids.tobytes())
        for place, reason, detail in packed.rejected:
            self.rejected[reason] += 1
            row = {"file": lines[place].file, "line": lines[place].number, "reason": reason, "detail": detail}
            self.refusals.write(json.dumps(row, ensure_ascii=True) + "\n")

    def finish(self, note: dict[str, Any], dropped: dict[str, int]) -> None:
        self.ids.close()
        self.refusals.close()
        for name, values in self.arrays.items():
            np.save(
                self.folder / f"{name}.npy",
                np.frombuffer(values, values.typecode) if values else np.zeros(0, values.typecode),
            )
        meta = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "files": list(self.files),
            "sources": list(self.sources),
            "rejected": dict(self.rejected.most_common()),
            "dropped": dropped,
            "note": note,
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")




class Taken(NamedTuple):
    """What `build` took of the lines that it was given."""

    lines: int
    tokens: int  # of the documents, each counted up to `max_length`
    stopped: bool  # whether `max_tokens` ended it


def build(
    folder: Path,
    lines: Iterable[Line],
    *,
    template: ChatTemplate,
    format: str = "auto",
    document_format: str = "minimind3",
    supervise: str = "all",
    reasoning: bool = True,
    max_tokens: int | None = None,
    max_length: int | None = None,
    workers: int | None = None,
    note: Callable[[Taken], dict[str, Any]] = lambda taken: {},
    progress: Callable[[int], None] = lambda lines: None,
) -> None:
    """Tokenize lines into a new store.

    Args:
        folder: an existing empty folder.
        lines: what to tokenize, in the order in which the documents shall lie.
        template: tokenizer and chat template.
        format: of the lines, see `formats.parse`.
        document_format: how a raw text is framed, see `ChatTemplate.document`.
        supervise: `all` assistant turns, or the `last`.
        reasoning: supervise their think blocks, too.
        max_tokens: stop for good at the first document that would make more tokens than this; None for no cap.
        max_length: count no more tokens than this of a document.
        workers: processes that tokenize, see `packed_lines`.
        note: called at the end; what it returns is kept in `meta["note"]`.
        progress: called with the number of lines done so far.
    """
    how = Tokenization(template, format, document_format, supervise, reasoning)
    writer, known = _Writer(folder, template.vocab_size), template.dropped.copy()
    taken = tokens = 0
    stopped = False
    for chunk, packed in packed_lines(lines, how, workers=workers):
        lengths = packed.tokens if max_length is None else np.minimum(packed.tokens, max_length)
        totals = tokens + np.cumsum(lengths, dtype=np.int64)
        fit = len(totals) if max_tokens is None else int(np.searchsorted(totals, max_tokens, side="right"))
        if stopped := fit < len(totals):
            place = int(packed.places[fit])
            chunk, packed = chunk[:place], packed.before(place)
        writer.add(chunk, packed)
        taken, tokens = taken + len(chunk), int(totals[fit - 1]) if fit else tokens
        progress(taken)
        if stopped:
            break
    writer.finish(note(Taken(taken, tokens, stopped)), dict((template.dropped - known).most_common()))


def build_from_spans(
    folder: Path,
    documents: Iterable[list[Span]],
    vocab_size: int,
    *,
    source: str,
    apart_from: Store | None = None,
) -> None:
    """Make a store of documents that come from no file and, by their hash, do not stand in `apart_from`; `source`
    stands where a file's name would."""
    writer = _Writer(folder, vocab_size)
    known = set() if apart_from is None else set(apart_from.hashes.tolist())
    for number, spans in enumerate(documents, 1):
        packed = pack([Document(spans, source)], writer.dtype)
        if int(packed.hashes[0]) not in known:
            writer.add([Line(source, number, "")], packed)
    writer.finish({}, {})


def open_or_build(cache: Path, key: dict[str, Any], make: Callable[[Path], None]) -> Store:
    """The store that `key` describes: from the cache, or made now.

    Two processes or threads that make the same store do not disturb each other: each builds under a name of its own,
    and the second one to finish discards its copy.

    Args:
        cache: folder of all stores.
        key: everything that the content depends on, as JSON.
        make: fills an empty folder.

    Raises:
        ValueError: the cache folder cannot be written.
    """
    name = hashlib.sha256(json.dumps([FORMAT_VERSION, key], sort_keys=True).encode()).hexdigest()[:24]
    folder = cache / name
    if not (folder / "meta.json").is_file():
        temporary = cache / f"{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise unwritable_cache(cache, error) from error
        try:
            make(temporary)
            try:
                os.replace(temporary, folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Store(folder)
