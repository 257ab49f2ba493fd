"""Trials to rows, by protocol v1 (`study.py`): l*, the gate, who is chosen, and the ratio with its interval.

Nothing is trained or read here: outcomes in, tables out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from minimind_sft.significance import Resampling

MARGIN = 0.01  # nats of chat loss above the best vanilla trial's
LEAST_FORGETTING, LEAST_DISTANCE = 0.05, 0.3  # below which no ratio is told
ORIGINAL, VANILLA = "original", "vanilla"


class Outcome(NamedTuple):
    """One trial with one seed, on the selection part. Losses in nats per token."""

    trial: str
    group: str
    seed: int
    run: str
    base_chat_loss: float
    chat_loss: float
    forgetting: float
    steps: int
    step_seconds: float


class Confirmed(NamedTuple):
    """A row with one seed, on the confirmation part.

    Attributes:
        result: what `compare` found.
        documents: the rows of its text's documents.
        recovered: what is still forgotten after the recovery, in nats per token; None where that was not tried.
    """

    trial: str
    seed: int
    result: dict[str, Any]
    documents: list[dict[str, Any]]
    recovered: float | None = None


def target_loss(outcomes: Sequence[Outcome]) -> float:
    """l*: the lowest chat loss of a vanilla trial with the first seed, and `MARGIN` more."""
    return min(one.chat_loss for one in _first(outcomes) if one.group == VANILLA) + MARGIN


def chosen(outcomes: Sequence[Outcome], target: float) -> dict[str, Outcome]:
    """Of each group the trial with the least forgetting among those that reach the target with the first seed; and the
    original."""
    rows: dict[str, Outcome] = {}
    for one in _first(outcomes):
        best = rows.get(one.group)
        if one.chat_loss <= target and (best is None or one.forgetting < best.forgetting):
            rows[one.group] = one
        if one.trial == ORIGINAL:
            rows[ORIGINAL] = one
    return rows


def _first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if one.seed == outcomes[0].seed]


def findings(outcomes: Sequence[Outcome], confirmed: Mapping[tuple[str, int], Confirmed]) -> dict[str, Any]:
    """All trials as selected on, and the chosen rows as confirmed.

    Args:
        outcomes: of one base; those with the first one's seed select.
        confirmed: of the chosen rows, by trial and seed.
    """
    target = target_loss(outcomes)
    picked = chosen(outcomes, target)
    rows = {
        group: [confirmed[one.trial, one.seed] for one in outcomes if one.trial == row.trial]
        for group, row in picked.items()
    }
    vanilla = picked[VANILLA]
    gate = vanilla.forgetting >= LEAST_FORGETTING and vanilla.base_chat_loss - target >= LEAST_DISTANCE
    return {
        "target": target,
        "base_chat_loss": vanilla.base_chat_loss,
        "gate": gate,
        "trials": [outcome._asdict() for outcome in outcomes],
        "rows": {
            group: {
                "trial": picked[group].trial,
                "seeds": len(seeds),
                "step_seconds": picked[group].step_seconds,
                "steps": picked[group].steps,
                **_confirmed(seeds),
                "ratio": _ratios(rows, group) if gate else None,
            }
            for group, seeds in rows.items()
        },
    }


def _confirmed(seeds: Sequence[Confirmed]) -> dict[str, Any]:
    results, documents = [one.result for one in seeds], seeds[0].documents
    texts = [result["text"][result["judged"]] for result in results]
    seen = [result["text"]["seen"]["difference"] for result in results if "seen" in result["text"]]
    facts = [result.get("facts", {}).get("groups", {}).get("raw/not_in_sft") for result in results]
    lost = [group["lost"] / max(1, group["before"]) for group in facts if group]
    return {
        "chat_loss": fmean([result["chats"]["after"] for result in results]),
        "forgetting": fmean([text["difference"] for text in texts]),
        "by_seed": [text["difference"] for text in texts],
        "interval": _draws(documents).ratio(_rise(seeds), _tokens(documents)),
        "kl": fmean([text["kl"] for text in texts]),
        "seen": fmean(seen) if seen else None,
        "in_template": fmean([result["continuations"]["difference"] for result in results]),
        "recovered": seeds[0].recovered,
        "facts_lost": fmean(lost) if lost else None,
    }


def _ratios(rows: Mapping[str, Sequence[Confirmed]], group: str) -> dict[str, Any]:
    """How many times as much vanilla and the original forget, paired over documents.

    The interval is that of the row's share of the other's forgetting, turned over: where zero is within the share's,
    the ratio has a lower bound only, and is itself no figure.
    """
    own, draws = _rise(rows[group]), _draws(rows[group][0].documents)
    ratios: dict[str, Any] = {}
    for other in (VANILLA, ORIGINAL):
        if other in rows and other != group:
            theirs = _rise(rows[other])
            share = draws.ratio(own, theirs)
            bounds = None if share is None else [1.0 / end if end > 0.0 else None for end in reversed(share)]
            bounded = bounds is None or bounds[1] is not None
            ratios[other] = {"ratio": float(theirs.sum() / own.sum()) if bounded else None, "interval": bounds}
    return ratios


def _draws(rows: Sequence[dict[str, Any]]) -> Resampling:
    return Resampling([row["parent"] for row in rows], [row["source"] for row in rows], seed=42)


def _rise(seeds: Sequence[Confirmed]) -> np.ndarray:
    """Nats that each document lost, the mean over the seeds, (D,)."""
    places = [[row["where"] for row in one.documents] for one in seeds]
    assert all(place == places[0] for place in places)
    return np.mean([[row["difference"] * row["tokens"] for row in one.documents] for one in seeds], axis=0)


def _tokens(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["tokens"] for row in rows], np.float64)


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The tables of `study.md`: per base the rows as confirmed, then all trials as selected on."""
    parts = []
    for base, of in found.items():
        parts.append(
            f"## {base}\n\nBase: chats {of['base_chat_loss']:.4f}; l* {of['target']:.4f} (selection part)."
            + ("" if of["gate"] else " The shift is too small for a ratio.")
            + "\n\n| row | trial | chats | forgotten | 95 % | seen text | KL | in the template | recovered "
            "| facts lost | s a step | vanilla / row | original / row |\n"
            f"{'|---' * 13}|\n"
        )
        for group, row in of["rows"].items():
            interval = "" if row["interval"] is None else "{:+.4f} to {:+.4f}".format(*row["interval"])
            facts = "" if row["facts_lost"] is None else f"{row['facts_lost']:.1%}"
            ratios = [_ratio((row["ratio"] or {}).get(other)) for other in (VANILLA, ORIGINAL)]
            parts.append(
                f"| {group} | {row['trial']} x {row['seeds']} | {row['chat_loss']:.4f} | {row['forgetting']:+.4f} "
                f"| {interval} | {_signed(row['seen'])} | {row['kl']:.4f} | {row['in_template']:+.4f} "
                f"| {_signed(row['recovered'])} | {facts} | {row['step_seconds']:.2f} "
                f"| {ratios[0]} | {ratios[1]} |\n"
            )
        parts.append("\n| trial | group | seed | steps | chats | forgotten |\n|---|---|---|---|---|---|\n")
        for one in of["trials"]:
            parts.append(
                f"| {one['trial']} | {one['group']} | {one['seed']} | {one['steps']} | {one['chat_loss']:.4f} "
                f"| {one['forgetting']:+.4f} |\n"
            )
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    if ratio["interval"] is None:
        return f"{ratio['ratio']:.1f}"
    low, high = ratio["interval"]
    if high is None:
        return "nothing is forgotten" if low is None else f"over {low:.0f}"
    return f"{ratio['ratio']:.1f} ({low:.1f} to {high:.1f})"


def _signed(nats: float | None) -> str:
    return "" if nats is None else f"{nats:+.4f}"
