"""The same training, however it is dealt; and the original's own training, step by step. Through `fit` itself."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_verb
from safetensors.torch import load_file

from minimind_sft.__main__ import main

PROJECT = Path(__file__).resolve().parents[1]
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2")


def fit(run_dir: Path, **settings: Any) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    """Run `fit`; the rows of its metrics and its final weights."""
    arguments = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    arguments += ["--data.own_documents=0", "--data.own_chats=0"]
    assert main(["fit", f"--run_dir={run_dir}", "--device=cpu", "--log_every_steps=1", *arguments]) == 0
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return rows, {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """43 of the demo's chats: windows of 16, 16 and 11."""
    folder = tmp_path_factory.mktemp("equivalence")
    lines = (PROJECT / "data" / "sft_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:43]), encoding="utf-8")
    return {
        "model__weights": "scratch",
        "model__hidden_size": 32,
        "model__num_hidden_layers": 2,
        "data__train_path": folder / "train.jsonl",
        "data__tokenizer": PROJECT / "data" / "tokenizer",
        "data__cache_dir": folder / "cache",
        "trainer__max_epochs": 7,
    }


@pytest.fixture(scope="module")
def reference(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("reference"), **tiny, data__batch_size=16, trainer__accumulate_grad_batches=1)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 4), (1, 16)])
def test_how_a_window_is_dealt_does_not_change_the_run(
    tiny: dict[str, Any], reference: Any, tmp_path: Path, batch_size: int, accumulate: int
) -> None:
    rows, weights = fit(tmp_path, **tiny, data__batch_size=batch_size, trainer__accumulate_grad_batches=accumulate)
    assert len(rows) == len(reference[0]) == 22  # step 0, and 21 steps
    for row, expected in zip(rows[1:], reference[0][1:], strict=True):
        assert row["lr"] == expected["lr"]
        assert float(row["train/loss"]) == pytest.approx(float(expected["train/loss"]), rel=2e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, reference[1][name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_two_processes_train_as_one(tiny: dict[str, Any], reference: Any, tmp_path: Path) -> None:
    settings = {
        **tiny,
        "data__batch_size": 4,
        "trainer__accumulate_grad_batches": 2,
        "log_every_steps": 1,
        "run_dir": tmp_path / "run",
    }
    arguments = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    done = run_verb("fit", [*arguments, *TWO], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 21/21") == 1  # one log
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows[1:], reference[0][1:], strict=True):
        assert float(row["train/loss"]) == pytest.approx(float(expected["train/loss"]), rel=2e-6)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        torch.testing.assert_close(tensor, reference[1][name.removeprefix("model.")], rtol=1e-4, atol=2e-5)


THEIRS = """\
import os, signal
from lightning.pytorch.callbacks import Callback
from minimind_sft import identity

class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)

class OtherData(Callback):
    def setup(self, trainer, *_, **__):
        known = identity.of_training
        identity.of_training = lambda data: known(data) | {"sample": trainer.global_rank}

class FullDisk(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.is_global_zero:
            raise OSError(28, "No space left on device")
"""


@pytest.mark.parametrize(
    ("callback", "status", "said"),
    [
        ("Stop", 143, "stopped after step 3; go on with the same command and --ckpt_path last"),
        ("OtherData", 2, "the processes of this run have different data (sample)"),
        ("FullDisk", 2, "No space left on device"),
    ],
)
def test_two_processes_end_together(
    tiny: dict[str, Any], tmp_path: Path, callback: str, status: int, said: str
) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS, encoding="utf-8")
    settings = {**tiny, "data__batch_size": 8, "run_dir": tmp_path / "run", "save_every_steps": 1000}
    arguments = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    arguments += [f'--trainer.callbacks=[{{"class_path": "theirs.{callback}"}}]', "--data.own_documents=0"]
    done = run_verb("fit", [*arguments, "--data.own_chats=0", "--device=cpu", *TWO], tmp_path)
    assert done.returncode == status and said in done.stdout + done.stderr, done.stdout + done.stderr
    if callback == "Stop":
        saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 3


@pytest.mark.parametrize("prompts", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_answer_as_one(tiny: dict[str, Any], tmp_path: Path, prompts: int) -> None:
    lines = (PROJECT / "data" / "sft_val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "val.jsonl").write_text("".join(lines[:prompts]), encoding="utf-8")
    arguments = [f"--{name.replace('__', '.')}={value}" for name, value in tiny.items() if name.startswith("data__")]
    arguments += ["--model.weights=" + str(PROJECT / "data" / "base.pth"), f"--data.val_path={tmp_path / 'val.jsonl'}"]
    arguments += ["--device=cpu", "--data.batch_size=2"]
    assert main(["predict", *arguments, f"--run_dir={tmp_path / 'one'}"]) == 0
    done = run_verb("predict", [*arguments, f"--run_dir={tmp_path / 'two'}", *TWO], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [(tmp_path / name / "predictions.jsonl").read_text(encoding="utf-8") for name in ("one", "two")]
    assert answers[0] == answers[1] and answers[0].count("\n") == prompts


@pytest.mark.parametrize(
    ("launcher", "first"),
    [
        ({}, True),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),  # torchrun, second node
        ({"LOCAL_RANK": "1"}, False),  # Lightning's own
    ],
)
def test_the_first_process_is_known_by_any_launcher(launcher: dict[str, str], first: bool) -> None:
    code = "from minimind_sft.rundir import is_rank_zero; print(is_rank_zero())"
    clean = {name: value for name, value in os.environ.items() if not re.match("RANK|LOCAL_RANK|SLURM", name)}
    environment = clean | launcher | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == str(first)


@pytest.mark.slow
def test_a_rank_does_not_wait_for_one_that_failed(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\n", encoding="utf-8")
    settings = {**tiny, "data__train_path": tmp_path / "bad.jsonl", "run_dir": tmp_path / "run"}
    arguments = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items()]
    done = run_verb("fit", [*arguments, *TWO], tmp_path)
    assert done.returncode != 0 and "cannot be used (1 not_json)" in done.stderr


def test_experts_train_alike_however_a_window_is_dealt(shared: Path, tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **{name: value for name, value in tiny.items() if name.startswith("data__") or name.startswith("trainer__")},
        "model__weights": shared / "golden" / "minimind3_moe" / "weights.pth",
        "data__tokenizer": shared / "minimind_tokenizer",
        "trainer__max_epochs": 2,
    }
    one, _ = fit(tmp_path / "one", **settings, data__batch_size=16)
    many, _ = fit(tmp_path / "many", **settings, data__batch_size=2, trainer__accumulate_grad_batches=8)
    for row, expected in zip(many[1:], one[1:], strict=True):
        assert float(row["train/loss"]) == pytest.approx(float(expected["train/loss"]), rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-3)
    other, _ = fit(tmp_path / "other", **settings, data__batch_size=16, model__aux_scope="batch")
    assert float(other[1]["grad_norm"]) != pytest.approx(float(one[1]["grad_norm"]), rel=1e-9)


def test_the_order_of_an_epoch_does_matter(tiny: dict[str, Any], reference: Any, tmp_path: Path) -> None:
    rows, _ = fit(tmp_path, **tiny, data__batch_size=16, data__shuffle=False)
    assert float(rows[1]["train/loss"]) != pytest.approx(float(reference[0][1]["train/loss"]), rel=1e-4)


@pytest.mark.parametrize(("variant", "decay"), [("adamw_wd0.01_all", 0.01), ("adamw_wd0", 0.0)])
def test_fit_follows_the_originals_training(shared: Path, tmp_path: Path, variant: str, decay: float) -> None:
    golden = json.loads((shared / "golden" / "trajectory_minimind3.json").read_text(encoding="utf-8"))
    lines = (shared / "golden" / "chats_minimind3.jsonl").read_text(encoding="utf-8").splitlines()
    with open(tmp_path / "chats.jsonl", "w", encoding="utf-8") as file:
        for number in golden["chats"]:
            file.write(json.dumps({"conversations": json.loads(lines[number])["conversations"]}) + "\n")
    rows, weights = fit(
        tmp_path / "run",
        model__weights=shared / "golden" / "minimind3_dense" / "weights.pth",
        model__weight_decay=decay,
        model__decay_all="true",
        data__train_path=tmp_path / "chats.jsonl",
        data__tokenizer=shared / "minimind_tokenizer",
        data__cache_dir=tmp_path / "cache",
        data__max_mb="null",
        data__max_length=4096,
        data__batch_size=golden["batch_size"],
        data__shuffle="false",
        data__empty_think_ratio=1.0,
        trainer__max_epochs=golden["epochs"],
    )
    expected = golden[variant]
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == len(expected["losses"]) == 12
    for row, loss, rate, norm in zip(
        steps, expected["losses"], expected["learning_rates"], expected["grad_norms"], strict=True
    ):
        assert float(row["train/loss"]) == pytest.approx(loss, abs=1e-4)
        assert float(row["lr"]) == pytest.approx(rate, rel=1e-9)
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-3)
    if decay:
        final = load_file(shared / "golden" / "trajectory_minimind3_final_weights.safetensors")
        for name, tensor in final.items():
            torch.testing.assert_close(weights[name], tensor.float(), rtol=0, atol=5e-4)
