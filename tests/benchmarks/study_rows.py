"""Trials to rows, by protocol v1 (`study.py`): l*, the gate, who is chosen, and the ratio with its interval.

Nothing is trained or read here: outcomes in, tables out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
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


Confirm = Callable[[Outcome], tuple[dict[str, Any], list[dict[str, Any]]]]


def mean(outcomes: Sequence[Outcome], field: str) -> float:
    return fmean(getattr(outcome, field) for outcome in outcomes)


def by_trial(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    trials: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        trials[outcome.trial].append(outcome)
    return dict(trials)


def target_loss(outcomes: Sequence[Outcome]) -> float:
    """l*: the lowest chat loss of a vanilla trial, the mean over its seeds, and `MARGIN` more."""
    vanilla = by_trial([outcome for outcome in outcomes if outcome.group == VANILLA])
    return min(mean(seeds, "chat_loss") for seeds in vanilla.values()) + MARGIN


def chosen(outcomes: Sequence[Outcome], target: float) -> dict[str, list[Outcome]]:
    """Of each group the trial with the least forgetting among those that reach the target, with all its seeds."""
    rows: dict[str, list[Outcome]] = {}
    for seeds in by_trial(outcomes).values():
        best = rows.get(seeds[0].group)
        if mean(seeds, "chat_loss") <= target and (
            best is None or mean(seeds, "forgetting") < mean(best, "forgetting")
        ):
            rows[seeds[0].group] = seeds
    return rows


def findings(outcomes: Sequence[Outcome], confirm: Confirm) -> dict[str, Any]:
    """All trials as selected on, and the chosen rows as confirmed.

    Args:
        outcomes: of one base.
        confirm: what `compare` finds for a run on the confirmation part, and the rows of its documents.
    """
    target = target_loss(outcomes)
    rows = chosen(outcomes, target)
    if original := by_trial(outcomes).get(ORIGINAL):
        rows[ORIGINAL] = original
    confirmed = {group: [confirm(outcome) for outcome in seeds] for group, seeds in rows.items()}
    vanilla = rows[VANILLA]
    gate = (
        mean(vanilla, "forgetting") >= LEAST_FORGETTING
        and mean(vanilla, "base_chat_loss") - target >= LEAST_DISTANCE
    )
    return {
        "target": target,
        "base_chat_loss": mean(vanilla, "base_chat_loss"),
        "gate": gate,
        "trials": [outcome._asdict() for outcome in outcomes],
        "rows": {
            group: {
                "trial": rows[group][0].trial,
                "seeds": len(seeds),
                "step_seconds": mean(rows[group], "step_seconds"),
                "steps": rows[group][0].steps,
                **_confirmed(seeds),
                "ratio": _ratios(confirmed, group) if gate else None,
            }
            for group, seeds in confirmed.items()
        },
    }


def _confirmed(seeds: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> dict[str, Any]:
    results = [result for result, _ in seeds]
    texts = [result["text"][result["judged"]] for result in results]
    facts = [group for result in results for name, group in result.get("facts", {}).get("groups", {}).items()
             if name == "raw/not_in_sft"]  # fmt: skip
    return {
        "chat_loss": fmean([result["chats"]["after"] for result in results]),
        "forgetting": fmean([text["difference"] for text in texts]),
        "by_seed": [text["difference"] for text in texts],
        "interval": _draws(seeds[0][1]).ratio(_rise([rows for _, rows in seeds]), _tokens(seeds[0][1])),
        "kl": fmean([text["kl"] for text in texts]),
        "in_template": fmean([result["continuations"]["difference"] for result in results]),
        "facts_lost": fmean([group["lost"] / max(1, group["before"]) for group in facts]) if facts else None,
    }


def _ratios(confirmed: dict[str, Any], group: str) -> dict[str, Any]:
    """How many times as much vanilla and the original forget, paired over documents."""
    own = [rows for _, rows in confirmed[group]]
    ratios = {}
    for other in (VANILLA, ORIGINAL):
        if other in confirmed and other != group:
            theirs = [rows for _, rows in confirmed[other]]
            ratio = float(_rise(theirs).sum() / _rise(own).sum())
            ratios[other] = {"ratio": ratio, "interval": _draws(own[0]).ratio(_rise(theirs), _rise(own))}
    return ratios


def _draws(rows: Sequence[dict[str, Any]]) -> Resampling:
    return Resampling([row["parent"] for row in rows], [row["source"] for row in rows], seed=42)


def _rise(seeds: Sequence[Sequence[dict[str, Any]]]) -> np.ndarray:
    """Nats that each document lost, the mean over the seeds, (D,)."""
    assert all([row["where"] for row in rows] == [row["where"] for row in seeds[0]] for rows in seeds)
    return np.mean([[row["difference"] * row["tokens"] for row in rows] for rows in seeds], axis=0)


def _tokens(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["tokens"] for row in rows], np.float64)


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The tables of `study.md`: per base the rows as confirmed, then all trials as selected on."""
    parts = []
    for base, of in found.items():
        parts.append(
            f"## {base}\n\nBase: chats {of['base_chat_loss']:.4f}; l* {of['target']:.4f} (selection part)."
            + ("" if of["gate"] else " The shift is too small for a ratio.")
            + "\n\n| row | trial | chats | forgotten | 95 % | KL | in the template | facts lost | s a step "
            "| vanilla / row | original / row |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        )
        for group, row in of["rows"].items():
            interval = "" if row["interval"] is None else "{:+.4f} to {:+.4f}".format(*row["interval"])
            facts = "" if row["facts_lost"] is None else f"{row['facts_lost']:.1%}"
            ratios = [_ratio((row["ratio"] or {}).get(other)) for other in (VANILLA, ORIGINAL)]
            parts.append(
                f"| {group} | {row['trial']} x {row['seeds']} | {row['chat_loss']:.4f} | {row['forgetting']:+.4f} "
                f"| {interval} | {row['kl']:.4f} | {row['in_template']:+.4f} | {facts} | {row['step_seconds']:.2f} "
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
    interval = "" if ratio["interval"] is None else " ({:.1f} to {:.1f})".format(*ratio["interval"])
    return f"{ratio['ratio']:.1f}{interval}"
