"""Steps that must not be taken, and runs that are asked to stop."""

import json
import os
import signal
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from minimind_sft.__main__ import main
from minimind_sft.checkpoints import AtomicCheckpointIO
from minimind_sft.cli import _slurm
from minimind_sft.fisher import RotatedAdamW
from minimind_sft.guard import MAX_OVERFLOWS, Guard, StepResult
from minimind_sft.measuring import Measure
from minimind_sft.module import SFTModule
from minimind_sft.readings import read_metrics
from minimind_sft.signals import StopRequest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    lines = (PROJECT / "data" / "sft_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    return {
        "model.weights": "scratch",
        "model.hidden_size": 16,
        "model.num_hidden_layers": 1,
        "data.train_path": tmp_path / "train.jsonl",
        "data.tokenizer": PROJECT / "data" / "tokenizer",
        "data.cache_dir": tmp_path / "cache",
        "data.batch_size": 8,
        "trainer.max_epochs": 2,
        "run_dir": tmp_path / "run",
        "device": "cpu",
        "log_every_steps": 1,
        "save_every_steps": 2,
    }


def fit(settings: dict[str, Any], *more: str) -> int:
    return main(["fit", *(f"--{name}={value}" for name, value in settings.items()), *more])


def weights(run_dir: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / name, weights_only=True)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the loss of the steps in the list (counted from 0) not a number."""
    steps: list[int] = []
    healthy = SFTModule.training_step

    def training_step(self: SFTModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = healthy(self, batch, batch_idx)
        factor = float("nan") if self.trainer.global_step in steps else 1.0
        self._window *= factor
        return loss * factor

    monkeypatch.setattr(SFTModule, "training_step", training_step)
    return steps


def test_a_step_that_is_not_finite_stops_before_the_weights_change(
    settings: dict[str, Any], tmp_path: Path, poisoned: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned.append(4)
    assert fit(settings) == 2
    said = capsys.readouterr().err
    assert "step 5: loss nan" in said and "train.jsonl:" in said and "on_nonfinite" in said
    row = json.loads((tmp_path / "run" / "nonfinite.jsonl").read_text())
    assert row["step"] == 5 and len(row["documents"]) == 8
    assert weights(tmp_path / "run")["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run")["state_dict"].values())


def test_a_skipped_step_changes_neither_weights_nor_moments(
    settings: dict[str, Any], tmp_path: Path, poisoned: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned.append(9)  # the last one
    assert fit(settings, "--on_nonfinite=skip", "--save_every_steps=9", "--keep_every_steps=9") == 0
    assert "step 10: loss nan" in capsys.readouterr().out
    before, after = weights(tmp_path / "run", "step-000009.ckpt"), weights(tmp_path / "run")
    assert (before["global_step"], after["global_step"]) == (9, 10)
    for name, tensor in before["state_dict"].items():
        assert torch.equal(tensor, after["state_dict"][name]), name
    for place, state in before["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg"], after["optimizer_states"][0]["state"][place]["exp_avg"])


def test_too_many_skipped_in_a_row_stop_the_run() -> None:
    guard, bad = Guard(on_nonfinite="skip", max_skipped=2), StepResult(1, float("nan"), 1.0, 0.1)
    good = StepResult(2, 1.0, 1.0, 0.1)
    assert [guard.takes(step, list) for step in (bad, bad, good, bad, bad)] == [False, False, True, False, False]
    with pytest.raises(ValueError, match="after 2 skipped in a row"):
        guard.takes(bad, list)


def test_an_infinite_gradient_is_left_to_a_gradient_scaler() -> None:
    step = StepResult(1, 1.0, float("inf"), 0.1)
    assert Guard().takes(step, list, scaled=True)
    with pytest.raises(ValueError, match="gradient norm inf"):
        Guard().takes(step, list)
    pulled = step._replace(terms={"replay": 0.1, "ekfac": float("nan")})  # it adds to gradients that were looked at
    with pytest.raises(ValueError, match="loss 1.0, ekfac nan, gradient norm inf"):
        Guard().takes(pulled, list, scaled=True)


def test_gradients_are_clipped_by_value_for_a_fused_optimizer_too(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stepped, largest = RotatedAdamW.__init__, RotatedAdamW.step, []

    def fused(self: RotatedAdamW, *args: Any, **more: Any) -> None:
        made(self, *args, **more | {"fused": True})

    def step(self: RotatedAdamW, closure: Any = None) -> Any:
        def noting() -> Any:
            loss = closure()
            largest.append(max(p.grad.abs().max().item() for group in self.param_groups for p in group["params"]))
            return loss

        return stepped(self, noting)

    monkeypatch.setattr(RotatedAdamW, "__init__", fused)
    monkeypatch.setattr(RotatedAdamW, "step", step)
    value = ("--trainer.gradient_clip_algorithm=value", "--trainer.gradient_clip_val=0.001")
    assert fit(settings, "--precision=bf16-mixed", "--trainer.max_steps=2", *value) == 0
    assert largest == [pytest.approx(0.001)] * 2


def test_a_gradient_that_overflows_at_any_scale_stops_the_run() -> None:
    guard, bad, good = Guard(), StepResult(1, 1.0, float("nan"), 0.1), StepResult(2, 1.0, 1.0, 0.1)
    for _ in range(MAX_OVERFLOWS):
        assert guard.takes(bad, list, scaled=True)
    assert guard.takes(good, list, scaled=True) and not guard.overflows
    for _ in range(MAX_OVERFLOWS):
        assert guard.takes(bad, list, scaled=True)
    with pytest.raises(ValueError, match="gradient norm nan"):
        guard.takes(bad, list, scaled=True)


def test_a_loss_that_jumps_is_noted_with_its_documents(tmp_path: Path) -> None:
    guard = Guard(folder=tmp_path, spike_ratio=2.0)
    for number in range(25):
        assert guard.takes(StepResult(number, 1.0, 1.0, 0.1), list)
    assert guard.takes(StepResult(26, 1.9, 1.0, 0.1), lambda: ["a:1"])
    assert not (tmp_path / "spikes.jsonl").exists()
    again = Guard(folder=tmp_path, spike_ratio=2.0)
    again.load_state_dict(guard.state_dict())  # a resumed run notes the same jumps
    assert again.takes(StepResult(27, 3.0, 1.0, 0.1), lambda: ["a:1", "b:2"])
    assert json.loads((tmp_path / "spikes.jsonl").read_text())["documents"] == ["a:1", "b:2"]
    Guard(spike_ratio=None).takes(StepResult(1, 1e9, 1.0, 0.1), list)
    with pytest.raises(ValueError, match="above 1"):
        Guard(spike_ratio=0.5)


def test_milestones_are_kept_beside_last_and_best(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(settings, "--keep_every_steps=4") == 0
    assert "last and best and 2 milestones of " in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-000004.ckpt", "step-000008.ckpt"]
    assert weights(tmp_path / "run", "step-000004.ckpt")["global_step"] == 4


def test_a_run_directory_in_use_is_refused(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimind_sft.rundir import prepare_run_dir

    with prepare_run_dir(tmp_path / "run", checkpoint=None, overwrite=False):
        assert fit(settings) == 2
        assert "another process is training in" in capsys.readouterr().err
    assert fit(settings) == 0


def test_an_infinite_gradient_is_seen_before_it_is_clipped_by_value(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimind_sft.module import SFTModule

    def explode(module: SFTModule) -> None:
        next(module.model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]

    monkeypatch.setattr(SFTModule, "on_after_backward", explode)
    assert fit(settings, "--trainer.gradient_clip_algorithm=value", "--trainer.gradient_clip_val=0.1") == 2
    assert "gradient norm inf" in capsys.readouterr().err


def test_validation_of_which_nothing_is_left_is_refused(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "long " * 800}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    assert fit(settings, f"--data.val_path={tmp_path / 'long.jsonl'}") == 2
    assert "none of the validation chats" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mistake",
    ["--data.train_path=nowhere.jsonl", "--model.learning_rate=0", "--model.freeze=zzz", "--data.max_tokens=10"],
)
def test_a_run_that_is_refused_replaces_nothing(mistake: str, settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit(settings) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit(settings, "--overwrite", mistake) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert fit(settings, "--overwrite") == 0
    assert (run / "checkpoints" / "last.ckpt").is_file() and not (run / ".earlier").exists()


def test_a_checkpoint_from_elsewhere_begins_another_run_than_the_one_in_the_folder(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert fit(settings, "--keep_every_steps=4") == fit(settings, f"--run_dir={other}") == 0
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    there = [f"--run_dir={other}", f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'step-000004.ckpt'}"]
    capsys.readouterr()
    assert fit(settings, *there) == 2
    assert "holds the checkpoints of a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    assert fit(settings, *there, "--overwrite") == 0
    assert [int(row["step"]) for row in read_metrics(other / "metrics.csv")][0] == 5


def test_files_that_are_no_runs_are_not_replaced(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "export" / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert fit(settings, *more) == 2
        assert "has export, but is no run's folder" in capsys.readouterr().err
    assert (run / "export" / "thesis.txt").read_text() == "mine"


def test_what_a_killed_start_set_aside_comes_back(settings: dict[str, Any], tmp_path: Path) -> None:
    from minimind_sft.rundir import EARLIER, OUR_FILES, prepare_run_dir

    run = tmp_path / "run"
    assert fit(settings) == 0
    last = (run / "checkpoints" / "last.ckpt").read_bytes()
    prepare_run_dir(run, checkpoint=None, overwrite=True).close()
    assert (run / EARLIER).is_dir() and not any((run / name).exists() for name in OUR_FILES)
    assert fit(settings) == 2  # as it would without the killed start
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == last


def test_what_was_set_aside_or_put_back_only_in_part_is_not_lost(settings: dict[str, Any], tmp_path: Path) -> None:
    from minimind_sft.rundir import EARLIER

    run = tmp_path / "run"
    assert fit(settings) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / EARLIER).mkdir()
    for name in ("checkpoints", "metrics.csv"):
        (run / name).rename(run / EARLIER / name)
    assert fit(settings) == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_is_refused_leaves_no_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    assert fit(settings, "--data.train_path=nowhere.jsonl") == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert fit(settings, "--data.train_path=nowhere.jsonl") == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_disk_that_cannot_hold_the_run_is_refused_at_the_start(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=1000)
    monkeypatch.setattr("minimind_sft.checkpoints.shutil.disk_usage", lambda path: usage)
    assert fit(settings) == 2
    assert "GB free" in capsys.readouterr().err


def test_checkpoints_that_are_there_do_not_need_room_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(settings | {"trainer.max_steps": 2}) == 0
    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size
    usage = SimpleNamespace(total=10**9, used=10**9, free=2.5 * size)  # of three one is there: last and best are linked
    monkeypatch.setattr("minimind_sft.checkpoints.shutil.disk_usage", lambda path: usage)
    assert fit(settings | {"trainer.max_steps": 3, "ckpt_path": "last"}) == 0


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)
    whole = path.read_bytes()

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left on device.*earlier checkpoints are whole"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_slurms_signal_puts_the_job_back_into_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    request = StopRequest()
    request.received = signal.SIGTERM
    request.requeue()
    assert not (tmp_path / "called").exists()
    request.received = signal.SIGUSR1
    request.requeue()
    assert (tmp_path / "called").read_text() == "requeue 77\n"
    assert request.exit_status == 138


def test_under_slurm_only_we_put_the_job_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _slurm([]) == []
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    (found,) = _slurm([])
    assert not found.auto_requeue
    assert _slurm([LightningEnvironment()]) == []


def test_a_signal_during_the_look_at_the_base_ends_the_first_step_and_saves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = Measure._look_at_base

    def told(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return look(*arguments)

    monkeypatch.setattr(Measure, "_look_at_base", told)
    with pytest.raises(SystemExit) as ended:
        fit(settings)
    assert ended.value.code == 143
    assert "stopped after step 1; go on" in capsys.readouterr().out


def test_nothing_is_written_outside_the_run_and_cache_folders(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    assert fit(settings) == 0
    assert list((tmp_path / "empty").iterdir()) == []


def test_of_several_processes_one_speaks_and_what_is_written_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = StepResult(step=3, loss=float("nan"), grad_norm=float("inf"), learning_rate=1e-3, terms={"replay": 0.5})
    for speaks in (True, False):
        folder = tmp_path if speaks else None
        guard = Guard(folder=folder, on_nonfinite="skip", spike_ratio=2.0, speaks=speaks)
        assert not guard.takes(step, lambda: ["a.jsonl:1"])
        for loss in [*[1.0] * 30, 9.0]:
            assert guard.takes(step._replace(loss=loss, grad_norm=1.0), lambda: ["a.jsonl:2"])
        said = capsys.readouterr().out
        assert ("skipped (1 in a row)" in said and "times its running mean" in said) is speaks
        assert bool(said) is speaks

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (row,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    found = json.loads(row, parse_constant=refuse)
    assert found["loss"] is None and found["grad_norm"] is None and found["terms"] == {"replay": 0.5}
