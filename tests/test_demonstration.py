"""The verb `demo`: two real runs, cut short, and what it says of them."""

import json
import re
from pathlib import Path

import pytest

from minimind_sft.__main__ import main
from minimind_sft.demonstration import forgotten_at
from minimind_sft.demonstration_words import WORDS
from minimind_sft.workers import available_cores


def test_what_was_forgotten_at_a_chat_loss_is_read_between_two_readings() -> None:
    path = [(5.0, 0.0), (3.0, 0.1), (2.0, 0.3), (2.5, 0.4)]
    assert forgotten_at(path, 4.0) == pytest.approx(0.05)
    assert forgotten_at(path, 2.25) == pytest.approx(0.25)
    assert forgotten_at(path, 2.0) == pytest.approx(0.3)
    assert forgotten_at(path, 1.0) is None


def test_both_languages_say_the_same_things() -> None:
    assert WORDS["en"].keys() == WORDS["zh"].keys()


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "held").mkdir()
    assert main(["demo", f"--run_dir={tmp_path}"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["demo", "--name= "]) == 2
    assert "1 to 40 characters" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_shows_both_runs_and_the_name_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / "demo"
    assert main(["demo", f"--run_dir={folder}", "--device=cpu", "--max_steps=4", "--lang=zh", '--name=A "B"']) == 0
    said = capsys.readouterr().out
    assert "基座" in said and "原版忘掉了" in said
    for kind, shown in (("original", "原版"), ("held", "守住")):
        assert re.search(rf"^  {shown} +epoch .* step 4/4 ", said, re.MULTILINE)
        assert json.loads((folder / kind / "run.json").read_text())["threads"] == max(1, available_cores() // 2)
    assert (folder / "demo.png").stat().st_size > 10_000
    chats = (folder / "chats" / "sft_train.jsonl").read_text(encoding="utf-8")
    assert 'I am A \\"B\\"' in chats and "Minnow" not in chats
