"""Numbers that no run can mean are refused, by name, before anything loads."""

import math
from pathlib import Path

import pytest

from minimind_sft.__main__ import main
from minimind_sft.ranges import RANGES, check_ranges


@pytest.mark.parametrize("key", RANGES)
def test_both_ends_of_a_range_are_in_it_and_nothing_beyond_or_without_size(key: str) -> None:
    section, name = key.split(".")
    low, high, what = RANGES[key]
    for value in (low, high, None, "auto"):
        check_ranges(section, **{name: value})
    for value in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{key} is .*; it is ") as error:
            check_ranges(section, **{name: value})
        assert str(error.value).endswith(what)


@pytest.mark.parametrize(
    "wrong",
    [
        "model.learning_rate=.inf",
        "model.warmup_ratio=1",
        "model.min_lr_ratio=1.5",
        "model.weight_decay=-0.1",
        "model.l2_sp=-1",
        "model.rope_theta=0",
        "model.rms_norm_eps=.inf",
        "model.max_forgetting=-0.02",
        "data.val_fraction=1",
        "data.system_ratio=2",
        "data.empty_think_ratio=-0.1",
        "data.max_bad_ratio=-1",
        "data.max_overlap=7",
        "data.pretrain_mb=-1",
        "data.replay_ratio=1e9",
        "data.replay_in_chat=2",
        "data.seed=-1",
        "data.max_length=1",
        "trainer.gradient_clip_val=-1",
        "trainer.accumulate_grad_batches=0",
    ],
)
def test_fit_asks(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = wrong.split("=")[0]
    assert key in RANGES
    assert main(["fit", "--config", "sft.yaml", f"--run_dir={tmp_path / 'run'}", "--device=cpu", f"--{wrong}"]) == 2
    said = capsys.readouterr().err
    assert f"error: {key} is " in said and RANGES[key].what in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--model.weight_decay=1e6", "model.weight_decay is 1e+06, which at a learning rate of 0.001 would take the"),
        ("--model.l2_sp=1000", "model.l2_sp is 1000, which at a learning rate of 0.001 would take the whole way"),
        ("--model.num_experts_per_tok=2", "base.pth has no experts; leave it out"),
        ("--trainer.gradient_clip_algorithm=foo", "trainer.gradient_clip_algorithm is 'foo'; choose norm or value"),
        ("--trainer.min_steps=5", "trainer.min_steps is not offered here; use trainer.max_steps"),
        ("--trainer.accelerator=gpu", "has no GPU that this PyTorch can use; leave it out, or set it to cpu"),
    ],
)
def test_and_of_what_depends_on_more(
    wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["fit", "--config", "sft.yaml", f"--run_dir={tmp_path / 'run'}", "--data.max_rows=40", wrong]
    assert main([*arguments, "--trainer.max_steps=1"]) == 2
    assert said in capsys.readouterr().err
