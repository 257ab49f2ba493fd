"""How much of a held-out document the training chats already contain.

Forgetting measured on text that the chats repeat would look like memory. Text is compared by its 50-character
shingles, without white space: the share of a document's shingles that occur anywhere in the chats. Hashing is
vectorised: 40 M characters (a 72 MB sample) take a few seconds, and the result is cached.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from minimind_sft.corpus import Store

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


def shares(held_out: Iterable[str], chats: Iterable[str]) -> list[float]:
    """Share of each held-out document's shingles that occur in the chats, in [0, 1]; 0 for a document without one."""
    per_document = [np.unique(shingles(text)) for text in held_out]
    wanted = np.unique(np.concatenate(per_document)) if per_document else np.zeros(0, np.uint64)
    shift = np.uint64(64 - _FILTER_BITS)
    may_occur = np.zeros(1 << _FILTER_BITS, bool)  # a cheap first look: most shingles of the chats fail it
    may_occur[wanted >> shift] = True
    found = np.zeros(len(wanted), bool)
    for text in chats:
        hashes = shingles(text)
        hashes = hashes[may_occur[hashes >> shift]]
        if len(hashes):
            place = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            found[place[wanted[place] == hashes]] = True
    return [float(found[np.searchsorted(wanted, own)].mean()) if len(own) else 0.0 for own in per_document]


def cached_shares(
    cache: Path,
    names: list[str],
    held_out: Callable[[], Iterable[str]],
    chats: Callable[[], Iterable[str]],
) -> list[float]:
    """`shares`, remembered in the cache folder under the names of the two stores."""
    path = cache / f"overlap-{hashlib.sha256(json.dumps([WIDTH, names]).encode()).hexdigest()[:24]}.json"
    if not path.is_file():
        result = shares(held_out(), chats())
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        os.replace(temporary, path)
    return list(json.loads(path.read_text(encoding="utf-8")))


def refuse(cache: Path, held_out: Store, chats: Store, decode: Callable[[list[int]], str], *, most: float) -> None:
    """Refuse held-out documents that share more than a share of `most` of their shingles with the training chats.

    Raises:
        ValueError: with the worst of them.
    """
    found = cached_shares(
        cache,
        [chats.folder.name, held_out.folder.name],
        held_out=lambda: (decode(held_out.document(i)[0].tolist()) for i in range(len(held_out))),
        chats=lambda: (decode(chats.document(i)[0].tolist()) for i in range(len(chats))),
    )
    over = [i for i, share in enumerate(found) if share > most]
    if over:
        worst = max(over, key=lambda i: found[i])
        raise ValueError(
            f"data.heldout_path: {len(over)} documents share over {most:.0%} of their {WIDTH}-character "
            f"shingles with the training chats; forgetting measured on them would be flattered. The worst: "
            f"{held_out.where(worst)} ({found[worst]:.0%}). Remove them, or raise data.max_overlap"
        )
