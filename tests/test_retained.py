"""The share of pretraining that is left."""

from pathlib import Path

import pytest

from minimind_sft.retained import LossLog, Retained, load_log, retained


def log(*points: tuple[float, float]) -> LossLog:
    return LossLog([at for at, _ in points], [loss for _, loss in points], "tokens", "val_nll")


FALLING = log((10, 5.0), (20, 4.0), (40, 3.0), (100, 2.0))


@pytest.mark.parametrize(
    ("forgetting", "share", "at_most"),
    [
        (0.0, 1.0, False),
        (-0.1, 1.0, False),
        (0.5, 0.7, False),  # half way between 40 and 100
        (1.0, 0.4, False),
        (2.9, 0.11, False),
        (3.0, 0.1, True),  # as bad as the first point of the log
        (9.0, 0.1, True),
        (float("nan"), 0.0, True),
    ],
)
def test_the_log_is_read_backwards_to_the_loss_after_tuning(forgetting: float, share: float, at_most: bool) -> None:
    assert retained(FALLING, forgetting) == Retained(pytest.approx(share), at_most)


def test_a_loss_that_rose_in_between_does_not_count() -> None:
    bumpy = log((10, 5.0), (20, 3.0), (30, 4.0), (40, 2.0))
    assert retained(bumpy, 0.5).share == pytest.approx(35 / 40)  # the running minimum is 3 at 30
    assert retained(bumpy, 1.0).share == pytest.approx(20 / 40)


def test_what_came_after_the_best_loss_counts_for_nothing() -> None:
    overfit = log((10, 5.0), (20, 3.0), (50, 4.0))
    assert retained(overfit, 0.0).share == 1.0
    assert retained(overfit, 1e-6).share == pytest.approx(1.0)
    assert retained(overfit, 1.0).share == pytest.approx(15 / 20)


def test_logs_are_csv_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/pretrain/loss\n0,,6.5\n1,6,\n2,5.5,5\n\n3,5.2,nan\n")
    assert load_log(tmp_path / "metrics.csv") == LossLog([0, 2], [6.5, 5.0], "step", "val/pretrain/loss")
    (tmp_path / "no_text.csv").write_text("step,train/loss,val/pretrain/loss\n1,6,\n2,5.5,\n")  # which was not given
    assert load_log(tmp_path / "no_text.csv") == LossLog([1, 2], [6.0, 5.5], "step", "train/loss")
    (tmp_path / "bom.csv").write_text("\ufeffstep,loss\n1,6.5\n2,5.0,more\n", encoding="utf-8")  # as Excel writes it
    assert load_log(tmp_path / "bom.csv") == LossLog([1, 2], [6.5, 5.0], "step", "loss")
    (tmp_path / "log.jsonl").write_text(
        '{"step": 2, "tokens": 20, "val_nll": 4.0}\n\n{"step": 1, "tokens": 10, "val_nll": 5.0}\n{"final": true}\n'
    )
    assert load_log(tmp_path / "log.jsonl") == LossLog([10, 20], [5.0, 4.0], "tokens", "val_nll")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "it has a, b"),
        ("", "it has none"),
        ("epoch 1, step 2\nepoch 1, step 3, loss 4\n", "needs a column"),
        ("step,loss\n1,2\n", "1 rows have step and loss; 2 are needed"),
        ('{"step": 1}\nno\n', r"log:2: not a JSON object"),
        ("step,loss\n0,2\n1,3\n", "its lowest loss is at step 0"),
    ],
)
def test_a_log_that_is_none_is_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "log").write_text(content)
    with pytest.raises(ValueError, match=said):
        load_log(tmp_path / "log")


def test_the_real_bases_log(shared: Path) -> None:
    real = load_log(shared / "base" / "pretrain_log.jsonl")
    assert (real.unit, real.name, len(real.losses)) == ("tokens", "val_nll", 10)
    # 4.470546 was logged at 8,710,526 of 11,391,431 tokens
    assert retained(real, 4.470546124388124 - 4.366144299394996).share == pytest.approx(8_710_526 / 11_391_431)
