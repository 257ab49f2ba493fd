"""What the base writes itself: text to measure on and to replay, and chats of a chat model."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_sft.__main__ import main
from minimind_sft.chat import ChatTemplate
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.self_written import Author, lines
from minimind_sft.weights import export_minimind, load_model

PROJECT = Path(__file__).resolve().parents[1]
DATA = PROJECT / "data"
TEMPLATE = ChatTemplate.from_folder(DATA / "tokenizer")
START, END = 1, 2  # <|im_start|> and <|im_end|>


def a_model(**heads: float) -> Transformer:
    """Layers that add nothing, so that a token alone decides on the next: every token is followed by `<|im_end|>` with
    the logit `ends`, and that by a newline with the logit `newline`."""
    config = ModelConfig.minimind3(vocab_size=2560, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=False)
    model = Transformer(config)
    model.initialise(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name or "embed" in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[END] = torch.eye(16)[1]
        model.lm_head.weight[END, 0] = heads.get("ends", 0.0) / 4  # the norm makes 4 of 1
        model.lm_head.weight[TEMPLATE.encode_text("\n")[0], 1] = heads.get("newline", 0.0) / 4
    return model


def author(cache: Path, model: Transformer | None = None, *, seed: int = 0, max_length: int = 16) -> Author:
    return Author(
        cache=cache,
        model=a_model() if model is None else model,
        template=TEMPLATE,
        base_sha256="0" * 64,
        max_length=max_length,
        seed=seed,
        device=torch.device("cpu"),
    )


def contents(store: Any) -> list[list[int]]:
    return [store.document(number)[0].tolist() for number in range(len(store))]


# ---- the author


def test_texts_are_written_once_by_the_seed_and_open_as_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = author(tmp_path / "a").texts("measured", documents=70, document_format="minimind3")
    assert "the base wrote text to measure on: 70 documents" in capsys.readouterr().out
    assert len(first) == 70 and all(ids[0] == START and 2 <= len(ids) <= 16 for ids in contents(first))
    assert all(first.document(n)[1].tolist() == [0] + [1] * (len(ids) - 1) for n, ids in enumerate(contents(first)))
    author(tmp_path / "a").texts("measured", documents=70, document_format="minimind3")
    assert capsys.readouterr().out == ""  # from the cache
    again = author(tmp_path / "b").texts("measured", documents=70, document_format="minimind3")
    other = author(tmp_path / "b", seed=1).texts("measured", documents=70, document_format="minimind3")
    assert contents(again) == contents(first) != contents(other)
    assert (
        contents(author(tmp_path / "b").texts("measured", documents=3, document_format="minimind3"))
        == (contents(first)[:3])
    )


def test_text_of_a_model_that_computes_otherwise_is_not_taken_from_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = a_model()
    author(tmp_path, model).texts("measured", documents=3, document_format="minimind3")
    model.config = replace(model.config, rope_theta=1e4)  # as a `.pth` leaves open
    capsys.readouterr()
    author(tmp_path, model).texts("measured", documents=3, document_format="minimind3")
    assert "the base wrote text to measure on" in capsys.readouterr().out


def test_what_is_measured_on_is_not_replayed(tmp_path: Path) -> None:
    writer = author(tmp_path, max_length=2)  # two tokens, so that many documents are equal
    measured = writer.texts("measured", documents=500, document_format="minimind3")
    free = writer.texts("replay", documents=500, document_format="minimind3")
    replay = writer.texts("replay", documents=500, document_format="minimind3", apart_from=measured)
    known = set(measured.hashes.tolist())
    assert known & set(free.hashes.tolist()) and len(replay)
    assert contents(replay) == [ids for ids in contents(free) if ids not in contents(measured)]


def test_a_document_of_control_tokens_alone_is_left_out(tmp_path: Path) -> None:
    model = a_model(ends=6.0)
    with torch.no_grad():  # nothing is said but <|im_start|>, and now and then a word
        model.lm_head.weight[START, 0] = 7.0 / 4
    store = author(tmp_path, model).texts("measured", documents=100, document_format="minimind3")
    assert 0 < len(store) < 100
    assert all(json.loads(line.text)["text"].strip() for line in lines(store, TEMPLATE, document_format="minimind3"))


def test_a_document_without_text_is_left_out(tmp_path: Path) -> None:
    writer = author(tmp_path, a_model(ends=6.0))  # one document in seven ends at once
    store = writer.texts("measured", documents=100, document_format="minimind3")
    assert 50 < len(store) < 95 and all(len(ids) > 2 for ids in contents(store))
    assert all(json.loads(line.text)["text"].strip() for line in lines(store, TEMPLATE, document_format="minimind3"))


def test_writing_ends_at_the_tokens_asked_for(tmp_path: Path) -> None:
    store = author(tmp_path).texts("replay", documents=500, tokens=1500, document_format="minimind3")
    assert 128 <= len(store) < 500 and 1500 <= len(store.ids) < 1500 + 64 * 16


def test_a_base_that_never_ends_does_not_write_for_hours(tmp_path: Path) -> None:
    store = author(tmp_path, max_length=100_000).texts("measured", documents=4, document_format="minimind3")
    assert max(len(ids) for ids in contents(store)) == 512


def test_a_chat_is_written_from_the_users_header_on_and_only_the_answer_counts(tmp_path: Path) -> None:
    store = author(tmp_path, max_length=40).chats(5)
    assert store is not None and len(store) == 5
    for number, ids in enumerate(contents(store)):
        supervised = store.document(number)[1] != 0
        asked, answer = TEMPLATE.decode(ids[: int(supervised.argmax())]), ids[int(supervised.argmax()) :]
        assert asked.startswith("<|im_start|>user\n") and asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert supervised[-len(answer) :].all() and len(answer) <= 20
    assert author(tmp_path).chats(0) is None


@pytest.mark.parametrize(
    ("heads", "told"),
    [({"ends": 20.0, "newline": 20.0}, True), ({"ends": 20.0}, False), ({"newline": 20.0}, False)],
)
def test_a_chat_model_is_told_by_its_ends_of_turns(tmp_path: Path, heads: dict[str, float], told: bool) -> None:
    chats = author(tmp_path, a_model(**heads), max_length=40).chats("auto")
    assert (chats is not None and len(chats) == 64) if told else chats is None


def test_a_base_that_does_not_know_the_templates_tokens_writes_no_chats(tmp_path: Path) -> None:
    small = Transformer(ModelConfig.minimind3(vocab_size=2, hidden_size=16, num_hidden_layers=1))
    small.initialise(0)
    assert author(tmp_path, small).chats("auto") is None
    with pytest.raises(ValueError, match="it does not know the token .* Set data.own_chats to 0"):
        author(tmp_path, small).chats(3)


def test_a_tokenizer_without_an_opening_token_is_told_with_the_remedy(tmp_path: Path) -> None:
    small = Transformer(ModelConfig.minimind3(vocab_size=1, hidden_size=16, num_hidden_layers=1))
    small.initialise(0)
    with pytest.raises(ValueError, match="Give its pretraining text .pretrain_path."):
        author(tmp_path, small).texts("measured", documents=1, document_format="minimind3")


def test_texts_read_as_the_lines_of_a_file_without_markers(tmp_path: Path) -> None:
    store = author(tmp_path).texts("measured", documents=3, document_format="minimind3")
    for line, ids in zip(lines(store, TEMPLATE, document_format="minimind3"), contents(store), strict=True):
        text = json.loads(line.text)["text"]
        assert line.file == "the base" and "<|im_" not in text
        assert text == TEMPLATE.decode([id for id in ids if id not in TEMPLATE.control_ids])


# ---- through `fit`


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def fit(run_dir: Path, cache: Path, *more: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Metrics and summary of a run that is given chats and no text."""
    arguments = [
        f"--run_dir={run_dir}", "--device=cpu", "--log_every_steps=1", "--val_every_steps=2", "--export=none",
        f"--model.weights={DATA}/base.pth", f"--data.train_path={DATA}/sft_train.jsonl", "--data.max_rows=48",
        f"--data.tokenizer={DATA}/tokenizer", f"--data.cache_dir={cache}", "--data.own_documents=12",
        "--data.batch_size=16", "--data.max_length=48", "--trainer.max_steps=2", "--model.learning_rate=2e-3", *more,
    ]  # fmt: skip
    assert main(["fit", *arguments]) == 0
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file)), json.loads((run_dir / "forgetting.json").read_text())


def test_without_text_the_base_writes_both_what_is_measured_and_what_is_replayed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, figures = fit(tmp_path / "run", cache, "--data.replay_ratio=0.5")
    assert (figures["text"], figures["seen"]) == ("self-written", None)
    assert float(rows[-1]["val/forgetting"]) == figures["forgetting"] > 0
    assert float(rows[-1]["train/replay"]) > 0
    said = capsys.readouterr().out
    assert "12 documents, self-written by the base" in said and "tokens of text by the base a step" in said
    assert "text (self-written), nats per token" in said
    assert "chats to keep" in said and "the base is no chat model" in said
    assert main(["validate", *(f"--{k}={v}" for k, v in {
        "run_dir": tmp_path / "run", "model.weights": DATA / "base.pth", "data.tokenizer": DATA / "tokenizer",
        "data.train_path": DATA / "sft_train.jsonl", "data.cache_dir": cache, "data.own_documents": 12,
        "data.max_length": 48, "device": "cpu", "ckpt_path": "last"}.items())]) == 0  # fmt: skip
    assert str(figures["after"]["pretrain_loss"])[:7] in capsys.readouterr().out  # the same documents


def test_measuring_on_own_text_can_be_turned_off(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, figures = fit(tmp_path / "run", cache, "--data.own_documents=0", "--data.own_chats=0")
    assert figures["forgetting"] is figures["text"] is None and rows[-1]["val/forgetting"] == ""
    assert "forgetting       not measured: set data.heldout_path" in capsys.readouterr().out


def test_own_chats_are_measured_beside_the_text(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data.own_chats=8", f"--data.pretrain_path={DATA}/pretrain.jsonl", "--data.measure_documents=12"]
    rows, figures = fit(tmp_path / "run", cache, *more)
    assert figures["text"] == "seen"
    losses = [float(row["val/own_chats/loss"]) for row in (rows[0], rows[-1])]
    assert float(rows[0]["val/own_chats/forgetting"]) == 0.0 and losses[0] == figures["before"]["own_chat_loss"]
    assert float(rows[-1]["val/own_chats/forgetting"]) == pytest.approx(losses[1] - losses[0])
    assert figures["own_chats_forgetting"] == pytest.approx(losses[1] - losses[0]) and losses[1] != losses[0]
    said = capsys.readouterr().out
    assert "8 documents, self-written by the base" in said and "forgotten of its own chats" in said


def test_a_base_with_a_new_head_writes_and_is_measured_with_its_own(cache: Path, tmp_path: Path) -> None:
    _, plain = fit(tmp_path / "plain", cache)
    _, reset = fit(tmp_path / "reset", tmp_path / "other", "--model.reset_head=true")
    assert reset["before"]["pretrain_loss"] == pytest.approx(plain["before"]["pretrain_loss"], rel=1e-6)
    assert plain["before"]["pretrain_loss"] < 2 < 3 < reset["forgetting"]  # what its random weights do not know
    stores = [{p.read_bytes() for p in folder.glob("*/ids.bin")} for folder in (cache, tmp_path / "other")]
    assert stores[1] <= stores[0]  # the same text and chats


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--data.own_documents=-1", "data.own_documents is -1"),
        ("--data.own_chats=-1", "data.own_chats is -1"),
        ("--data.own_chats=some", "own_chats"),
    ],
)
def test_a_number_below_0_is_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    with pytest.raises(AssertionError):
        fit(tmp_path / "run", cache, option)
    assert said in capsys.readouterr().err


# ---- through `compare`


def compare(out: Path, tuned: Path, *more: str) -> tuple[int, dict[str, Any]]:
    words = ["compare", DATA / "base.pth", tuned, "--tokenizer", DATA / "tokenizer", "--out", out, "--device", "cpu"]
    status = main([str(word) for word in [*words, "--cache_dir", out / "cache", "--max_length", "48", *more]])
    return status, json.loads((out / "compare.json").read_text()) if (out / "compare.json").is_file() else {}


def test_two_models_without_text_are_judged_on_what_the_first_one_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind_sft.comparison_plots.draw", lambda *_: [])
    status, found = compare(tmp_path, DATA / "base.pth", "--own_documents=6")
    text = found["text"]["self-written"]
    assert status == 0 and found["judged"] == "self-written" and "own_chats" not in found
    assert text["documents"] == 6 and text["difference"] == 0.0 and text["before"] > 0
    other, _ = load_model(DATA / "base.pth")
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.zero_()
    export_minimind(other, tmp_path / "other.pth")
    status, found = compare(tmp_path, tmp_path / "other.pth", "--own_documents=6", "--own_chats=3")
    assert status == 3 and found["text"]["self-written"]["difference"] > 3
    assert found["own_chats"]["documents"] == 3 and found["own_chats"]["difference"] > 1
    said = capsys.readouterr().out
    assert "the base's own chats, nats per token" in said and "of self-written text" in said
    assert "no text was given, so the base wrote" in said


def test_what_no_text_can_be_measured_by_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        (["--own_documents=0"], "nothing to measure on"),
        (["--pretrain_log=log.csv"], "--pretrain_log needs text like the log's"),
        (["--own_documents=0", f"--val_path={DATA}/sft_val.jsonl", "--max_forgetting=1"], "--max_forgetting needs te"),
        (["--own_chats=-1"], "-1 is not a whole number from 0"),
    ):
        assert compare(tmp_path, DATA / "base.pth", *more)[0] == 2
        assert said in capsys.readouterr().err
