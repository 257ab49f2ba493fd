"""Protocol v1 of the study: l*, who is chosen, the gate, and the ratio, on outcomes that can be checked by hand."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from study import CONFIRMATION, SELECTION, _publish, named, part_of
from study_rows import Confirmed, Outcome, chosen, findings, markdown, target_loss


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


def confirm(outcome: Outcome) -> Confirmed:
    """A confirmation in which every document forgets what the trial forgot on the selection part, give or take."""
    rows = [
        {"where": f"t:{n}", "parent": n, "source": n % 2, "tokens": 10, "difference": outcome.forgetting * factor}
        for n, factor in enumerate((0.9, 1.0, 1.1))
    ]
    forgetting = sum(row["difference"] for row in rows) / 3
    text = {"unseen": {"difference": forgetting, "kl": 0.1}, "seen": {"difference": 2 * forgetting}}
    facts = {"groups": {"raw/not_in_sft": {"before": 10, "lost": 4}}}
    result = {"judged": "unseen", "text": text, "chats": {"after": outcome.chat_loss + 0.1},
              "continuations": {"difference": 0.5}, "facts": facts}  # fmt: skip
    return Confirmed(outcome.trial, outcome.seed, result, rows, 0.25 if outcome.seed == 1 else None)


def found_of(outcomes: list[Outcome]) -> dict[str, Any]:
    return findings(outcomes, {(one.trial, one.seed): confirm(one) for one in outcomes})


def test_the_target_is_the_best_vanilla_loss_and_a_margin() -> None:
    assert target_loss(TRIALS) == pytest.approx(4.01)


def test_of_each_group_the_trial_that_forgets_least_among_those_at_the_target_is_chosen() -> None:
    rows = chosen(TRIALS, 4.01)
    assert {group: row.trial for group, row in rows.items()} == {
        "vanilla": "tuned", "held": "strong", "original": "original",
    }  # fmt: skip


def test_the_first_seed_selects_and_the_rows_are_the_mean_of_all() -> None:
    again = [outcome("strong", "held", 4.5, 0.04, seed=2), outcome("weak", "held", 3.0, 0.0, seed=2)]
    held = found_of([*TRIALS, *again])["rows"]["held"]
    assert held["trial"] == "strong" and held["seeds"] == 2
    assert held["forgetting"] == pytest.approx(0.03) and held["by_seed"] == pytest.approx([0.02, 0.04])
    assert held["chat_loss"] == pytest.approx((4.109 + 4.6) / 2)
    assert held["ratio"]["vanilla"]["ratio"] == pytest.approx(0.2 / 0.03)


def test_the_rows_are_confirmed_and_their_ratios_told() -> None:
    found = found_of(TRIALS)
    assert list(found["rows"]) == ["vanilla", "original", "held"] and found["gate"]
    held = found["rows"]["held"]
    assert held["forgetting"] == pytest.approx(0.02) and held["chat_loss"] == pytest.approx(4.109)
    assert held["facts_lost"] == pytest.approx(0.4) and held["recovered"] == 0.25
    assert held["seen"] == pytest.approx(0.04)
    assert held["ratio"]["vanilla"]["ratio"] == pytest.approx(10.0)
    assert held["ratio"]["original"]["ratio"] == pytest.approx(15.0)
    low, high = held["ratio"]["vanilla"]["interval"]  # every document has the same ratio
    assert low == pytest.approx(10.0) and high == pytest.approx(10.0)
    table = markdown({"small": found})
    assert "10.0 (10.0 to 10.0)" in table
    columns = {line.count("|") for line in table.split("\n\n")[2].splitlines()}
    assert columns == {14}


@pytest.mark.parametrize(
    ("differences", "told"), [((-0.02, 0.0, 0.03), "| over "), ((-0.02, -0.03, -0.02), "| nothing is forgotten |")]
)
def test_where_forgetting_may_be_none_the_ratio_has_no_figure(differences: tuple[float, ...], told: str) -> None:
    confirmed = {(one.trial, one.seed): confirm(one) for one in TRIALS}
    rows = [row | {"difference": rise} for row, rise in zip(confirmed["strong", 1].documents, differences, strict=True)]
    confirmed["strong", 1] = confirmed["strong", 1]._replace(documents=rows)
    found = findings(TRIALS, confirmed)
    assert found["rows"]["held"]["ratio"]["vanilla"]["ratio"] is None
    assert told in markdown({"small": found})


@pytest.mark.parametrize("change", [{"forgetting": 0.04}, {"base_chat_loss": 4.2}])
def test_a_shift_that_is_too_small_gets_no_ratio(change: dict[str, float]) -> None:
    found = found_of([trial._replace(**change) for trial in TRIALS])
    assert not found["gate"] and all(row["ratio"] is None for row in found["rows"].values())
    assert "too small for a ratio" in markdown({"small": found})


def test_trials_are_run_in_the_order_they_are_named_in() -> None:
    trials = {"original": 1, "held, weight 1": 2, "held, weight 2": 3}
    assert named(trials, None) == trials
    assert list(named(trials, ["held, weight 2", "original"])) == ["held, weight 2", "original"]
    with pytest.raises(ValueError, match="no trial called held; its trials are original; held, weight 1;"):
        named(trials, ["held"])


def test_pieces_of_one_parent_lie_in_one_part_and_a_third_is_selected_on() -> None:
    assert part_of('{"text": "a", "parent": "book"}') == part_of('{"text": "b", "parent": "book"}')
    parts = [part_of(f'{{"text": "{number}"}}') for number in range(300)]
    assert 80 <= parts.count(SELECTION) <= 120 and parts.count(SELECTION) + parts.count(CONFIRMATION) == 300


def test_every_document_s_losses_are_published_by_its_hash(tmp_path: Path) -> None:
    text, table = tmp_path / "text.jsonl", tmp_path / "losses.csv"
    text.write_text('{"text": "a\u2028"}\n{"text": "b", "parent": "book"}\n', encoding="utf-8")
    rows = [
        {"where": f"{text}:{line}", "source": "s", "tokens": 7, "before": 4.0, "after": 4.0 + line} for line in (2, 1)
    ]
    _publish(table, str(text), [Confirmed("held", seed, {}, rows) for seed in (1, 2)])
    head, first, _ = table.read_text(encoding="utf-8").splitlines()
    assert head == 'document,parent,source,tokens,base,"held, seed 1","held, seed 2"'
    document, parent = (hashlib.sha256(of).hexdigest()[:16] for of in (text.read_bytes().split(b"\n")[1], b"book"))
    assert first == f"{document},{parent},s,7,4.0000,6.0000,6.0000"


def test_the_trial_called_after_sft_yaml_is_sft_yaml() -> None:
    """A trial overlays the plan's configs, and cannot name one of its own: it has to say the same in options."""
    root = Path(__file__).resolve().parents[1]
    plan = yaml.safe_load((root / "tests" / "benchmarks" / "study_real.yaml").read_text(encoding="utf-8"))
    shipped, overlay = (
        yaml.safe_load((root / "configs" / name).read_text(encoding="utf-8")) for name in plan["configs"]
    )
    trial = {section: shipped[section] | overlay[section] for section in ("model", "data", "trainer")}
    words = (plan["fit"] + " " + plan["trials"]["sft.yaml"]["fit"]).split()
    for option, value in zip(words[::2], words[1::2], strict=True):
        section, _, key = option.removeprefix("--").partition(".")
        if key:
            trial[section][key] = yaml.safe_load(value)

    def said(settings: dict[str, Any]) -> dict[str, Any]:
        """Without what is null, and with numbers, where YAML takes 4e6 for a word."""
        return {
            key: float(value) if str(value)[0].isdigit() else value
            for key, value in settings.items()
            if value is not None
        }

    for section, settings in trial.items():
        assert said(settings) == said(shipped[section])
