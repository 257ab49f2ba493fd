"""The verb `budget`: the power law on literals, the choice, mistakes, what is skipped, and two real runs."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from minimind_sft import budgeting
from minimind_sft.__main__ import main
from minimind_sft.budgeting import Trial, _findings, _told, choose
from minimind_sft.power_law import PowerLaw

PROJECT = Path(__file__).resolve().parents[1]


def test_points_on_a_power_law_give_it_back_without_error() -> None:
    law = PowerLaw.fit([(1.0, 0.02), (4.0, 0.04), (16.0, 0.08)])
    assert law == pytest.approx((0.02, 0.5, 0.0, 3), abs=1e-9)
    assert law.at(9.0) == pytest.approx(0.06) and law.reaches(0.06) == pytest.approx(9.0)
    assert PowerLaw(1.0, -0.5, 0.0, 3).reaches(0.1) is None


def test_the_error_of_the_exponent_is_the_textbooks() -> None:
    e = 2.718281828459045  # log x = 0, 1, 2 and log y = 0, 2, 1: slope 1/2, residuals -1/2, 1, -1/2; s.e. sqrt(3)/2
    law = PowerLaw.fit([(1.0, 1.0), (e, e**2), (e**2, e)])
    assert (law.b, law.b_error) == pytest.approx((0.5, 0.75**0.5))


def test_what_has_no_logarithm_is_left_out_and_two_points_are_too_few() -> None:
    points = [(0.5, -0.001), (1.0, 0.02), (4.0, 0.04), (16.0, 0.08)]
    assert PowerLaw.fit(points).points == 3
    for those, told in ((points, True), (points[1:], False)):
        said = _told(_findings([Trial(cap, cap, 2, 5.0, lost, 1.0) for cap, lost in those], 0.02, None))
        assert ("(1 s.e.), through the 3 of 4 caps that forgot anything" in said) == told
    with pytest.raises(ValueError, match="3 or more points above 0, and there are 2"):
        PowerLaw.fit([(0.5, -0.001), (1.0, 0.02), (4.0, 0.04)])
    with pytest.raises(ValueError, match="of one size"):
        PowerLaw.fit([(1.0, 0.02), (1.0, 0.03), (1.0, 0.04)])


def test_a_cap_beyond_the_data_says_what_it_took_and_what_was_not_measured_is_not_none() -> None:
    def told(*trials: Trial) -> str:
        (line,) = [line for line in _told(_findings(trials, 0.02, None)).splitlines() if "largest cap" in line]
        return line

    small, beyond = Trial(1.0, 0.99, 2, 5.0, 0.01, 1.0), Trial(8.0, 1.4, 3, 4.9, 0.015, 1.0, "end")
    assert told(small, beyond).endswith("8 MB, of which 1.4 MB are taken: the chats end there")
    assert told(small, beyond._replace(tightest="max_rows")).endswith("taken: data.max_rows ends the sample there")
    assert told(small, beyond._replace(forgetting=0.03)).endswith("1 MB")
    assert told(*(trial._replace(forgetting=0.03) for trial in (small, beyond))).endswith("none of these caps")
    unmeasured = [trial._replace(forgetting=None) for trial in (small, beyond)]
    assert "unknown: forgetting was not measured (set data.heldout_path" in told(*unmeasured)


def test_the_largest_cap_within_the_bound_is_chosen() -> None:
    trials = [Trial(cap, cap, 2, 5.0, lost, 1.0) for cap, lost in ((1.0, 0.01), (2.0, 0.02), (4.0, 0.03))]
    assert choose(trials, 0.02) == trials[1]
    assert choose(trials, 0.005) is None
    assert choose([Trial(1.0, 1.0, 2, 5.0, None, 1.0)], 0.02) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_mb", "1"], "two or more caps"),
        (["--max_mb", "1", "1.0"], "each once"),
        (["--max_mb", "0", "1"], "above 0"),
        (["--max_mb", "1", "2", "--max_forgetting", "0"], "--max_forgetting is 0"),
        (["--max_mb", "1", "2", "--data.max_mb=3"], "use --max_mb"),
        (["--max_mb", "1", "2", "--config", "sfft.yaml"], "configs/ holds"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", f"--run_dir={tmp_path}", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were started; what a run leaves is made up, forgetting = 0.01 * MB."""
    names: list[str] = []

    def fake(options: Sequence[str], log: Path, *, append: bool = False) -> float:
        given = dict(word.split("=", 1) for word in options if "=" in word)
        run, cap = Path(given["--run_dir"]), float(given["--data.max_mb"])
        names.append(run.name)
        assert given["--export"] == "none"
        assert ("--overwrite" in options) != (given.get("--ckpt_path") == "auto")
        names[-1] += " anew" if "--overwrite" in options else ""
        run.mkdir(parents=True, exist_ok=True)
        reading = {"step": 5, "chat_loss": 4.0 / cap, "pretrain_loss": 3.0, "bits_per_byte": 1.0}
        before = reading | {"step": 0, "chat_loss": 6.0}
        figures = {"before": before, "after": reading, "forgetting": 0.01 * cap}
        (run / "forgetting.json").write_text(json.dumps(figures))
        (run / "metrics.csv").write_text("step,seconds\n0,\n5,1.0\n")
        (run / "sample.json").write_text(json.dumps({"bytes": cap * 2**20, "tightest": "max_mb" if cap < 9 else "end"}))
        data = {"train_path": "data/sft_train.jsonl", "tokenizer": "data/tokenizer", "pretrain_mb": 4000}
        data |= {"val_fraction": float(given["--data.val_fraction"])} if "--data.val_fraction" in given else {}
        (run / "config.yaml").write_text(json.dumps({"data": data}))
        (run / "run.json").write_text("{}")
        return 1.0

    monkeypatch.setattr(budgeting, "run_fit", fake)
    return names


def test_runs_that_are_whole_are_skipped_and_cut_ones_resumed(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["budget", f"--run_dir={tmp_path}", "--max_mb", "4", "1", "2", "--trainer.max_steps=5"]
    assert main(command) == 0
    assert trained == ["1mb", "2mb", "4mb"]
    found = json.loads((tmp_path / "budget.json").read_text())
    assert found["chosen_mb"] == 2.0 and found["predicted_mb"] == pytest.approx(2.0)
    assert found["rules_mb"] == {"1:1000": 4.0, "1:10000": 0.4}
    assert "1 : 1,000 is 4 MB, 1 : 10,000 is 0.4 MB" in capsys.readouterr().out
    assert (tmp_path / "budget.png").stat().st_size > 10_000
    with open(tmp_path / "2mb" / "metrics.csv", "a") as file:
        file.write("6,2.0\n")  # it went on and was cut
    assert main(command) == 0
    assert trained[3:] == ["2mb"]
    assert main([*command[:-1], "--trainer.max_steps=6"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert main([*command[:-1], "--trainer.max_steps=6", "--overwrite"]) == 0
    assert trained[4:] == ["1mb anew", "2mb anew", "4mb anew"]
    assert main([*command[:-1], "--trainer.max_steps=6"]) == 0 and len(trained) == 7


def test_overwriting_leaves_what_is_no_run_and_replaces_a_run_only_when_the_new_one_trains(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["budget", f"--run_dir={tmp_path}", "--max_mb", "1", "2", "--overwrite"]
    (tmp_path / "2mb").mkdir()
    (tmp_path / "2mb" / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert "2mb is no run's folder" in capsys.readouterr().err and not trained
    (tmp_path / "2mb" / "notes.txt").unlink()
    assert main(command) == 0 and trained == ["1mb", "2mb"]

    def mistaken(options: Sequence[str], log: Path, *, append: bool = False) -> float:
        raise ValueError("unrecognized arguments")

    with monkeypatch.context() as patch:
        patch.setattr(budgeting, "run_fit", mistaken)
        assert main(command) == 2
    assert budgeting.is_whole(tmp_path / "1mb") and budgeting.is_whole(tmp_path / "2mb")
    assert main(command[:-1]) == 0  # what was to be replaced still is
    assert trained[2:] == ["1mb anew", "2mb anew"]


def test_caps_that_were_measured_on_other_documents_are_in_no_table_together(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["budget", f"--run_dir={tmp_path}", "--max_mb", "1", "2"]
    assert main(command) == 0
    for key, other, kind in (("pretrain_loss", 3.01, "text"), ("chat_loss", None, "chats"), ("chat_loss", 6.0005, "")):
        file = tmp_path / "2mb" / "forgetting.json"
        figures = json.loads(file.read_text())
        file.write_text(json.dumps(figures | {"before": figures["before"] | {key: other}}))
        assert main(command) == (2 if kind else 0)
        assert (f"2mb was measured on other {kind}" in capsys.readouterr().err) == bool(kind)
        file.write_text(json.dumps(figures))


@pytest.mark.parametrize("which", ["chats", "base"])
def test_whole_runs_of_other_data_or_another_base_are_not_taken_for_these(
    which: str, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, file = ["budget", f"--run_dir={tmp_path / 'b'}", "--max_mb", "1", "2"], tmp_path / f"{which}.jsonl"
    file.write_text("one")
    assert main(command) == 0
    known = {"sha256": hashlib.sha256(b"one").hexdigest(), "name": str(file)}
    for run in (tmp_path / "b" / "1mb", tmp_path / "b" / "2mb"):
        if which == "chats":
            (run / "sample.json").write_text(json.dumps({"bytes": 2**20, "tightest": "max_mb", "inputs": [known]}))
        else:
            (run / "run.json").write_text(json.dumps({"base_sha256": known["sha256"]}))
            settings = json.loads((run / "config.yaml").read_text()) | {"model": {"weights": str(file)}}
            (run / "config.yaml").write_text(json.dumps(settings))
    assert main(command) == 0 and trained == ["1mb", "2mb"]
    capsys.readouterr()
    file.write_text("two")
    assert main(command) == 2
    assert f"of another {file} than there is now; pass --overwrite" in capsys.readouterr().err


def test_validation_chats_that_differ_from_cap_to_cap_are_told(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, more in enumerate(([], ["--data.val_fraction=0.1"])):
        assert main(["budget", f"--run_dir={tmp_path / str(number)}", "--max_mb", "1", "2", *more]) == 0
        assert ("every cap has other validation chats" in capsys.readouterr().out) == bool(more)


def test_no_cap_is_tried_beyond_the_end_of_the_chats(trained: list[str], tmp_path: Path) -> None:
    assert main(["budget", f"--run_dir={tmp_path}", "--max_mb", "4", "9", "10"]) == 0
    assert trained == ["4mb", "9mb"]
    assert "there are 2" in json.loads((tmp_path / "budget.json").read_text())["no_power_law"]


def test_lightning_is_not_imported() -> None:
    code = "import sys, minimind_sft.budgeting; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_two_real_runs_and_the_error_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["budget", f"--run_dir={tmp_path}", "--config", "sft.yaml", "--device=cpu", "--max_mb", "0.01", "0.02"]
    command.append("--data.measure_documents=50")
    assert main([*command, "--trainer.max_step", "2"]) == 2
    assert "max_steps" in capsys.readouterr().err
    assert main([*command, "--trainer.max_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "step 2/2" in said and "it takes 3 or more points" in said
    first, second = ((tmp_path / f"{cap}mb" / "sample.json") for cap in ("0.01", "0.02"))
    assert 0 < json.loads(first.read_text())["selected"] < json.loads(second.read_text())["selected"]
    assert main([*command, "--trainer.max_steps", "2"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
