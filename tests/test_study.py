"""Protocol v1 of the study: l*, who is chosen, the gate, and the ratio, on outcomes that can be checked by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from study import CONFIRMATION, SELECTION, part_of
from study_rows import Outcome, chosen, findings, markdown, target_loss


def outcome(trial: str, group: str, chat_loss: float, forgetting: float, *, seed: int = 1) -> Outcome:
    return Outcome(trial, group, seed, f"{trial}-{seed}", 5.0, chat_loss, forgetting, 10, 1.0)


TRIALS = [
    outcome("original", "vanilla", 4.00, 0.30),
    outcome("slow", "vanilla", 4.50, 0.06),
    outcome("tuned", "vanilla", 4.01, 0.20),
    outcome("weak", "held", 4.00, 0.05),
    outcome("strong", "held", 4.009, 0.02),
    outcome("strongest", "held", 4.20, 0.01),
    outcome("half", "control", 4.30, 0.01),
]


def confirm(outcome: Outcome) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A confirmation in which every document forgets what the trial forgot on the selection part, give or take."""
    rows = [
        {"where": f"t:{n}", "parent": n, "source": n % 2, "tokens": 10, "difference": outcome.forgetting * factor}
        for n, factor in enumerate((0.9, 1.0, 1.1))
    ]
    forgetting = sum(row["difference"] for row in rows) / 3
    text = {"difference": forgetting, "kl": 0.1}
    facts = {"groups": {"raw/not_in_sft": {"before": 10, "lost": 4}}}
    result = {"judged": "unseen", "text": {"unseen": text}, "chats": {"after": outcome.chat_loss + 0.1},
              "continuations": {"difference": 0.5}, "facts": facts}  # fmt: skip
    return result, rows


def test_the_target_is_the_best_vanilla_loss_and_a_margin() -> None:
    assert target_loss(TRIALS) == pytest.approx(4.01)


def test_of_each_group_the_trial_that_forgets_least_among_those_at_the_target_is_chosen() -> None:
    rows = chosen(TRIALS, 4.01)
    assert {group: seeds[0].trial for group, seeds in rows.items()} == {"vanilla": "tuned", "held": "strong"}


def test_several_seeds_are_one_trial_judged_by_its_mean() -> None:
    lucky = [outcome("lucky", "held", 3.0, 0.0), outcome("lucky", "held", 5.5, 0.0, seed=2)]  # 4.25 in the mean
    assert chosen([*TRIALS, *lucky], 4.01)["held"][0].trial == "strong"
    assert len(chosen([*TRIALS, *lucky], 4.5)["held"]) == 2


def test_the_rows_are_confirmed_and_their_ratios_told() -> None:
    found = findings(TRIALS, confirm)
    assert list(found["rows"]) == ["vanilla", "held", "original"] and found["gate"]
    held = found["rows"]["held"]
    assert held["forgetting"] == pytest.approx(0.02) and held["chat_loss"] == pytest.approx(4.109)
    assert held["facts_lost"] == pytest.approx(0.4)
    assert held["ratio"]["vanilla"]["ratio"] == pytest.approx(10.0)
    assert held["ratio"]["original"]["ratio"] == pytest.approx(15.0)
    low, high = held["ratio"]["vanilla"]["interval"]  # every document has the same ratio
    assert low == pytest.approx(10.0) and high == pytest.approx(10.0)
    assert "10.0 (10.0 to 10.0)" in markdown({"small": found})


@pytest.mark.parametrize("change", [{"forgetting": 0.04}, {"base_chat_loss": 4.2}])
def test_a_shift_that_is_too_small_gets_no_ratio(change: dict[str, float]) -> None:
    found = findings([trial._replace(**change) for trial in TRIALS], confirm)
    assert not found["gate"] and all(row["ratio"] is None for row in found["rows"].values())
    assert "too small for a ratio" in markdown({"small": found})


def test_pieces_of_one_parent_lie_in_one_part_and_a_third_is_selected_on() -> None:
    assert part_of('{"text": "a", "parent": "book"}') == part_of('{"text": "b", "parent": "book"}')
    parts = [part_of(f'{{"text": "{number}"}}') for number in range(300)]
    assert 80 <= parts.count(SELECTION) <= 120 and parts.count(SELECTION) + parts.count(CONFIRMATION) == 300
