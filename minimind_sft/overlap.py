"""How much of the text that forgetting is measured on stands elsewhere: in the training chats, in the text to replay.

Forgetting measured on text that the chats repeat, or that is replayed almost word for word, would look like memory.
Text is compared by its 50-character shingles, without white space. Hashing is vectorised: 40 M characters (a 72 MB
sample, or 20,000 documents to replay) take some seconds, and the result is cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from minimind_sft.corpus import Store
from minimind_sft.files import write_whole
from minimind_sft.progress import track

WIDTH = 50
_FILTER_BITS = 24


def shingles(text: str) -> np.ndarray:
    """Hashes of all runs of `WIDTH` characters of a text without its white space, uint64; empty for a shorter text."""
    codes = np.frombuffer("".join(text.split()).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < WIDTH:
        return np.zeros(0, np.uint64)
    # hash(a + b) = hash(a) + B ** len(a) * hash(b), modulo 2 ** 64, in runs of doubling length
    runs = {1: codes * np.uint64(0xD6E8FEB86659FD93) ^ (codes << np.uint64(17))}
    length = 1
    while length * 2 <= WIDTH:
        half = runs[length]
        runs[length * 2] = half[:-length] + _power(length) * half[length:]
        length *= 2
    result, done = runs[length], length
    for size in sorted(runs, reverse=True):
        if done + size <= WIDTH:
            tail = runs[size][done:]
            result = result[: len(tail)] + _power(done) * tail[: len(result)]
            done += size
    result = result[: len(codes) - WIDTH + 1]
    return result ^ (result >> np.uint64(29))


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(0x9E3779B97F4A7C15, exponent, 1 << 64))


class _Shingles:
    """Where the shingles of some texts occur in others.

    Attributes:
        own: of each text its shingles, each once.
        distinct: (S,) the shingles of all of them, sorted.
        owner: (S,) the first text that holds each one.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.own = [np.unique(shingles(text)) for text in texts]
        everything = np.concatenate([np.zeros(0, np.uint64), *self.own])
        self.distinct, first = np.unique(everything, return_index=True)
        self.owner = np.repeat(np.arange(len(self.own)), [len(own) for own in self.own])[first]
        self._shift = np.uint64(64 - _FILTER_BITS)
        self._may_occur = np.zeros(1 << _FILTER_BITS, bool)  # a cheap first look: most shingles of others fail it
        self._may_occur[self.distinct >> self._shift] = True

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """Places in `distinct` of those of the hashes that stand there."""
        hashes = hashes[self._may_occur[hashes >> self._shift]]
        if not len(hashes):
            return np.zeros(0, np.int64)
        places = np.searchsorted(self.distinct, hashes).clip(max=len(self.distinct) - 1)
        return places[self.distinct[places] == hashes]


def shares(held_out: Iterable[str], chats: Iterable[str]) -> list[float]:
    """Share of each held-out document's shingles that occur in the chats, in [0, 1]; 0 for a document without one."""
    wanted = _Shingles(held_out)
    found = np.zeros(len(wanted.distinct), bool)
    for text in chats:
        found[wanted.places(shingles(text))] = True
    return [float(found[np.searchsorted(wanted.distinct, own)].mean()) if len(own) else 0.0 for own in wanted.own]


def likeness(pool: Iterable[str], measured: Iterable[str]) -> list[float]:
    """How much of each document of the pool is measured text, or of a measured document it holds, in [0, 1].

    That is the larger of the share of its shingles that occur in any measured document, and of one measured document's
    shingles that occur in it: a copy that something was added to is one as well.
    """
    wanted = _Shingles(measured)
    sizes = np.array([max(1, len(own)) for own in wanted.own])
    result = []
    for text in pool:
        hashes = shingles(text)
        places = wanted.places(hashes)
        held = np.bincount(wanted.owner[np.unique(places)], minlength=len(sizes)) / sizes
        result.append(max(len(places) / len(hashes), float(held.max())) if len(places) else 0.0)
    return result


def _cached(cache: Path, what: str, first: Store, second: Store, compute: Callable[[], list[float]]) -> list[float]:
    """Numbers about two stores, remembered in the cache folder under their names."""
    names = [WIDTH, second.folder.name, first.folder.name]
    path = cache / f"{what}-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:24]}.json"
    if not path.is_file():
        write_whole(path, json.dumps(compute()))
    return list(json.loads(path.read_text(encoding="utf-8")))


def _texts(
    store: Store, decode: Callable[[list[int]], str], progress: Callable[[int], None] = lambda done: None
) -> Iterator[str]:
    for number in range(len(store)):
        yield decode(store.document(number)[0].tolist())
        progress(number + 1)


def near_copies(
    cache: Path, pool: Store, measured: Store, decode: Callable[[list[int]], str], *, most: float
) -> np.ndarray:
    """(D,) bool: which documents of a pool of D are more than `most` like the measured ones; see `likeness`."""

    def compute() -> list[float]:
        with track("comparing the text to replay with the measured one", total=len(pool)) as progress:
            return likeness(_texts(pool, decode, progress), _texts(measured, decode))

    return np.array(_cached(cache, "likeness", pool, measured, compute)) > most


def refuse(cache: Path, held_out: Store, chats: Store, decode: Callable[[list[int]], str], *, most: float) -> None:
    """Refuse held-out documents that share more than a share of `most` of their shingles with the training chats.

    Raises:
        ValueError: with the worst of them.
    """
    found = _cached(
        cache, "overlap", held_out, chats, lambda: shares(_texts(held_out, decode), _texts(chats, decode))
    )
    over = [i for i, share in enumerate(found) if share > most]
    if over:
        worst = max(over, key=lambda i: found[i])
        raise ValueError(
            f"data.heldout_path: {len(over)} documents share over {most:.0%} of their {WIDTH}-character "
            f"shingles with the training chats; forgetting measured on them would be flattered. The worst: "
            f"{held_out.where(worst)} ({found[worst]:.0%}). Remove them, or raise data.max_overlap"
        )
