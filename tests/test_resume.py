"""A run that was killed and resumed is the run that was not, bit for bit; through the command line."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from minimind_sft.fit_process import run_fit
from minimind_sft.resume import set_progress

PROJECT = Path(__file__).resolve().parents[1]
SLOW = pytest.mark.slow
WINDOWS, STEPS = 6, 18  # 47 chats in windows of 4 x 2: five whole ones and a short one; 3 epochs


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model on a few of the demo's chats."""
    folder = tmp_path_factory.mktemp("resume")
    for name, source, count in (("train", "sft_train", 47), ("val", "sft_val", 5), ("text", "heldout", 5)):
        lines = (PROJECT / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    values = {
        "model.weights": "scratch",
        "model.hidden_size": 32,
        "model.num_hidden_layers": 1,
        "data.tokenizer": PROJECT / "data" / "tokenizer",
        "data.train_path": folder / "train.jsonl",
        "data.val_path": folder / "val.jsonl",
        "data.heldout_path": folder / "text.jsonl",
        "data.cache_dir": folder / "cache",
        "data.max_overlap": 1.0,
        "data.batch_size": 4,
        "trainer.accumulate_grad_batches": 2,
        "device": "cpu",
        "log_every_steps": 1,
        "val_every_steps": 4,
        "save_every_steps": 3,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def start(settings: list[str], run_dir: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minimind_sft", "fit", *settings, f"--run_dir={run_dir}", *more]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=run_dir.parent, env=environment
    )


def finish(settings: list[str], run_dir: Path, *more: str) -> str:
    process = start(settings, run_dir, *more)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in csv.DictReader(file)
        ]


def last_step(run_dir: Path) -> int:
    """The last step in the metrics of a run that is going on; -1 before the first."""
    if not (run_dir / "metrics.csv").is_file():
        return -1
    return max((int(row["step"]) for row in rows(run_dir) if row.get("step")), default=-1)  # it may be half written


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(settings, run_dir)
    return run_dir


def test_every_step_is_logged_once(whole: Path) -> None:
    assert [int(row["step"]) for row in rows(whole)] == list(range(STEPS + 1))
    measured = [int(row["step"]) for row in rows(whole) if row["val/chat/loss"]]
    assert measured == [0, 4, 8, 12, 16, 18]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# in mid-epoch; exactly at an epoch's end (step 6); past the short window; the last step but one
@pytest.mark.parametrize("stop_after", [3, pytest.param(6, marks=SLOW), 9, pytest.param(15, marks=SLOW)])
def test_killed_and_resumed_equals_uninterrupted(
    settings: list[str], whole: Path, tmp_path: Path, stop_after: int
) -> None:
    run_dir = tmp_path / "run"
    process = start(settings, run_dir)
    deadline = time.monotonic() + 120
    while last_step(run_dir) < stop_after:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)
    while not (run_dir / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = checkpoint(run_dir)["global_step"]
    output = finish(settings, run_dir, "--ckpt_path=auto")
    if step == STEPS:
        pytest.skip("the run was over before it could be killed")
    assert f"after step {step}" in output and step > 0
    assert f"step {step}/" not in output and f"step {step + 1}/{STEPS}" in output
    assert rows(run_dir) == rows(whole)
    resumed, uninterrupted = checkpoint(run_dir), checkpoint(whole)
    assert same(resumed["state_dict"], uninterrupted["state_dict"])
    assert same(resumed["optimizer_states"], uninterrupted["optimizer_states"])
    assert same(resumed["callbacks"]["Measure"], uninterrupted["callbacks"]["Measure"])


@pytest.mark.parametrize(("number", "status"), [pytest.param(signal.SIGTERM, 143, marks=SLOW), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_window_saves_and_says_so(
    settings: list[str], whole: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    run_dir = tmp_path / "run"
    process = start(settings, run_dir, "--save_every_steps=1000")
    while last_step(run_dir) < 1:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    step = checkpoint(run_dir)["global_step"]
    if step == STEPS:
        pytest.skip("the run was over before it could be stopped")
    assert process.returncode == status
    assert f"stopped after step {step}; go on with the same command and --ckpt_path last" in output
    assert rows(run_dir) == rows(whole)[: step + 1]
    finish(settings, run_dir, "--ckpt_path=last")
    assert rows(run_dir) == rows(whole)
    assert same(checkpoint(run_dir)["state_dict"], checkpoint(whole)["state_dict"])


def test_ctrl_c_saves_though_it_ended_who_read_the_output(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(settings, run_dir, "--save_every_steps=1000")
    assert process.stdout is not None
    while last_step(run_dir) < 1:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.stdout.close()  # as `| tee`, which is told as well
    assert process.wait(timeout=60) in (130, 0)  # 0: the run was over before
    assert checkpoint(run_dir)["global_step"] >= 1


def test_an_interrupted_verb_waits_until_its_run_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    child.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.3)\n    print('saved', flush=True)\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('epoch 1', flush=True)\ntime.sleep(60)\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit([], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "epoch 1\nsaved\n"


def test_a_run_killed_behind_its_first_look_goes_on_from_there(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    run_dir, never = tmp_path / "run", "--save_every_steps=1000"
    process = start(settings, run_dir, never)
    while not (run_dir / "checkpoints" / "best.ckpt").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = checkpoint(run_dir)["global_step"]
    assert step in (4, 8)
    assert f"after step {step}" in finish(settings, run_dir, never, "--ckpt_path=auto")
    assert rows(run_dir) == rows(whole)


def test_the_rest_of_an_epoch_is_trained_once_when_the_batch_split_changes(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    finish(settings, tmp_path / "first", "--keep_every_steps=8")  # step 8 is in the second epoch
    other = ["--data.batch_size=1", "--trainer.accumulate_grad_batches=8"]
    kept = tmp_path / "first" / "checkpoints" / "step-000008.ckpt"
    output = finish(settings, tmp_path / "second", f"--ckpt_path={kept}", *other)
    assert "trainer.accumulate_grad_batches 2 -> 8" in output
    rest, expected = rows(tmp_path / "second"), rows(whole)[9:]
    assert [row["step"] for row in rest] == [row["step"] for row in expected]
    for row, same_step in zip(rest, expected, strict=True):
        assert row["lr"] == same_step["lr"]
        assert float(row["train/loss"]) == pytest.approx(float(same_step["train/loss"]), rel=2e-6)


@SLOW
def test_more_epochs_may_be_asked_for(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finish(settings, run_dir, "--trainer.max_epochs=1")
    finish(settings, run_dir, "--ckpt_path=auto", "--trainer.max_epochs=2", "--model.learning_rate=1e-5")
    table = rows(run_dir)
    assert [int(row["step"]) for row in table] == list(range(2 * WINDOWS + 1))
    assert float(table[-1]["lr"]) == pytest.approx(1e-6)  # the command line's, not the checkpoint's


def test_another_window_is_refused_with_the_difference(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finish(settings, run_dir, "--trainer.max_epochs=1")
    process = start(settings, run_dir, "--ckpt_path=last", "--data.batch_size=3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "window_size was 8, is 6" in output


@SLOW
def test_kills_at_random_moments_leave_the_same_run(settings: list[str], tmp_path: Path) -> None:
    """In tokenizing, in a look, in a window, in the writing of a checkpoint, wherever it falls; `KILLS` of them."""
    run_dir, whole, chance, kills, reached = tmp_path / "run", tmp_path / "whole", random.Random(0), 0, set()
    settings = [*settings, "--save_every_steps=1", "--trainer.max_epochs=40"]
    started = time.monotonic()
    finish(settings, whole)
    took = time.monotonic() - started
    while kills < int(os.environ.get("KILLS", "20")):
        cold = f"--data.cache_dir={tmp_path / 'caches' / str(kills)}"
        process = start([*settings, cold], run_dir, "--ckpt_path=auto")
        try:
            process.wait(took * (0.5 + 0.5 * chance.random()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if (run_dir / "checkpoints" / "last.ckpt").is_file():
                reached.add(checkpoint(run_dir)["global_step"])
            continue
        assert process.returncode == 0, process.communicate()[0]
        check(run_dir, whole)
        for path in (run_dir / "checkpoints").glob("*.ckpt"):  # over before it could be killed: once more, from nothing
            path.unlink()
    finish(settings, run_dir, "--ckpt_path=auto")
    check(run_dir, whole)
    print(f"{kills} kills; checkpoints of the steps {sorted(reached)} were resumed from")
    assert len(reached) >= 3 and not list((run_dir / "checkpoints").glob("*.tmp"))


def check(run_dir: Path, whole: Path) -> None:
    """The same metrics, weights and moments as the run that was never killed."""
    assert rows(run_dir) == rows(whole)
    for name in ("state_dict", "optimizer_states"):
        assert same(checkpoint(run_dir)[name], checkpoint(whole)[name])


def test_after_the_end_nothing_more_is_trained(settings: list[str], whole: Path) -> None:
    before = rows(whole)
    half = whole / "checkpoints" / ".last.ckpt.123.tmp"
    half.write_bytes(b"what a kill left")
    assert "already" in finish(settings, whole, "--ckpt_path=last")
    assert rows(whole) == before and not half.exists()


@SLOW
def test_a_run_that_was_killed_behind_its_last_step_gets_its_ending(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for name in ("forgetting.json", "answers.json"):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "export")
    said = finish(settings, run_dir, "--ckpt_path=last")
    assert "nothing to train" in said and "before step" not in said  # no text is read for it
    assert (run_dir / "forgetting.json").read_text() == (whole / "forgetting.json").read_text()
    assert {path.name for path in (run_dir / "export").iterdir()} == {
        path.name for path in (whole / "export").iterdir()
    }
    (run_dir / "forgetting.json").write_text("{}")
    finish(settings, run_dir, "--ckpt_path=last")
    assert (run_dir / "forgetting.json").read_text() == "{}"  # it had one


class StopAtTheEnd(Callback):
    """A signal in the last step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_last_step_does_not_take_the_ending(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    told = finish(settings, run_dir, "--trainer.callbacks=test_resume.StopAtTheEnd")
    assert "SIGTERM" in told and "stopped after" not in told and (run_dir / "forgetting.json").is_file()


def test_files_may_move_between_a_run_and_its_resumption(settings: list[str], tmp_path: Path) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    finish(settings, run_dir, "--trainer.max_steps=3")
    moved.mkdir()
    there = []
    for setting in settings:
        name, value = setting.split("=", 1)
        if name in ("--data.train_path", "--data.val_path", "--data.heldout_path"):
            value = str(shutil.copy(value, moved))
        there.append(f"{name}={value}")
    assert "after step 3" in finish(there, run_dir, "--trainer.max_steps=5", "--ckpt_path=last")
    assert [int(row["step"]) for row in rows(run_dir)] == list(range(6))


def test_progress_is_derived_from_the_steps_alone() -> None:
    def loops() -> dict:
        counters = {"ready": 9, "completed": 8, "started": 9, "processed": 9}
        return {
            "fit_loop": {
                "epoch_loop.batch_progress": {
                    "current": dict(counters),
                    "total": dict(counters),
                    "is_last_batch": True,
                },
                "epoch_progress": {"current": dict(counters), "total": dict(counters)},
            }
        }

    middle = {"global_step": 7, "loops": loops()}
    assert set_progress(middle, windows=5, accumulate=4) == 7
    assert middle["epoch"] == 1
    assert set(middle["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"].values()) == {8}
    assert middle["loops"]["fit_loop"]["epoch_progress"]["current"] == {
        "ready": 2,
        "started": 2,
        "processed": 1,
        "completed": 1,
    }

    end = {"global_step": 10, "loops": loops()}
    set_progress(end, windows=5, accumulate=4)
    assert set(end["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"].values()) == {0}
    assert end["loops"]["fit_loop"]["epoch_progress"]["current"] == {
        "ready": 2,
        "started": 2,
        "processed": 2,
        "completed": 2,
    }
