"""What a look at the model costs: which documents are read between the first and the last, and a base measured once."""

import csv
import json
from pathlib import Path

import pytest

from minimind_sft.__main__ import main
from minimind_sft.evaluation import drawn
from minimind_sft.forgetting import Reading
from minimind_sft.intervals import live_share
from minimind_sft.measuring import Measure

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize(
    ("evaluation", "looks", "trained", "share"),
    [
        (3_000, 2, 10_000.0, 0.25),  # 2 looks of 750 tokens cost as much as 500 trained: a twentieth
        (3_000, 2, 100_000.0, 1.0),
        (3_000, 2, 1_000.0, 0.1),  # not less than a tenth
        (3_000, 0, 1_000.0, 1.0),
        (0, 2, 1_000.0, 1.0),
    ],
)
def test_looks_in_between_read_what_a_twentieth_of_the_time_affords(
    evaluation: int, looks: int, trained: float, share: float
) -> None:
    assert live_share(evaluation, looks, trained) == pytest.approx(share)


def test_a_share_of_the_documents_and_the_rest_are_all_of_them() -> None:
    part, rest = drawn(40, 0.25, 7), drawn(40, 0.25, 7, rest=True)
    assert len(part) == 10 and sorted([*part, *rest]) == list(range(40)) and sorted(part) == part.tolist()
    assert part.tolist() == drawn(40, 0.25, 7).tolist() != drawn(40, 0.25, 8).tolist()
    assert set(part) < set(drawn(40, 0.5, 7))
    assert drawn(40, 1.0, 7).tolist() == list(range(40)) and not len(drawn(40, 1.0, 7, rest=True))
    assert len(drawn(3, 0.01, 7)) == 1


def test_a_part_tells_everything_by_its_change() -> None:
    start, whole = Reading(0, 5.0, 2.0, 1.0), Reading(0, 5.5, 2.25, 1.25)
    assert Reading(4, 3.0, 2.125, 1.125).moved(start, whole) == Reading(4, 3.5, 2.375, 1.375)


def test_the_best_reading_is_judged_by_the_documents_that_all_were_read_on() -> None:
    measure = Measure(log_every=1, val_every=None, save_every=None)
    measure.readings = [Reading(0, 5.0, 2.0), Reading(4, 3.0, 2.1), Reading(8, 3.1, 2.2)]
    assert measure.best is not None and measure.best.step == 4
    measure.by_live = {8: Reading(8, 2.9, 2.2)}  # step 8 on what step 4 was read on
    assert measure.best == Reading(8, 3.1, 2.2)  # told as it was on everything
    measure.max_forgetting = 0.15
    assert measure.best.step == 4
    measure.lost = {4}  # of a run that goes on without its weights
    assert measure.best.step == 8


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    nan = float("nan")
    measure = Measure(log_every=1, val_every=None, save_every=None)
    measure.readings = [Reading(0, 5.0, 2.0), Reading(4, nan, 2.1), Reading(8, 3.1, nan), Reading(12, 3.2, 2.4)]
    assert measure.best is not None and measure.best.step == 8
    measure.max_forgetting = 0.15  # none is within it: the one that forgot least, of those that can be told
    assert measure.best.step == 12
    measure.readings = measure.readings[:2]
    assert measure.best is None


# ---- through `fit`


def fit(run_dir: Path, cache: Path, *more: str) -> list[dict[str, float]]:
    """Three epochs of four steps; the readings."""
    arguments = [
        f"--run_dir={run_dir}", "--device=cpu", "--log_every_steps=100", "--export=none", "--data.max_length=48",
        f"--model.weights={DATA}/base.pth", f"--data.train_path={DATA}/sft_train.jsonl", "--data.max_rows=64",
        f"--data.heldout_path={DATA}/heldout.jsonl", "--data.max_overlap=1.0", "--data.measure_documents=120",
        f"--data.tokenizer={DATA}/tokenizer", f"--data.cache_dir={cache}", "--data.own_chats=0",
        "--trainer.max_epochs=3", *more,
    ]  # fmt: skip
    assert main(["fit", *arguments]) == 0
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows if "val/forgetting" in row]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_first_and_the_last_look_are_exact_and_those_between_are_paired(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = fit(tmp_path / "live", cache, "--keep_every_steps=6")
    assert "(10% of them between the first and the last, as a change since step 0)" in capsys.readouterr().out
    whole = fit(tmp_path / "whole", cache, "--val_every_steps=4")
    assert len(live) == len(whole) == 4
    for at in (0, 3):
        assert live[at] == pytest.approx(whole[at], rel=1e-6, abs=1e-6)
    for at in (1, 2):
        name = "val/forgetting"
        assert live[at][name] != pytest.approx(whole[at][name], rel=1e-6)  # not all documents,
        assert live[at][name] == pytest.approx(whole[at][name], abs=0.05)  # but the same base
        assert live[at]["val/pretrain/loss"] - live[0]["val/pretrain/loss"] == pytest.approx(live[at][name])
    (middle,) = (tmp_path / "live" / "checkpoints").glob("*6.ckpt")
    assert fit(tmp_path / "resumed", cache, f"--ckpt_path={middle}")[-2:] == live[-2:]


def test_the_base_is_measured_once_for_the_same_documents(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, few = tmp_path / "cache", ["--trainer.max_steps=1", "--trainer.max_epochs=1"]
    first = fit(tmp_path / "first", own, *few)
    assert "as an earlier run" not in capsys.readouterr().out
    assert fit(tmp_path / "second", own, *few, "--data.max_rows=32", "--model.learning_rate=1e-9")[0] == first[0]
    assert "as an earlier run of this base measured on the same documents" in capsys.readouterr().out
    (kept,) = own.glob("baseline-*.json")
    figures = json.loads(kept.read_text())
    figures["reading"]["pretrain_loss"] += 1.0
    kept.write_text(json.dumps(figures))  # to see that it is taken
    assert fit(tmp_path / "third", own, *few)[0]["val/pretrain/loss"] == first[0]["val/pretrain/loss"] + 1.0
    for name, other in (("documents", "--data.measure_documents=119"), ("cut", "--data.max_length=40")):
        rows = fit(tmp_path / name, own, *few, other)
        assert rows[0]["val/pretrain/loss"] < first[0]["val/pretrain/loss"] + 0.5, name


def test_the_base_is_asked_once_for_the_same_questions(cache: Path, tmp_path: Path) -> None:
    own, probes = tmp_path / "cache", tmp_path / "probes.jsonl"
    few = ["--trainer.max_steps=1", "--trainer.max_epochs=1", f"--data.val_path={DATA}/sft_val.jsonl"]
    probes.write_text((DATA / "probes.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")

    def before(name: str, *more: str) -> tuple[list[str], list[str]]:
        folder = tmp_path / name
        fit(folder, own, *few, f"--data.probes_path={probes}", *more)
        asked, answers = (json.loads((folder / f"{file}.json").read_text()) for file in ("probes", "answers"))
        return [row["before"]["raw"] for row in asked["replies"]], [row["before"] for row in answers]

    first = before("first")
    (kept,) = own.glob("answers-*.json")
    found = json.loads(kept.read_text())
    found["replies"][0]["raw"], found["answers"][0] = "seen", "this too"
    kept.write_text(json.dumps(found))  # to see that it is taken
    assert before("second", "--model.learning_rate=1e-9") == (["seen", *first[0][1:]], ["this too", *first[1][1:]])
    probes.write_text(probes.read_text(encoding="utf-8").replace('"question": "', '"question": "Say: '), "utf-8")
    assert before("asked otherwise") == first
