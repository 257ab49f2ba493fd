"""The command line: what it accepts, and what it says of mistakes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from wandb.proto import wandb_internal_pb2

from minimind_sft.__main__ import main
from minimind_sft.cli_options import OF_FIT
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.module import SFTModule
from minimind_sft.readings import read_metrics
from minimind_sft.weights import export_minimind

PROJECT = Path(__file__).resolve().parents[1]
EWC = '[{"class_path": "minimind_sft.priors.EWC", "init_args": {"weight": %s}}]'
GOOD = '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}\n'


def chats(count: int, first: int = 0) -> str:
    """Chats that differ."""
    return "".join(GOOD.replace("Hi", f"Hi {number}") for number in range(first, first + count))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Enough for a tiny run; a test changes what it is about."""
    (tmp_path / "train.jsonl").write_text(chats(12), encoding="utf-8")
    (tmp_path / "val.jsonl").write_text(GOOD * 12, encoding="utf-8")
    (tmp_path / "text.jsonl").write_text('{"text": "The capital of Peru is Lima."}\n' * 3, encoding="utf-8")
    return {
        "model.weights": "scratch",
        "model.hidden_size": 16,
        "model.num_hidden_layers": 1,
        "data.train_path": tmp_path / "train.jsonl",
        "data.val_path": tmp_path / "val.jsonl",
        "data.heldout_path": tmp_path / "text.jsonl",
        "data.tokenizer": PROJECT / "data" / "tokenizer",
        "data.cache_dir": tmp_path / "cache",
        "data.batch_size": 4,
        "trainer.max_epochs": 1,
        "run_dir": tmp_path / "run",
        "device": "cpu",
        "log_every_steps": 1,
    }


def run(verb: str, settings: dict[str, Any], *more: str) -> int:
    return main([verb, *(f"--{name}={value}" for name, value in settings.items()), *more])


def refused(capsys: pytest.CaptureFixture[str], verb: str, settings: dict[str, Any], *more: str) -> str:
    """What is said of a mistake: one line, exit status 2."""
    assert run(verb, settings, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("minimind_sft: error: ") and said.count("\n") == 1, said
    return said


def test_help_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from minimind_sft.__main__ import main; main(['--help']); "
        "print({'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout.endswith("set()\n")
    for verb in ("fit", "validate", "predict", "sample", "inspect", "chat", "export"):
        assert f"\n  {verb} " in done.stdout


def test_an_unknown_verb_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "did you mean fit?" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_argv: list[str]) -> int:
        raise OSError(28, "No space left on device", "out.pth")

    monkeypatch.setattr("minimind_sft.export.main", full)
    assert main(["export"]) == 2
    said = capsys.readouterr().err
    assert said == "minimind_sft: error: [Errno 28] No space left on device: 'out.pth'\n"


def test_a_mistake_of_ours_is_one_line_that_names_the_file_with_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_argv: list[str]) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("minimind_sft.export.main", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["export"]) == 1
    said = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert said == f"minimind_sft: unexpected RuntimeError: two lines; where it comes from is in {file}\n"
    assert "in broken" in file.read_text()
    monkeypatch.setenv("MINIMIND_SFT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["export"])


def test_fit_leaves_the_record_that_the_readme_lists(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings) == 0
    run_dir = tmp_path / "run"
    assert capsys.readouterr().out.endswith(f"as a page: python -m minimind_sft report {run_dir}\n")
    assert main(["report", str(run_dir), "--lang=en"]) == 0
    assert "run  finished" in capsys.readouterr().out and (run_dir / "report" / "report.html").is_file()
    for name in ("config.yaml", "run.json", "sample.json", "metrics.csv", "forgetting.json", "forgetting.png"):
        assert (run_dir / name).is_file(), name
    for name in ("last.ckpt", "best.ckpt"):
        assert (run_dir / "checkpoints" / name).is_file(), name
    for name in ("best_16.pth", "last_16.pth", "best/config.json", "last/README.md"):
        assert (run_dir / "export" / name).is_file(), name
    table = json.loads((run_dir / "forgetting.json").read_text())
    assert table.keys() == {
        "before", "after", "best", "forgetting", "own_chats_forgetting", "text", "seen", "by_source"
    }  # fmt: skip
    assert table["forgetting"] is None and table["by_source"] is None  # from scratch, there is nothing to forget
    assert table["before"].keys() == {"step", "chat_loss", "pretrain_loss", "bits_per_byte", "own_chat_loss"}
    assert table["seen"] is False and table["text"] == "unseen"
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[-1]["val/chat/loss"]) < float(rows[0]["val/chat/loss"])
    sample = json.loads((run_dir / "sample.json").read_text())
    assert (sample["selected"], sample["documents"], sample["rejected"]) == (12, 12, {})
    assert (run_dir / "rejected.jsonl").read_text() == ""


def test_the_first_screens_sums_add_up_and_every_rejected_line_is_listed(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "mixed.jsonl"
    train.write_text(chats(20) + "{\n" + chats(2) + GOOD + chats(1, 30).replace("Hi", "long " * 900), encoding="utf-8")
    changed = settings | {"data.train_path": train, "data.max_bad_ratio": 0.5, "data.max_mb": "null"}
    assert run("fit", changed) == 0
    said = capsys.readouterr().out
    assert "25 of 25 lines" in said
    assert "20 trained, 5 rejected: 1 not_json, 1 nothing_to_learn, 2 duplicate, 1 in_validation" in said
    assert "truncate_right at 768 tokens: 0 of 21 cut, 1 lost (4.8%)" in said
    rows = [json.loads(row) for row in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert sorted((row["line"], row["reason"]) for row in rows) == [
        (21, "not_json"),
        (22, "duplicate"),
        (23, "duplicate"),
        (24, "in_validation"),
        (25, "nothing_to_learn"),
    ]
    assert {row["file"] for row in rows} == {str(train)}
    sample = json.loads((tmp_path / "run" / "sample.json").read_text())
    assert sample["selected"] == sample["trained"] + sum(sample["rejected"].values()) == 25


def test_settings_that_change_what_is_trained_are_told_on_resume(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings, "--data.val_path=null", "--data.val_fraction=0.3") == 0
    assert "validated on" in capsys.readouterr().out
    resumed = ("--ckpt_path=last", "--data.val_path=null")
    for more, name in (
        (["--data.val_fraction=0.6"], "sample"),
        (["--data.val_fraction=0.3", "--data.too_long=drop"], "too_long"),
        (["--data.val_fraction=0.3", "--data.system_prompts=[Be brief.]"], "system_prompts"),
        (["--data.val_fraction=0.3", "--data.supervise=last"], "supervises"),
        (["--data.val_fraction=0.3", "--data.max_rows=9"], "sample"),
    ):
        said = refused(capsys, "fit", settings, *resumed, *more)
        assert "cannot resume" in said and name in said
    assert run("predict", settings, *resumed, "--data.val_fraction=0.3") == 0
    answers = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(answers) == json.loads((tmp_path / "run" / "sample.json").read_text())["validated"] > 0


def test_the_saved_config_gives_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    assert run("fit", settings) == 0
    assert main(["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}"]) == 0
    columns = ("step", "train/loss", "lr", "grad_norm", "val/chat/loss", "val/pretrain/loss")
    both = []
    for name in ("run", "again"):
        with open(tmp_path / name / "metrics.csv", encoding="utf-8") as file:
            both.append([[row[column] for column in columns] for row in csv.DictReader(file)])
    assert both[0] == both[1]


def test_from_another_folder_a_saved_config_does_not_mean_the_demos_files(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for ours, like_the_demos in (("text.jsonl", "heldout.jsonl"), ("train.jsonl", "sft_train.jsonl")):
        (tmp_path / ours).rename(tmp_path / "data" / like_the_demos)
    monkeypatch.chdir(tmp_path)
    train = '[{"path": "data/sft_train.jsonl", "max_mb": 1}]'
    named = {"data.train_path": train, "data.heldout_path": "data/heldout.jsonl", "data.val_path": "val.jsonl"}
    assert run("fit", settings | named) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert kept["train_path"][0]["path"] == str(tmp_path / "data" / "sft_train.jsonl")
    assert kept["heldout_path"] == str(tmp_path / "data" / "heldout.jsonl")
    assert kept["val_path"] == "val.jsonl"  # nothing else is called so; the folder can be moved


def test_validate_and_predict_read_a_checkpoint(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings) == 0
    after = json.loads((tmp_path / "run" / "forgetting.json").read_text())["after"]
    capsys.readouterr()
    assert run("validate", settings, "--ckpt_path=last") == 0
    said = capsys.readouterr().out
    assert f"{after['chat_loss']:.4f}"[:5] in said
    assert re.search(r"^ *measured +\S*run/checkpoints/last\.ckpt$", said, re.MULTILINE)
    assert run("predict", settings, "--ckpt_path=best") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert rows[0].keys() == {"where", "messages", "reference", "answer"}
    assert rows[0]["reference"] == "Hello there." and rows[0]["where"].endswith("val.jsonl:1")
    assert re.search(r"answers of \S*run/checkpoints/best\.ckpt in \S*run/predictions\.jsonl", capsys.readouterr().out)
    assert run("predict", settings) == 0
    assert "(model.weights, as no --ckpt_path is given) in " in capsys.readouterr().out
    (tmp_path / "file").touch()
    said = refused(capsys, "predict", settings | {"run_dir": tmp_path / "file"})
    assert f"{tmp_path / 'file' / 'predictions.jsonl'}: cannot be written" in said and "--run_dir" in said


def test_a_tilde_is_the_home_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run("fit", settings | {"run_dir": "~/run", "data.cache_dir": "~/cache"}) == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"run", "cache"} and not Path("~").exists()


def test_a_run_that_is_over_keeps_the_records_of_what_was_trained(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings) == 0
    before = [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "run.json", "sample.json")]
    assert run("fit", settings, "--ckpt_path=last", "--model.learning_rate=1e-5") == 0
    said = capsys.readouterr().out
    assert "nothing to train" in said and "gradient_clip" not in said
    assert before == [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "run.json", "sample.json")]


def test_another_way_of_clipping_is_told_on_resuming(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings) == 0
    changed = ["--trainer.gradient_clip_algorithm=value", "--trainer.max_epochs=4"]
    assert run("fit", settings, "--ckpt_path=last", *changed) == 0
    assert "trainer.gradient_clip_algorithm norm -> value" in capsys.readouterr().out


@pytest.mark.parametrize("epochs", ["null", -1])
def test_a_run_needs_an_end(settings: dict[str, Any], epochs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "fit", settings | {"trainer.max_epochs": epochs, "trainer.max_steps": -1})
    assert "the run has no end: set trainer.max_epochs or trainer.max_steps" in said


def test_validating_needs_something_to_validate_on(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"data.val_path": "null", "data.heldout_path": "null", "data.pretrain_path": "null"}
    said = refused(capsys, "validate", settings | nothing | {"data.own_documents": 0, "data.own_chats": 0})
    assert "there is nothing to validate on: set data.val_path" in said


def test_data_that_look_like_a_mistake_are_told_on_the_first_screen(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Transformer(ModelConfig.minimind3(hidden_size=16, num_hidden_layers=1, vocab_size=4000))
    model.initialise(0)
    export_minimind(model, tmp_path / "base.pth")
    found = {}
    settings = settings | {"model.weights": tmp_path / "base.pth", "data.own_chats": 0}
    text, train, val = (tmp_path / f"{name}.jsonl" for name in ("text", "train", "val"))
    for name, more in (
        ("plain", {}),
        ("chats as text", {"data.heldout_path": train, "data.train_path": val, "data.val_path": text}),
        ("chats to replay", {"data.pretrain_path": train, "data.replay_ratio": 0.5}),
        ("text as chats", {"data.train_path": text, "data.heldout_path": "null", "data.own_documents": 4}),
    ):
        options = ["--overwrite", "--data.max_overlap=1", "--model.hidden_size=null", "--model.num_hidden_layers=null"]
        assert run("fit", settings | more, *options) == 0
        found[name] = capsys.readouterr().out
    assert "2,560 tokens, where the model has 4,000: is data.tokenizer the base's own?" in found["plain"]
    assert "not text" not in found["plain"] and "plain text" not in found["plain"]
    assert "data.heldout_path: 12 of 12 are chats, not text: what is called forgotten" in found["chats as text"]
    assert "are chats, not text: what is held on to is then how to chat" in found["chats to replay"]
    assert "data.train_path: all of it is plain text, without a turn" in found["text as chats"]
    assert "data.val_path: all of it is plain text, without a turn" in found["chats as text"]


def test_answers_that_say_nothing_are_told_on_the_first_screen(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    silent = chats(3, first=12).replace("Hello there.", "").splitlines(keepends=True)
    settings["data.train_path"].write_text(chats(12) + "".join(silent), encoding="utf-8")
    assert run("fit", settings) == 0
    said = capsys.readouterr().out
    assert "empty answers" in said and "3 chats with 3 answers that say nothing, learned as such; the first: " in said
    settings["data.train_path"].write_text(chats(12) + silent[0], encoding="utf-8")
    assert run("fit", settings, "--overwrite") == 0
    assert f"1 chat with an answer that says nothing, learned as such; the first: {settings['data.train_path']}:13" in (
        capsys.readouterr().out
    )
    settings["data.train_path"].write_text(chats(12), encoding="utf-8")
    assert run("fit", settings, "--overwrite") == 0
    assert "empty answers" not in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "better"), [(1e-2, True), (1.0, False)])
def test_a_run_that_only_got_worse_says_so(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float, better: bool
) -> None:
    model = Transformer(ModelConfig.minimind3(hidden_size=16, num_hidden_layers=1, vocab_size=2560))
    model.initialise(0)
    export_minimind(model, tmp_path / "base.pth")
    val = GOOD if better else GOOD.replace("Hello there", "No, not me")
    settings["data.val_path"].write_text(val, encoding="utf-8")
    more = {"model.weights": tmp_path / "base.pth", "data.own_chats": 0, "model.learning_rate": rate}
    assert run("fit", settings | more, "--model.hidden_size=null", "--model.num_hidden_layers=null") == 0
    assert ("never learned better than the base knew them" in capsys.readouterr().out) is not better


def test_an_interrupt_before_training_is_told_and_is_130(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: SFTModule) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTModule, "on_fit_start", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run("fit", settings) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning's end of it ignores the next one
    assert capsys.readouterr().err.endswith("minimind_sft: interrupted\n")


@pytest.mark.parametrize(("width", "peak"), [(16, 1e-3), (1024, 5e-4)])
def test_the_peak_of_the_learning_rate_may_follow_from_the_width(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], width: int, peak: float
) -> None:
    changed = settings | {"model.hidden_size": width, "trainer.max_steps": 1, "model.min_lr_ratio": 1.0}
    assert run("fit", changed, "--model.learning_rate=auto") == 0
    assert f"{peak:g} at its peak, for {width:,} channels" in capsys.readouterr().out
    (row,) = [row for row in read_metrics(settings["run_dir"] / "metrics.csv") if "lr" in row]
    assert row["lr"] == pytest.approx(peak)


@pytest.mark.parametrize("name", ["max_steps", "max_epochs"])
def test_a_run_of_no_step_is_refused(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert f"trainer.{name} is 0, which trains nothing" in refused(capsys, "fit", settings | {f"trainer.{name}": 0})


def test_a_run_directory_with_checkpoints_is_not_written_over(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings) == 0
    said = refused(capsys, "fit", settings)
    assert "--ckpt_path last" in said and "--overwrite" in said
    assert run("fit", settings, "--overwrite") == 0


def test_a_missing_checkpoint_is_an_error_for_last_and_a_fresh_start_for_auto(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no" in refused(capsys, "fit", settings, "--ckpt_path=last")
    folder = PROJECT / "data"
    assert f"{folder} is a folder; name a file" in refused(capsys, "validate", settings, f"--ckpt_path={folder}")
    assert run("fit", settings, "--ckpt_path=auto") == 0


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "pickle"])
def test_a_checkpoint_is_told_by_its_content(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, archive: bool
) -> None:
    weights, foreign = {"w": torch.ones(2)}, tmp_path / "foreign.ckpt"
    for content in (weights, {"state_dict": weights, "pytorch-lightning_version": "2.6.0", "global_step": 3}):
        torch.save(content, foreign, _use_new_zipfile_serialization=archive)
        said = refused(capsys, verb, settings, f"--ckpt_path={foreign}")
        assert "foreign.ckpt is no checkpoint that minimind_sft wrote" in said and "as model.weights" in said


def test_a_checkpoint_may_have_any_name(settings: dict[str, Any], tmp_path: Path) -> None:
    assert run("fit", settings) == 0
    kept = tmp_path / "kept.pth"
    (Path(settings["run_dir"]) / "checkpoints" / "last.ckpt").rename(kept)
    assert run("validate", settings, f"--ckpt_path={kept}") == 0


def test_a_bound_or_a_patience_needs_something_to_go_by(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"data.heldout_path": "null", "data.own_documents": 0}
    said = refused(capsys, "fit", settings, "--model.max_forgetting=0.02")
    assert "model.max_forgetting is 0.02, but no text is measured on; set data.heldout_path" in said
    said = refused(capsys, "fit", settings, "--data.val_path=null", "--data.own_chats=0", "--patience=2")
    assert "patience is 2, but nothing is measured on" in said


def test_a_resumed_run_refuses_other_data(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", settings) == 0
    said = refused(capsys, "fit", settings | {"data.seed": 7}, "--ckpt_path=last")
    assert "seed was 42, is 7" in said


def test_a_damaged_checkpoint_is_named_with_the_whole_ones_beside_it(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", settings) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.unlink()  # it may be a link to best.ckpt
    last.write_bytes(whole[: len(whole) // 2])
    said = refused(capsys, "fit", settings, "--ckpt_path=last")
    assert "last.ckpt cannot be read" in said and "best.ckpt" in said.split("Whole ones")[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data.max_m": "4"}, "data.max_mb"),
        ({"data.batchsize": "4"}, "data.batch_size"),
        ({"data.batch_size": "many"}, "data.batch_size"),
        ({"trainer.val_check_interval": "10"}, "val_every_steps"),
        ({"trainer.limit_train_batches": "3"}, "trainer.max_steps"),
        ({"trainer.precision": "16"}, "use precision"),
        ({"device": "cuda:99"}, "--device cpu"),
        ({"device": "gpu"}, "cuda:7"),
        ({"model.weights": "nowhere.pth"}, "nowhere.pth"),
        ({"data.train_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data.tokenizer": "configs"}, "tokenizer.json"),
        ({"data.max_mb": "0.00001"}, "Raise max_mb"),
        ({"data.max_ratio": "0.001", "data.pretrain_path": "null"}, "data.pretrain_mb"),
        ({"model.weights": f"{PROJECT}/data/sft_val.jsonl"}, "is data, not weights: chats go to data.train_path"),
        ({"data.train_path": f"{PROJECT}/data/base.pth"}, "base.pth is an archive, as files of weights are"),
        ({"model.warmup_ratio": "2"}, "model.warmup_ratio"),
        ({"val_every_steps": "0"}, "val_every_steps"),
        ({"data.max_length": "1"}, "data.max_length"),
        ({"data.document_format": "odd"}, "minimind3"),
        ({"config": "nowhere.yaml"}, "sft.yaml"),
        ({"data.max_mb": "lots"}, "data.max_mb is 'lots'; it takes a number or null"),
        ({"model.learning_rate": "fast"}, "model.learning_rate is 'fast'; it takes a number or 'auto'"),
        ({"model.replay_loss": "mse"}, "it takes 'kl' or 'ntp'"),
        ({"model.terms": "EWC"}, "model.terms is 'EWC'; it takes a list of classes, as in [{class_path:"),
        ({"model.terms": '[{"class_path": "nowhere.Term"}]'}, "nowhere.Term': No module named 'nowhere'"),
        ({"model.terms": EWC % '"much"'}, "weight is 'much'; it takes a number"),
        ({"model.terms": EWC % "-1"}, "error: the weight of ewc is -1"),
    ],
)
def test_mistakes_are_told_in_one_line_with_a_remedy(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], change: dict[str, str], says: str
) -> None:
    assert says in refused(capsys, "fit", settings | change)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("model:\n  replay_wieght: 1\n", "own.yaml: model.replay_wieght is not a setting. The nearest setting is "
         "model.replay_weight"),
        ("model:\n  replay_weight: 1\n bad: x\n", "--config own.yaml: while parsing a block mapping at line 1"),
        ("# nothing yet\n", "--config own.yaml holds no settings; settings are `key: value` lines"),
        ("- patience: 3\n", "--config own.yaml holds a list, beginning with {'patience': 3}; settings are"),
        ("patience\n", "--config own.yaml holds 'patience'; settings are"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_yaml_is_told_with_its_file(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    yaml: str, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(yaml, encoding="utf-8")
    Path("other.yaml").write_text("patience: null\n", encoding="utf-8")
    assert says in refused(capsys, "fit", settings, "--config=other.yaml", "--config=own.yaml")


def test_what_a_command_lacks_or_has_too_much_is_told(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "fit", {"config": "original.yaml"})
    assert "model.weights, data.train_path, data.tokenizer: not set" in said
    assert "--config sft.yaml --config original.yaml" in said
    assert "runs/sft: settings are given as --KEY VALUE" in refused(capsys, "validate", settings, "runs/sft")
    said = refused(capsys, "fit", settings, "--trainer.callbacks=EarlyStopping")
    assert "trainer.callbacks: the following arguments are required: monitor" in said


@pytest.mark.parametrize("verb", ["fit", "inspect"])
def test_a_cache_that_cannot_be_written_is_told(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    if verb == "inspect":
        settings = {name: value for name, value in settings.items() if name == "config" or name.startswith("data.")}
    said = refused(capsys, verb, settings | {"data.cache_dir": file / "cache"})
    assert f"cannot write the cache folder {file / 'cache'} (Not a directory); set data.cache_dir to another" in said


@pytest.mark.parametrize(("verb", "says"), [("validate", "Measure a model on"), ("predict", "Answer the validation")])
def test_help_of_a_verb_is_of_that_verb(verb: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert says in said and "checkpoint to load: last or best of run_dir, a file, or auto" in said
    assert "__main__" not in said and "hpc" not in said
    assert "--device DEVICE" in said and not any(f"[--{name}" in said for name in OF_FIT)
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = capsys.readouterr().out
    assert all(f"[--{name}" in said for name in OF_FIT)


def test_bad_lines_are_counted_up_to_the_bound_and_named_past_it(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats(3) + "{not json\n" + chats(8, 3), encoding="utf-8")
    changed = settings | {"data.train_path": bad}
    said = refused(capsys, "fit", changed)
    assert "1 of 12 lines cannot be used (1 not_json)" in said and f"{bad}:4" in said and "data.max_bad_ratio" in said
    assert run("fit", changed, "--data.max_bad_ratio=0.1") == 0
    assert "11 trained, 1 rejected: 1 not_json" in capsys.readouterr().out


def test_held_out_text_that_the_chats_contain_is_refused(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared_text = "Lima lies on the coast of the Pacific and was founded in the year 1535 by people who came by sea."
    row = {"conversations": [{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": shared_text}]}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": shared_text}) + "\n", encoding="utf-8")
    said = refused(capsys, "fit", settings)
    assert "50-character" in said and "text.jsonl:1" in said and "data.max_overlap" in said
    assert run("fit", settings, "--data.max_overlap=1.0") == 0


def test_a_config_is_found_among_the_shipped_ones_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimind_sft.settings import find_config

    monkeypatch.chdir(tmp_path)
    shipped = str(PROJECT / "configs" / "sft.yaml")
    assert find_config(["--config", "sft.yaml", "--x", "1"]) == ["--config", shipped, "--x", "1"]
    assert find_config(["--config=sft.yaml"]) == [f"--config={shipped}"]
    assert find_config(["-c", "sft.yaml"]) == ["-c", shipped]
    assert f"using {shipped}" in capsys.readouterr().out
    (tmp_path / "sft.yaml").touch()
    assert find_config(["--config", "sft.yaml"]) == ["--config", "sft.yaml"]


def test_wandb_without_a_login_is_told_in_one_line(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    assert "run `wandb login`, set WANDB_API_KEY, or pass --wandb offline" in refused(
        capsys, "fit", settings, "--wandb=online"
    )


def test_wandb_offline_writes_what_the_real_client_can_read_back(settings: dict[str, Any], tmp_path: Path) -> None:
    assert run("fit", settings, "--wandb=offline") == 0
    wandb.finish()
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while True:  # the client's other process writes on after `finish`; its last record says that it is done
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(log.read_bytes()[7:])]
        if any(record.WhichOneof("record_type") in ("exit", "final") for record in records):
            break
        assert time.monotonic() < deadline, [record.WhichOneof("record_type") for record in records]
        time.sleep(0.2)
    seen: dict[str, list[float]] = {}
    for record in records:
        for item in record.history.item:
            seen.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "lr", "val/chat/loss", "val/pretrain/loss"):
        assert seen[name] == [float(row[name]) for row in rows if row[name]], name


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB; a piece: checksum (4), length (2), type (1: whole, 4: last)."""
    position, record = 7, b""  # the first block begins before the 7 bytes that the client writes first
    while position - 7 + 7 <= len(log):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        start = position - 7
        size, kind = int.from_bytes(log[start + 4 : start + 6], "little"), log[start + 6]
        record += log[start + 7 : start + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "configs").glob("*.yaml")))
def test_every_shipped_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = name in ("original.yaml", "minimind2_2048x20.yaml")
    with pytest.raises(SystemExit) as end:
        main(["fit", *(["--config", "sft.yaml"] if overlay else []), "--config", name, "--print_config"])
    assert end.value.code == 0 and "train_path" in capsys.readouterr().out


def test_a_reader_who_has_seen_enough_hears_no_complaint() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "minimind_sft", "fit", "--config", "sft.yaml", "--plan"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=PROJECT, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
