"""Lines to a selection: which lines a cap and a seed choose, and those lines in that order. No torch.

One pass makes the table of lines (`lines.scan_lines`) while a second thread hashes the files for the manifest.
Permutation and walk need only the table. The chosen lines are then fetched whenever they are asked for: by seeking in
a plain file of lines, by a second pass through any other (compressed, an array, Parquet), of which the chosen lines (no
others) are kept in one buffer.

Memory: 16 bytes a line (start 8, length 4, order 4). For such input the sample, and while it is fetched 4 more a
line and 16 a chosen one. A line costs 2 us to fetch from the page cache: 0.2 s for 72 MB (92,000 lines).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from minimind_sft.lines import Line, LineTable, Progress, scan_lines
from minimind_sft.mixture import Part, figures, mixed_order
from minimind_sft.readers import Readers
from minimind_sft.shuffle import shuffled_indices
from minimind_sft.sources import CHUNK, MEBIBYTE, Digests, Source

BLOCK = 4096  # lines handled at a time


class _Walk(NamedTuple):
    picked: NDArray[np.uint32]  # line indices, in the sampled order
    bytes: int  # of the stripped lines, without newlines
    stopped_by: str  # "max_mb", "max_rows" or "end"
    refused: int  # bytes of the line that the walk stopped at; 0 at the end


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen lines, to be iterated over any number of times, and the figures about them.

    Attributes:
        sources: the input files, in order.
        max_mb: the cap in MB of 1024 * 1024 bytes; None for none.
        max_rows: the cap in lines; None for none.
        seed: of the permutation.
        lines_seen: lines of all inputs, blank ones too.
        blank: how many of them hold nothing but white space.
        selected: lines chosen.
        bytes: what counts against the cap: UTF-8 bytes of the stripped lines, without newlines.
        stopped_by: the cap that ended the walk, "max_mb" or "max_rows"; "end" where all but blank lines are taken.
        parts: the sources of a mixture; none where the files are not.
    """

    sources: list[Source]
    max_mb: float | None
    max_rows: int | None
    seed: int
    lines_seen: int
    blank: int
    selected: int
    bytes: int
    stopped_by: str
    parts: list[Part]
    _refused: int
    _picked: NDArray[np.uint32]
    _table: LineTable
    _digests: Digests

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of every input; waits for the hashing, which began with the scan."""
        return [
            {"name": str(source.path), "size": source.size, "sha256": digest}
            for source, digest in zip(self.sources, self._digests.result(), strict=True)
        ]

    def manifest(self, rows: int | None = None) -> dict[str, Any]:
        """Everything that determines the selection, and its figures, ready for JSON; of the first `rows`, if given."""
        names = ("max_mb", "max_rows", "seed", "lines_seen", "blank", "selected", "bytes", "stopped_by")
        made = {"inputs": self.inputs, **{name: getattr(self, name) for name in names}}
        if rows is not None:  # a cap in lines is the unit that a selection knows
            size = int(self._table.lengths[self._picked[:rows]].sum(dtype=np.int64))
            made |= {"max_rows": rows, "selected": rows, "bytes": size, "stopped_by": "max_rows"}
        if self.parts:
            firsts = _first_lines(self.parts, self._table.first_line)
            made["sources"] = figures(self.parts, firsts, self._picked[:rows], self._table.lengths)
        return made

    @property
    def why_empty(self) -> str | None:
        """Why nothing was selected and what to do about it; None where something was."""
        if self.selected:
            return None
        none = "nothing is selected from " + ", ".join(str(source.path) for source in self.sources)
        if self.stopped_by == "end":
            return f"{none}: all {self.lines_seen:,} lines are blank. Give a file with one JSON object a line"
        if self.stopped_by == "max_rows":
            return f"{none}: max_rows is {self.max_rows}. Set it to 1 or more, or to null for no cap"
        # Never rounded down, or the remedy would not work.
        enough = math.ceil(self._refused / MEBIBYTE * 1e6) / 1e6
        return (
            f"{none}: with seed {self.seed} the first line has {self._refused:,} bytes; max_mb {self.max_mb} allows "
            f"{int((self.max_mb or 0) * MEBIBYTE):,}. Raise max_mb to {enough:.6f} or more, or to null for no cap"
        )

    def require_some(self) -> None:
        """Raises ValueError, with cause and remedy, where nothing was selected."""
        if self.why_empty is not None:
            raise ValueError(self.why_empty)

    def __len__(self) -> int:
        return self.selected

    def __iter__(self) -> Iterator[Line]:
        return self.lines()

    def lines(self) -> Iterator[Line]:
        """The selected lines, in the sampled order.

        Raises:
            ValueError: where an input is no longer what was scanned.
        """
        names, first_line = [str(source.path) for source in self.sources], self._table.first_line
        for block in self.blocks():
            for file, line, raw in zip(block.files, block.lines, block.raw, strict=True):
                yield Line(names[file], line - first_line[file] + 1, raw.decode("utf-8"))

    def blocks(self) -> Iterator["Block"]:
        """As `lines`, up to 4096 at once, and undecoded."""
        for source in self.sources:
            source.check_unchanged()
        with Readers(self.sources, self._fetch_streamed) as readers:
            for begin in range(0, self.selected, BLOCK):
                lines = self._picked[begin : begin + BLOCK]
                files, starts, spans, lengths = (column.tolist() for column in self._columns(lines))
                raw = [readers[file](span, at).strip() for file, span, at in zip(files, spans, starts, strict=True)]
                if list(map(len, raw)) != lengths:  # Unicode white space; ASCII's alone is the common case
                    raw = [self._strip(*line) for line in zip(files, raw, lengths, strict=True)]
                yield Block(files, lines.tolist(), raw)
        for source in self.sources:
            source.check_unchanged()

    def _columns(self, lines: NDArray[np.uint32]) -> tuple[NDArray[Any], ...]:
        """Of each line: its file, its start there, its bytes with the line break and its stripped bytes, (B,) each."""
        table = self._table
        starts, files = table.starts[lines], np.searchsorted(table.first_line, lines, side="right") - 1
        spans = table.starts[lines + np.uint32(1)] - starts
        return files, starts - np.array(table.first_byte)[files], spans, table.lengths[lines]

    def _strip(self, file: int, raw: "_Bytes", length: int) -> "_Bytes":
        """``raw`` without white space, which must leave the ``length`` bytes that the scan found."""
        if len(raw) != length:
            raw = raw.decode("utf-8", errors="replace").strip().encode()
        if len(raw) != length:
            raise self.sources[file].changed()
        return raw

    def _fetch_streamed(self, file: int) -> bytearray:
        """The selected lines of a file that cannot be sought in, with their breaks, end to end in the sampled order."""
        table, source = self._table, self.sources[file]
        first, end = table.first_line[file : file + 2]
        chosen = self._picked
        if len(self.sources) > 1:
            chosen = chosen[(chosen >= first) & (chosen < end)]
        ends = table.starts[chosen + np.uint32(1)]  # (C,)
        ends -= table.starts[chosen]
        np.cumsum(ends, out=ends)  # where each ends in the buffer
        rank = np.full(end - first, chosen.size, dtype=np.uint32)  # (lines of the file,): which is chosen when; C: not
        rank[chosen - np.uint32(first)] = np.arange(chosen.size, dtype=np.uint32)
        kept, position = bytearray(int(ends[-1])), 0
        with source.path.open("rb", buffering=0) as raw:
            stream = source.lines(cast(BinaryIO, raw))
            for begin in range(0, rank.size, BLOCK):
                ranks = rank[begin : begin + BLOCK]
                wanted = np.flatnonzero(ranks < chosen.size)
                _, starts, spans, _ = self._columns((wanted + (first + begin)).astype(np.uint32))
                places = (starts.tolist(), spans.tolist(), ends[ranks[wanted]].tolist())
                for start, span, stop in zip(*places, strict=True):
                    while position < start and (skipped := source.read(stream, min(start - position, CHUNK))):
                        position += len(skipped)
                    data = source.read(stream, span)
                    if len(data) != span:
                        raise source.changed()
                    kept[stop - span : stop] = data
                    position = start + span
        source.check_unchanged()
        return kept


class Block(NamedTuple):
    """Some selected lines: for each the index of its file, its index among all lines, and its stripped UTF-8 bytes."""

    files: list[int]
    lines: list[int]
    raw: list[bytes]


_Bytes = bytes  # the name of a field of Selection


def select(
    files: Sequence[Path],
    *,
    max_mb: float | None,
    seed: int,
    max_rows: int | None = None,
    parts: Sequence[Part] = (),
    progress: Progress | None = None,
) -> Selection:
    """Choose lines of ``files``, which count as one file in the order given.

    Args:
        files: what `sources.expand` returns.
        max_mb: MB (1024 * 1024 bytes) of stripped lines without newlines; None for all lines, shuffled.
        seed: of Python's ``random``.
        max_rows: at most this many lines; with ``max_mb`` the tighter of the two ends the walk.
        parts: the sources that the files belong to, of a mixture; see `mixture.py`.
        progress: called with (bytes read, bytes in all) during the scan.

    Raises:
        ValueError: for a cap below 0 or too small for its source, invalid UTF-8 (file and line), damaged compressed
            data or a file that changes.
    """
    if max_mb is not None and not 0 <= max_mb < math.inf:
        raise ValueError(f"max_mb is {max_mb}: give a number of MB, 0 or more, or null for no cap")
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"max_rows is {max_rows}: give a number of lines, 0 or more, or null for no cap")
    sources = [Source.of(Path(file)) for file in files]
    digests = Digests(sources)
    try:
        table = scan_lines(sources, progress=progress)
        cap = None if max_mb is None else min(int(max_mb * MEBIBYTE), 1 << 62)
        order = (
            mixed_order(table.lengths, parts, _first_lines(parts, table.first_line), seed)
            if parts
            else shuffled_indices(table.lengths.size, seed)
        )
        walk = _walk(table.lengths, order, cap=cap, rows=max_rows)
    except BaseException:
        digests.cancel()
        raise
    return Selection(
        sources=sources,
        max_mb=max_mb,
        max_rows=max_rows,
        seed=seed,
        lines_seen=table.lengths.size,
        blank=table.lengths.size - int(np.count_nonzero(table.lengths)),
        selected=walk.picked.size,
        bytes=walk.bytes,
        stopped_by=walk.stopped_by,
        parts=list(parts),
        _refused=walk.refused,
        _picked=walk.picked,
        _table=table,
        _digests=digests,
    )


def _first_lines(parts: Sequence[Part], first_line: Sequence[int]) -> list[int]:
    """(P + 1,) the first line of each source's first file, then the number of lines."""
    return [first_line[at] for at in accumulate((part.files for part in parts), initial=0)]


def _walk(lengths: NDArray[np.uint32], order: NDArray[np.uint32], *, cap: int | None, rows: int | None) -> _Walk:
    """Take lines in an order, which is overwritten, without blank ones, until one would pass a cap (in whole bytes)."""
    taken = total = refused = 0
    stopped_by = "end"
    for begin in range(0, order.size, BLOCK):
        block = order[begin : begin + BLOCK]
        block = block[lengths[block] > 0]  # a copy, so what is taken can move to the front of `order`
        totals = total + np.cumsum(lengths[block], dtype=np.int64)
        fit = block.size if cap is None else int(np.searchsorted(totals, cap, side="right"))
        room = block.size if rows is None else rows - taken
        count = min(fit, room)
        order[taken : taken + count] = block[:count]
        taken, total = taken + count, int(totals[count - 1]) if count else total
        if count < block.size:
            stopped_by, refused = "max_mb" if fit < room else "max_rows", int(lengths[block[count]])
            break
    picked = order[:taken]
    return _Walk(picked.copy() if 2 * taken < order.size else picked, total, stopped_by, refused)
