"""The line between a base and its fine-tune: literals, what is chosen, and the verb."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_sft.__main__ import main
from minimind_sft.comparison import compare
from minimind_sft.huggingface import export_hf
from minimind_sft.interpolation import Point, choose, interpolate
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.weights import export_minimind, load_model

PROJECT = Path(__file__).resolve().parents[1]


def model(seed: int, **sizes: Any) -> Transformer:
    made = Transformer(ModelConfig.minimind3(**{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1} | sizes))
    made.initialise(seed)
    return made


def test_a_quarter_of_the_way_but_for_control_tokens() -> None:
    base, tuned = model(0), model(1)
    there = interpolate(base, tuned, 0.25, [3])
    for name, weight in there.named_parameters():
        old, new = base.get_parameter(name), tuned.get_parameter(name)
        expected = 0.75 * old + 0.25 * new
        if name == "model.embed_tokens.weight":
            expected[3] = new[3]
        torch.testing.assert_close(weight, expected)
    assert there.lm_head.weight is there.model.embed_tokens.weight
    end = interpolate(base, tuned, 1.0, []).state_dict()
    assert all(torch.equal(end[name], tensor) for name, tensor in tuned.state_dict().items())


def test_models_of_two_shapes_have_no_line_between_them() -> None:
    with pytest.raises(ValueError, match=r"differ in shape \(model.layers.1"):
        interpolate(model(0), model(0, num_hidden_layers=2), 0.5, [])


@pytest.mark.parametrize(("tolerance", "alpha"), [(0.0, 1.0), (0.02, 0.6), (5.0, 0.0)])
def test_the_smallest_alpha_within_the_tolerance_is_chosen(tolerance: float, alpha: float) -> None:
    losses = {0.0: 5.0, 0.6: 3.015, 0.8: 3.01, 1.0: 3.0}
    assert choose([Point(a, loss, 0.0, None) for a, loss in losses.items()], tolerance).alpha == alpha


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The demo's base, and the same with noise, as if it had been tuned."""
    tuned, _ = load_model(PROJECT / "data" / "base.pth")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    export_minimind(tuned, tmp_path / "tuned.pth")
    data = PROJECT / "data"
    return [
        "interpolate", str(data / "base.pth"), str(tmp_path / "tuned.pth"), str(tmp_path / "held.pth"),
        f"--val_path={data}/sft_val.jsonl", f"--heldout_path={data}/heldout.jsonl", f"--tokenizer={data}/tokenizer",
        "--documents=20", f"--cache_dir={tmp_path}/cache", "--device=cpu", "--tolerance=100",
    ]  # fmt: skip


def test_the_verb_writes_the_chosen_model_its_curve_and_a_picture(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--alphas", "0.5"]) == 0
    record = json.loads((tmp_path / "held.pth.json").read_text(encoding="utf-8"))
    assert record["chosen"] == 0.5 and [point["alpha"] for point in record["points"]] == [0.5, 1.0]
    half, whole = (point["forgetting"] for point in record["points"])
    assert 0 < half < 0.5 * whole
    assert (tmp_path / "held.pth.png").stat().st_size > 5_000
    held, _ = load_model(tmp_path / "held.pth")
    base, tuned = (load_model(path)[0] for path in (PROJECT / "data" / "base.pth", tmp_path / "tuned.pth"))
    expected = 0.5 * (base.model.norm.weight + tuned.model.norm.weight)
    torch.testing.assert_close(held.model.norm.weight, expected, rtol=1e-3, atol=1e-3)  # fp16
    assert "chosen" in capsys.readouterr().out


def test_the_points_are_what_compare_says_of_their_models(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--alphas", "0.5"]) == 0
    points = json.loads((tmp_path / "held.pth.json").read_text(encoding="utf-8"))["points"]
    base, data = command[1], PROJECT / "data"
    found, _ = compare(
        base, command[2], tokenizer=f"{data}/tokenizer", heldout_path=f"{data}/heldout.jsonl",
        val_path=f"{data}/sft_val.jsonl", documents=20, prompts=0, cache_dir=f"{tmp_path}/cache", device="cpu",
    )  # fmt: skip
    text = found["text"]["unseen"]
    assert points[1]["forgetting"] == pytest.approx(text["difference"], abs=1e-6)
    assert points[1]["interval"] == pytest.approx(text["interval"], abs=1e-6)
    assert points[1]["chat_loss"] == pytest.approx(found["chats"]["after"], abs=1e-6)


def test_without_text_the_base_writes_some(command: list[str], tmp_path: Path) -> None:
    command = [word for word in command if not word.startswith("--heldout_path")]
    assert main([*command, "--own_documents=4", "--alphas", "0", "--max_length=64"]) == 0
    points = json.loads((tmp_path / "held.pth.json").read_text(encoding="utf-8"))["points"]
    assert points[0]["forgetting"] == pytest.approx(0.0, abs=0.2) and points[1]["forgetting"] > 0.3


def test_heads_that_tensors_do_not_tell_go_into_the_folder(command: list[str], tmp_path: Path) -> None:
    model = Transformer(ModelConfig.minimind2(hidden_size=64, num_hidden_layers=1, vocab_size=2560,
                                              num_attention_heads=16, num_key_value_heads=1))  # fmt: skip
    model.initialise(0)
    export_minimind(model, tmp_path / "old.pth")
    command[1:4] = [str(tmp_path / name) for name in ("old.pth", "old.pth", "held")]
    assert main([*command, "--alphas", "0.5", "--num_attention_heads=16"]) == 0
    assert json.loads((tmp_path / "held" / "config.json").read_text(encoding="utf-8"))["num_attention_heads"] == 16
    card = (tmp_path / "held" / "README.md").read_text(encoding="utf-8")
    assert "Base + 0.5 (fine-tune - base)" in card and "| made from |" in card and "What training cost" not in card


@pytest.mark.parametrize("order", ["as it should be", "swapped"])
def test_models_in_the_wrong_order_are_told(
    order: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, _ = load_model(PROJECT / "data" / "base.pth")
    with torch.no_grad():  # unsure of everything, which is worse on text and better on chats
        tuned.model.norm.weight.mul_(0.5)
    export_minimind(tuned, tmp_path / "tuned.pth")
    if order == "swapped":
        command[1:3] = command[2], command[1]
    for alphas in (["0", "0.5"], ["0.5"]):  # what is half-way, a fine-tune that went too far may be worse than
        assert main([*command, "--overwrite", "--alphas", *alphas]) == 0
        told = order == "swapped" and alphas[0] == "0"
        assert ("are the two in this order?" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alphas", "1.5"], "an alpha is from 0"),
        (["--heldout_path=", "--own_documents=0"], "give --heldout_path"),
        (["--tolerance=-1"], "0 or above"),
        (["--alpha", "1"], "did you mean --alphas"),
        (["--documents", "0"], "--documents: 0 is not a whole number from 1"),
        (["--seed", "-1"], "--seed: -1 is not a whole number from 0"),
        (["--max_length", "1"], "--max_length is 1"),
    ],
)
def test_mistakes_are_told(
    command: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    assert said in capsys.readouterr().err


def test_bad_lines_are_told_in_the_words_of_the_command(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (PROJECT / "data" / "sft_val.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "val.jsonl").write_text("\n".join([*lines, "{}"]) + "\n", encoding="utf-8")
    command = [*command, f"--val_path={tmp_path}/val.jsonl", "--alphas", "0.5"]
    assert main(command) == 2
    assert "--val_path: 1 of 9 lines cannot be used" in (said := capsys.readouterr().err) and "--max_bad_ratio" in said
    assert main([*command, "--max_bad_ratio=0.5"]) == 0


def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untied = model(0, vocab_size=2560, tie_word_embeddings=False)
    export_hf(untied, tmp_path / "untied", tokenizer=PROJECT / "data" / "tokenizer", card="")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    ours, base = [str(tmp_path / "untied")] * 2, command[1:3]
    for models, out, said in (
        (ours, "held.pth", "the output layer is untied"),
        (base, "notes", "notes is not an export"),
    ):
        command[1:4] = [*models, str(tmp_path / out)]
        assert main([*command, "--overwrite"]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and "alpha" not in printed.out
        assert not list(tmp_path.glob("*.json"))


def test_a_broken_fine_tune_is_told() -> None:
    with pytest.raises(ValueError, match="the chat loss of TUNED is nan: the fine-tune is broken"):
        choose([Point(0.5, 4.0, 0.0, None), Point(1.0, math.nan, 0.0, None)], 0.02)


@pytest.mark.parametrize("name", ["held.pth", "held.pth.json", "held.pth.png"])
def test_what_is_there_is_kept(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
