"""Options of `model` through `fit`: activation checkpointing, a larger vocabulary, constants left open by weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind_sft.__main__ import main
from minimind_sft.chat import ChatTemplate
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig, from_sizes
from minimind_sft.weights import export_minimind, load, load_model

PROJECT = Path(__file__).resolve().parents[1]
TOKENIZER = PROJECT / "data" / "tokenizer"
CHAT = '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}\n'


@pytest.fixture(scope="module")
def vocab_size() -> int:
    return ChatTemplate.from_folder(TOKENIZER).vocab_size


def base(path: Path, vocab_size: int, **sizes: int) -> Path:
    model = Transformer(ModelConfig.minimind3(hidden_size=32, num_hidden_layers=3, vocab_size=vocab_size, **sizes))
    model.initialise(seed=1)
    export_minimind(model, path)
    return path


def fit(tmp_path: Path, run: str, weights: Path | str, *more: str, **model: Any) -> int:
    """Two steps of four chats."""
    chats = "".join(CHAT.replace("Hi", f"Hi {number}") for number in range(8))
    (tmp_path / "train.jsonl").write_text(chats, encoding="utf-8")
    settings = {
        "model.weights": weights,
        "data.train_path": tmp_path / "train.jsonl",
        "data.tokenizer": TOKENIZER,
        "data.cache_dir": tmp_path / "cache",
        "data.batch_size": 4,
        "data.own_documents": 0,
        "data.own_chats": 0,
        "trainer.max_epochs": 1,
        "run_dir": tmp_path / run,
        "device": "cpu",
        "save_every_steps": 1,
    } | {f"model.{name}": value for name, value in model.items()}
    return main(["fit", *(f"--{name}={value}" for name, value in settings.items()), *more])


def weights_of(tmp_path: Path, run: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


# ---- activation checkpointing


@pytest.mark.parametrize("experts", [0, 3], ids=["dense", "moe"])
def test_activation_checkpointing_saves_less_and_trains_alike_to_the_bit(
    tmp_path: Path, vocab_size: int, experts: int
) -> None:
    weights = base(tmp_path / "base.pth", vocab_size, num_experts=experts)
    saved = {}
    for on in (False, True):
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            assert fit(tmp_path, f"run_{on}", weights, activation_checkpointing=on) == 0
        saved[on] = sum(kept)
    assert saved[True] < saved[False] / 2
    plain, again = (weights_of(tmp_path, f"run_{on}") for on in (False, True))
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    assert not torch.equal(plain["model.norm.weight"], torch.ones(32))  # something was learned


# ---- a tokenizer larger than the vocabulary


@pytest.mark.parametrize("untied", [False, True])
def test_rows_for_new_tokens_start_as_the_mean_and_are_told(
    tmp_path: Path, vocab_size: int, untied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    old = vocab_size - 5
    weights = base(tmp_path / "base.pth", old)
    before = load_model(weights)[0].model.embed_tokens.weight
    settings = {"resize_vocab": True, "reset_head": untied, "learning_rate": 1e-12}
    assert fit(tmp_path, "run", weights, **settings) == 0
    tables = "embedding and output layer" if untied else "embedding"
    said = f"vocabulary {old} -> {vocab_size} (model.resize_vocab): each of the 5 new rows of the {tables} is the mean"
    assert said in capsys.readouterr().out
    after = weights_of(tmp_path, "run")
    embedding = after["model.embed_tokens.weight"]
    assert embedding.shape == (vocab_size, 32)
    torch.testing.assert_close(embedding[old:], before.mean(0).expand(5, -1), atol=1e-8, rtol=0)
    torch.testing.assert_close(embedding[:old], before, atol=1e-8, rtol=0)
    head = after["lm_head.weight"]
    torch.testing.assert_close(head[old:], head[:old].mean(0).expand(5, -1), atol=1e-8, rtol=0)
    assert torch.equal(head, embedding) is not untied


def test_without_the_option_a_larger_tokenizer_is_an_error_that_names_it(
    tmp_path: Path, vocab_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = base(tmp_path / "base.pth", vocab_size - 5)
    assert fit(tmp_path, "run", weights) == 2
    said = capsys.readouterr().err
    assert f"{vocab_size} tokens" in said and f"is {vocab_size - 5}" in said and "model.resize_vocab" in said


def test_a_resized_model_resumes_and_exports_at_its_size(tmp_path: Path, vocab_size: int) -> None:
    weights = base(tmp_path / "base.pth", vocab_size - 5)
    settings = {"resize_vocab": True, "min_lr_ratio": 1.0}  # the same rate for one step of one and one of two
    assert fit(tmp_path, "whole", weights, **settings) == 0
    assert fit(tmp_path, "run", weights, "--trainer.max_steps=1", **settings) == 0
    assert fit(tmp_path, "run", weights, "--ckpt_path=last", **settings) == 0
    whole, resumed = (weights_of(tmp_path, run)["model.embed_tokens.weight"] for run in ("whole", "run"))
    assert resumed.shape == (vocab_size, 32) and torch.equal(whole, resumed)
    for name in ("export/last_32.pth", "checkpoints/last.ckpt"):
        assert load(tmp_path / "run" / name).config.vocab_size == vocab_size
    assert fit(tmp_path, "next", tmp_path / "run" / "export" / "last_32.pth") == 0  # needs no resizing


# ---- constants


def test_sizes_alone_take_the_constants_that_are_given() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": None}
    plain = from_sizes(None, sizes)
    assert (plain.family, plain.vocab_size, plain.rope_theta, plain.rope_scaling) == ("minimind3", 6400, 1e6, None)
    config = from_sizes("minimind2", sizes, rope_theta=1e4, rms_norm_eps=1e-4, inference_rope_scaling=True)
    assert (config.family, config.rope_theta, config.rms_norm_eps) == ("minimind2", 1e4, 1e-4)
    assert config.rope_scaling is not None and config.rope_scaling["factor"] == 16
    with pytest.raises(ValueError, match="model.family is 'qwen3'; .* minimind3 or minimind2"):
        from_sizes("qwen3", sizes)


def test_the_first_screen_tells_the_constants_taken_and_a_key_changes_them(
    tmp_path: Path, vocab_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = base(tmp_path / "base.pth", vocab_size)
    assert fit(tmp_path, "plain", weights) == 0
    first = capsys.readouterr().out
    for key in ("model.rms_norm_eps", "model.rope_theta", "model.inference_rope_scaling"):
        assert key in first
    given = {"rope_theta": 1e4, "rms_norm_eps": 1e-3, "inference_rope_scaling": True}
    assert fit(tmp_path, "given", weights, **given) == 0
    assert "RoPE scaling yarn" in capsys.readouterr().out
    config = load(tmp_path / "given" / "checkpoints" / "last.ckpt").config
    assert (config.rope_theta, config.rms_norm_eps) == (1e4, 1e-3) and config.rope_scaling is not None


def test_a_run_does_not_resume_as_another_model(
    tmp_path: Path, vocab_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = base(tmp_path / "base.pth", vocab_size)
    assert fit(tmp_path, "run", weights, "--trainer.max_steps=1") == 0
    assert fit(tmp_path, "run", weights, "--ckpt_path=last", rope_theta=1e4) == 2
    assert "rope_theta was 1000000.0, is 10000.0" in capsys.readouterr().err
    assert fit(tmp_path, "run", weights, "--ckpt_path=last") == 0
