"""Several sources of chats in one sample: a cap for each, and weights that divide the caps over all. No torch.

    train_path:
      - path: chats/*.jsonl    # as elsewhere: a file, list, glob or folder
        max_mb: 8              # no more than this of it
        weight: 2              # twice as many bytes of the sample as of a source of weight 1
      - path: tools.json
        weight: 1

Each source is shuffled by itself with the one seed, and ends for good at the first line that would pass its cap: what
it gives is what `sample` draws from it alone, whatever stands beside it. Then all of them are put into one order, which
the caps over all cut off at some place (`caps.py`), so that a smaller cap's sample is part of a larger one's:

- without weights, the order is the shuffle of all lines that a plain list of files has, less what the sources' caps
  leave out; where they leave nothing out, the sample is that of the plain list, to the byte;
- with weights, a line that ends at byte b of its source's shuffle stands at b / weight. So every beginning of the order
  holds the sources in proportion to their weights, to a line, and one that has run out leaves its share to the others.

While the order is made, weights take some 40 bytes a line, caps alone 12.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimind_sft.shuffle import shuffled_indices
from minimind_sft.sources import MEBIBYTE

KEYS = ("path", "max_mb", "weight")

TrainPath = str | Path | Sequence[str | dict[str, Any]]


class Part(NamedTuple):
    """A source of a mixture: some of the input files, one after another."""

    name: str  # its path, as given
    files: int
    max_mb: float | None = None
    weight: float | None = None


def parts_of(given: TrainPath, expand: Callable[[Any], list[Path]], key: str) -> tuple[list[Path], list[Part]]:
    """The files that a setting names, in order, and the sources they belong to: none, where it is no mixture.

    Args:
        given: a path, or a list of paths and mappings with `KEYS`.
        expand: a path, or a list of them, to files.
        key: the setting, for messages.

    Raises:
        ValueError: naming the key, the source and the value.
    """
    if isinstance(given, (str, Path)) or not any(isinstance(entry, dict) for entry in given):
        return expand(given), []
    found = [_checked(entry if isinstance(entry, dict) else {"path": entry}, key) for entry in given]
    files = [expand(entry["path"]) for entry in found]
    parts = [
        Part(_name(entry["path"]), len(those), entry.get("max_mb"), entry.get("weight"))
        for entry, those in zip(found, files, strict=True)
    ]
    if len({part.weight is None for part in parts}) > 1:
        bare = next(part.name for part in parts if part.weight is None)
        raise ValueError(f"{key}: {bare} has no weight, and others have one; give it one too (1, say), or none to any")
    capped = any(part.max_mb is not None or part.weight is not None for part in parts)
    return [file for those in files for file in those], parts if capped else []


def _checked(entry: dict[str, Any], key: str) -> dict[str, Any]:
    for name in entry:
        if name not in KEYS:
            near = difflib.get_close_matches(str(name), KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"a source has {', '.join(KEYS)}"
            raise ValueError(f"{key}: {name!r} is no key of a source; {hint}")
    path = entry.get("path")
    if not path or not isinstance(path, (str, list)):
        raise ValueError(f"{key}: path is {path!r} in {entry}; give a file, list, glob or folder")
    for name in KEYS[1:]:
        value = entry.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"{key}: {name} of {_name(path)} is {value!r}; give a number above 0, or leave it out")
    return entry


def _name(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(map(str, path))


def mixed_order(
    lengths: NDArray[np.uint32], parts: Sequence[Part], first_lines: Sequence[int], seed: int
) -> NDArray[np.uint32]:
    """The lines of a mixture, in the order that caps over all cut off.

    Args:
        lengths: (N,) stripped bytes of each line.
        parts: its P sources.
        first_lines: (P + 1,) the first line of each, then N.
        seed: of the shuffles.

    Raises:
        ValueError: nothing of a source fits within its cap.
    """
    given = [
        _within(part, lengths[first:end], seed)
        for part, (first, end) in zip(parts, pairwise(first_lines), strict=True)
    ]
    given = [own + np.uint32(first) for own, first in zip(given, first_lines, strict=False)]
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        allowed = np.zeros(lengths.size, dtype=bool)
        for own in given:
            allowed[own] = True
        order = shuffled_indices(lengths.size, seed)
        return order[allowed[order]]
    places = [np.cumsum(lengths[own], dtype=np.int64) / weight for own, weight in zip(given, weights, strict=True)]
    return np.concatenate(given)[np.argsort(np.concatenate(places), kind="stable")]


def _within(part: Part, lengths: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Those of a source's own lines, shuffled, that its cap allows."""
    order = shuffled_indices(lengths.size, seed)
    if part.max_mb is None:
        return order
    totals, cap = np.cumsum(lengths[order], dtype=np.int64), int(part.max_mb * MEBIBYTE)
    count = int(np.searchsorted(totals, cap, side="right"))
    if count < order.size and (count == 0 or not totals[count - 1]):
        raise ValueError(
            f"nothing of {part.name} is selected: its first line has {totals[count]:,} bytes, and its max_mb, "
            f"{part.max_mb:g}, allows {cap:,}; raise it"
        )
    return order[:count]


def figures(
    parts: Sequence[Part], first_lines: Sequence[int], picked: NDArray[np.uint32], lengths: NDArray[np.uint32]
) -> list[dict[str, Any]]:
    """Of each source its settings, and how many of the picked lines, and bytes, are its own; ready for JSON."""
    owner = np.searchsorted(first_lines, picked, side="right") - 1
    lines = np.bincount(owner, minlength=len(parts))
    sizes = [int(lengths[picked[owner == number]].sum(dtype=np.int64)) for number in range(len(parts))]
    return [
        {**part._asdict(), "selected": int(count), "bytes": size}
        for part, count, size in zip(parts, lines, sizes, strict=True)
    ]
