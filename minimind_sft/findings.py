"""What there is to say of a whole set: figures, reasons of rejection, lengths, the longest and the strangest rows.

Comes in: a `View`. Goes out: an `Inspection`, plain values that the screen and the page show alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minimind_sft import account
from minimind_sft.dealing import Dealt
from minimind_sft.inspection_rows import Row, View
from minimind_sft.oddities import scan
from minimind_sft.selection import MEBIBYTE

BINS = 12


class Bin(NamedTuple):
    """Rows of `low` to `high` tokens (`high` None: and more), and how many of them are cut."""

    low: int
    high: int | None
    rows: int
    cut: int


class Notable(NamedTuple):
    """A row worth a look: what is strange about it, how much, where it is and how it begins."""

    what: str
    value: str
    where: str
    text: str


class Reason(NamedTuple):
    """Why lines were rejected, how many, and the first one."""

    reason: str
    lines: int
    first: str


@dataclass
class Inspection:
    """All that is shown; see `inspect_store`."""

    documents: int
    rows: list[Row]
    figures: list[tuple[str, str]]
    reasons: list[Reason]
    bins: list[Bin]
    notable: list[Notable]
    warnings: list[str]


def inspect_store(view: View, *, rows: int, max_bad_ratio: float = 1.0) -> Inspection:
    """Everything that `inspect` shows.

    Args:
        view: The store and the settings.
        rows: How many rows to show token by token, the first ones of the sample.
        max_bad_ratio: As in `fit`, which refuses more; here it is a warning.
    """
    store = view.store
    return Inspection(
        documents=len(store),
        rows=[view.row(number) for number in range(min(rows, len(store)))],
        figures=_figures(view),
        reasons=_reasons(view.dealt),
        bins=histogram(view.lengths, max_length=view.documents.max_length),
        notable=_notable(view),
        warnings=_warnings(view, max_bad_ratio),
    )


def _figures(view: View) -> list[tuple[str, str]]:
    note = view.store.meta["note"]
    tokens, size = int(view.lengths.sum()), note["bytes"] / MEBIBYTE
    figures = [
        ("lines", f"{account.chosen(view.dealt)}; {note['blank']:,} blank"),
        ("kept", account.used(view.dealt)),
        ("rejected", f"{sum(view.dealt.rejected.values()):,}"),
        *([("dropped", lost)] if (lost := account.dropped(view.store)) else []),
        ("tokens", f"{tokens:,} before cutting, {tokens / max(size, 1e-9):,.0f} per MB of lines"),
        ("too long", account.too_long(view.documents)),
    ]
    if view.plan is not None:
        epoch = view.plan.epoch(0)
        tokens, plan = int(epoch.lengths.sum()), view.plan
        figures += [
            ("per epoch", f"{tokens:,} tokens, {epoch.targets.sum() / tokens:.1%} supervised"),
            ("steps", f"{plan.windows:,} per epoch on one process; a step learns from {plan.batch_size} x "
                      f"{plan.accumulate} rows, {epoch.window_tokens.mean():,.0f} tokens in the mean"),
        ]
    return figures


def _reasons(dealt: Dealt) -> list[Reason]:
    first: dict[str, str] = {}
    for row in dealt.rejections():
        first.setdefault(row["reason"], f"{row['file']}:{row['line']}: {row['detail']}")
        if len(first) == len(dealt.rejected):
            break
    return [Reason(reason, count, first[reason]) for reason, count in dealt.rejected.items()]


def _warnings(view: View, max_bad_ratio: float) -> list[str]:
    bad, warnings = sum(view.store.rejected.values()), []
    lines = bad + len(view.store)
    if bad > max_bad_ratio * lines:
        warnings.append(f"{bad:,} of {lines:,} lines are rejected, more than data.max_bad_ratio = {max_bad_ratio:g}")
    return [f"fit will refuse this: {why}" for why in [*warnings, *([view.refusal] if view.refusal else [])]]


def histogram(lengths: np.ndarray, *, max_length: int) -> list[Bin]:
    """Documents by length, in at most `BINS` bins of a power of two of tokens; the last one is open."""
    if not len(lengths):
        return []
    width = 8
    while width * (BINS - 1) < np.quantile(lengths, 0.99):
        width *= 2
    place = np.minimum(lengths // width, BINS - 1)
    rows, cut = (np.bincount(place[chosen], minlength=BINS) for chosen in (lengths >= 0, lengths > max_length))
    return [
        Bin(i * width, None if i == BINS - 1 else (i + 1) * width - 1, int(rows[i]), int(cut[i]))
        for i in range(int(place.min()), int(place.max()) + 1)
    ]


def _notable(view: View) -> list[Notable]:
    found = [("longest", f"{view.lengths[n]:,} tokens", n) for n in np.argsort(-view.lengths, kind="stable")[:3]]
    if view.plan is not None:
        epoch, index = view.plan.epoch(0), view.documents.index
        for n in np.argsort(epoch.targets / epoch.lengths, kind="stable")[:2]:
            found.append(("least supervised", f"{epoch.targets[n]:,} of {epoch.lengths[n]:,} tokens", index[n]))
    seen = scan(view.store, view.texts)
    if seen.repeated is not None:
        value = f"{seen.repeated.text!r} {seen.repeated.length:,} times in a row"
        found.append(("one token repeated", value, seen.repeated.document))
    if seen.word is not None:
        word = seen.word.text if len(seen.word.text) <= 32 else seen.word.text[:32] + "..."
        found.append(("longest word", f"{seen.word.length:,} characters: {word}", seen.word.document))
    if seen.silent:
        value = f"{seen.silent.total():,} of them, in {len(seen.silent):,} rows"
        found.append(("answers that say nothing", value, min(seen.silent)))
    totals: Counter[int] = Counter()
    for (number, _), count in seen.hidden.items():
        totals[number] += count
    for number, _ in totals.most_common(2):
        spelled = [f"{control} x {count}" for (n, control), count in seen.hidden.most_common() if n == number]
        found.append(("control strings as text", ", ".join(spelled[:4]), number))
    return [Notable(what, value, view.store.where(n), view.beginning(n)) for what, value, n in found]
