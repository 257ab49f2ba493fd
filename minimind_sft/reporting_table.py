"""The runs of a report side by side: the table that stands on the screen and on the page, and what to beware of.

Runs in, texts out. A figure that a run has not got is a dash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minimind_sft.inspection_screen import visible
from minimind_sft.readings import perplexity
from minimind_sft.run_record import Run

NONE = "-"
SAME_BASE = 1e-3  # nats per token; looks at one base differ by rounding only


def cell_rows(runs: Sequence[Run], words: Mapping[str, str]) -> list[list[str]]:
    """A heading and a row per run."""
    head = ["run", "state", "steps", "chats", "text", "forgotten", "best", "lost_facts", "pace"]
    return [[words[name] for name in head], *(_row(run, words) for run in runs)]


def _row(run: Run, words: Mapping[str, str]) -> list[str]:
    first, last = (run.looks[0], run.looks[-1]) if run.looks else (None, None)
    epochs = "" if run.epochs is None else f" ({run.epochs:.3g})"
    best = NONE
    if run.best:
        best = f"{run.best.step:,}  {_number(run.best.chat)}  {_number(run.best.forgetting, '+')}"
        best += f"  ({run.best_on:.0%})" if run.best_on < 1 else ""
    asked = run.facts.groups.get("raw/not_in_sft") if run.facts else None
    lost = f"{asked['lost']:,} / {asked['before']:,}" if asked else NONE
    pace = NONE if run.seconds_per_step is None else f"{run.seconds_per_step:.2f}"
    return [
        visible(" ".join(run.name.split())),
        words[run.state],
        f"{run.step:,}{epochs}",
        _path(first.chat, last.chat) if first and last else NONE,
        _path(first.text, last.text) if first and last else NONE,
        _number(last.forgetting, "+") if last else NONE,
        best,
        lost,
        pace,
    ]


def figure_rows(runs: Sequence[Run], words: Mapping[str, str]) -> list[list[str]]:
    """A heading, and a row per figure from the base to the last look, in nats, as perplexity and in bits per byte."""
    rows = [["", *(run.name for run in runs)]]
    ends = [(run.looks[0], run.looks[-1]) if run.looks else None for run in runs]
    for title, figure in (
        ("chats", lambda look: _number(look.chat)),
        ("chats_perplexity", lambda look: _number(_perplexity(look.chat), digits=2)),
        ("text", lambda look: _number(look.text)),
        ("text_perplexity", lambda look: _number(_perplexity(look.text), digits=2)),
        ("text_bits", lambda look: _number(look.bits)),
    ):
        cells = [NONE if pair is None else " → ".join(map(figure, pair)) for pair in ends]
        rows.append([words[title], *(NONE if cell == f"{NONE} → {NONE}" else cell for cell in cells)])
    return rows


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else perplexity(loss)


def _path(before: float | None, after: float | None) -> str:
    return NONE if before is None and after is None else f"{_number(before)} → {_number(after)}"


def _number(value: float | None, sign: str = "", digits: int = 4) -> str:
    return NONE if value is None else f"{value:{sign}.{digits}f}"


def notes(runs: Sequence[Run], words: Mapping[str, str]) -> list[str]:
    """What to beware of when comparing these runs."""
    found = [
        words["note_later"].format(run=visible(" ".join(run.name.split())), step=f"{run.ended:,}")
        for run in runs
        if run.ended is not None and run.ended != run.step
    ]
    if any(run.best_on < 1 for run in runs):
        found.append(words["note_part"])
    if len({str(run.record.get("base_sha256")) for run in runs}) > 1:
        return [words["note_bases"], *found]
    for part in ("chat", "text"):
        starts = [getattr(run.looks[0], part) for run in runs if run.looks and run.looks[0].step == 0]
        measured = [loss for loss in starts if loss is not None]
        if measured and max(measured) - min(measured) > SAME_BASE:
            return [words["note_measured"], *found]
    return found


def flat(record: Mapping[str, Any] | None, prefix: str = "") -> dict[str, str]:
    """A record of JSON as one text per key; of files, name, size and the beginning of their hash."""
    found: dict[str, str] = {}
    for key, value in (record or {}).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, 1):
                found |= flat(item, f"{name}.{number}." if len(value) > 1 else f"{name}.")
        else:
            found[name] = _written(value)
    return found


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
