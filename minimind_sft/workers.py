"""Lines to packed documents on several cores: in order, in bounded memory, and in this process where there are few.

A worker is a process of its own (Python's lock leaves no other way) that was started afresh, not forked: this process
may hold threads and a GPU. It gets texts and gives back arrays (`packing.py`), so that what is left to do here, reading
lines and writing arrays, is a tenth of the work: 6 us a chat of 67. Starting a worker takes 0.3 s, hence the first
second of the work is done here: where there is no more, as in the demo, none is started.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import NamedTuple

from minimind_sft.chat import ChatTemplate
from minimind_sft.packing import Packed, id_type, pack
from minimind_sft.sampling import Line
from minimind_sft.tokenization import tokenize

TOGETHER = 512  # lines that a worker gets at a time, and the tokenizer in one call
CHARACTERS = 4_000_000  # of these lines, about: what is pending then takes some 100 MB a worker
ALONE = 1.0  # seconds of work before workers are started
MOST = 16  # workers by default: each takes 100 MB


class Tokenization(NamedTuple):
    """Template and options by which lines become documents; see `corpus.build`."""

    template: ChatTemplate
    format: str = "auto"
    document_format: str = "minimind3"
    supervise: str = "all"
    reasoning: bool = True

    def packed(self, texts: list[str]) -> Packed:
        """What the lines become."""
        return pack(tokenize(texts, **self._asdict()), id_type(self.template.vocab_size))


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packed_lines(
    lines: Iterable[Line], how: Tokenization, *, workers: int | None = None
) -> Iterator[tuple[list[Line], Packed]]:
    """All lines in their order, some at a time, with what they become.

    Args:
        lines: what to tokenize.
        how: template and options.
        workers: processes; None for one per core, `MOST` at most.

    Raises:
        ValueError: a worker died.
    """
    count = min(available_cores(), MOST) if workers is None else workers
    chunks = _chunks(lines)
    begin = time.perf_counter()
    for chunk in chunks:
        if count > 1 and time.perf_counter() - begin > ALONE:
            yield from _by_workers(itertools.chain([chunk], chunks), how, count)
        else:
            yield chunk, how.packed([line.text for line in chunk])


def _chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """`TOGETHER` lines at a time, and fewer where they are long."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line.text)
        if len(chunk) == TOGETHER or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _by_workers(
    chunks: Iterable[list[Line]], how: Tokenization, workers: int
) -> Iterator[tuple[list[Line], Packed]]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (how,))
    pending: deque[tuple[list[Line], Future[tuple[Packed, Counter[str]]]]] = deque()

    def done() -> tuple[list[Line], Packed]:
        chunk, future = pending.popleft()
        packed, dropped = future.result()
        how.template.dropped.update(dropped)
        return chunk, packed

    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(_work, [line.text for line in chunk])))
            if len(pending) > 2 * workers:  # or all lines would be in memory, if writing is slower than reading
                yield done()
        while pending:
            yield done()
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {workers} processes that tokenize died, for want of memory perhaps: set data.workers to fewer, 1 "
            'for none; in a script of your own, begin with `if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---- in a worker


def _begin(how: Tokenization) -> None:
    global _how
    _how = how
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(texts: list[str]) -> tuple[Packed, Counter[str]]:
    packed = _how.packed(texts)
    dropped = _how.template.dropped.copy()
    _how.template.dropped.clear()
    return packed, dropped


_how: Tokenization
