"""The verb `compare`, on the demo's base: against itself, against a damaged copy, in every format."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_sft import comparison_plots
from minimind_sft.__main__ import main
from minimind_sft.comparison_plots import draw
from minimind_sft.huggingface import export_hf
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.weights import export_minimind, load_model

PROJECT = Path(__file__).resolve().parents[1]
DATA = PROJECT / "data"
BASE = DATA / "base.pth"


@pytest.fixture(autouse=True)
def _draw_only_where_pictures_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "of_itself" not in request.node.name:  # half of the time of a small comparison
        monkeypatch.setattr(comparison_plots, "draw", lambda *_: [])


def first_lines(name: str, count: int, folder: Path, *, every: int = 1) -> Path:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / name).write_text("".join(lines[: count * every : every]), encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A little of everything, and a damaged copy of the base."""
    folder = tmp_path_factory.mktemp("compare")
    model, _ = load_model(BASE)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    export_minimind(model, folder / "tuned.pth")
    return {
        "tuned": folder / "tuned.pth",
        "heldout": first_lines("heldout.jsonl", 24, folder),
        "val": first_lines("sft_val.jsonl", 12, folder),
        "probes": first_lines("probes.jsonl", 12, folder, every=20),
        "cache": folder / "cache",
    }


def compare(material: dict[str, Path], out: Path, base: Path, tuned: Path, *more: str, data: str = "text") -> int:
    """Run the verb, by default on text only."""
    paths = {"text": ["--heldout_path", material["heldout"]], "chats": ["--val_path", material["val"]], "none": []}
    words = ["compare", base, tuned, "--out", out, "--cache_dir", material["cache"], "--device", "cpu"]
    if "--tokenizer" not in more and tuned.is_file():
        words += ["--tokenizer", DATA / "tokenizer"]
    return main([str(word) for word in [*words, *paths[data], *more]])


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "compare.json").read_text(encoding="utf-8")))


def test_a_model_has_forgotten_nothing_of_itself(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--val_path", str(material["val"]), "--probes", str(material["probes"]), "--answer_tokens", "16"]
    (tmp_path / "log.csv").write_text("step,loss\n1,4.0\n2,3.0\n")
    assert compare(material, tmp_path, BASE, BASE, *more, "--pretrain_log", str(tmp_path / "log.csv")) == 0
    found = read(tmp_path)
    text = found["text"]["unseen"]
    assert (text["difference"], text["interval"], text["kl"], text["agreement"]) == (0.0, [0.0, 0.0], 0.0, 1.0)
    assert text["bits_per_byte"]["difference"] == 0.0 and text["worst"] == []
    assert (text["documents"], found["chats"]["documents"], found["answers"]["prompts"]) == (24, 12, 12)
    assert found["chats"]["difference"] == 0.0 and found["chats"]["before"] > 5
    assert found["answers"]["before"] == found["answers"]["after"]
    assert found["facts"]["lost"] == found["facts"]["gained"] == []
    assert sum(group["kept"] for group in found["facts"]["groups"].values()) > 0
    assert {group["p_value"] for group in found["facts"]["groups"].values()} == {1.0}
    assert found["retained"]["share"] == 1.0
    asked = found["continuations"]  # the base in the chat template, as BASE and as TUNED
    assert asked["documents"] > 0 and asked["base_in_chat"]["loss"] == pytest.approx(asked["after"], rel=1e-6)
    assert asked["base_in_chat"]["difference"] == pytest.approx(asked["difference"], abs=1e-6) != 0.0
    assert {row["source"] for row in text["by_source"]} == {
        json.loads(line)["source"] for line in material["heldout"].read_text(encoding="utf-8").splitlines()
    }
    said = capsys.readouterr().out
    assert "within the limit of 0.02 (--max_forgetting)" in said
    assert f"so asked, the base itself is at {asked['after']:.4f}, {asked['difference']:+.4f}" in said
    for name in ("sources.png", "documents.png", "facts.png", "documents.jsonl"):
        assert (tmp_path / name).stat().st_size > 1000, name


def test_a_model_that_forgot_is_told_with_exit_status_3(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(material, tmp_path, BASE, material["tuned"], "--probes", str(material["probes"])) == 3
    found = read(tmp_path)
    text, verdict = found["text"]["unseen"], found["verdict"]
    assert verdict["exceeded"] and verdict["forgetting"] == text["difference"] > 0.02
    assert text["interval"][0] < text["difference"] < text["interval"][1]
    assert text["kl"] > 0 and text["agreement"] < 1
    worst = [row["difference"] for row in text["worst"]]
    assert len(worst) == 10 and worst == sorted(worst, reverse=True)
    documents = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(documents) == 24 and max(row["difference"] for row in documents) == worst[0]
    total = sum(row["difference"] * row["tokens"] for row in documents) / sum(row["tokens"] for row in documents)
    assert total == pytest.approx(text["difference"], rel=1e-9)
    said = capsys.readouterr().out
    assert "more than the limit of 0.02 (--max_forgetting)" in said
    assert f"lost, raw text: {found['facts']['lost'][0]['name']}" in said
    assert compare(material, tmp_path, BASE, material["tuned"], f"--max_forgetting={text['difference']}") == 0


def test_pictures_can_be_drawn_without_a_limit_and_of_a_broken_model(tmp_path: Path) -> None:
    row = {"where": "a:1", "source": "s", "documents": 1, "before": 1.0, "difference": 0.1, "interval": None}
    for text in (row, row | {"difference": math.nan}):
        result = {
            "judged": "seen",
            "text": {"seen": text | {"by_source": [text], "worst": [text]}},
            "verdict": {"max_forgetting": math.inf},
        }
        (tmp_path / "facts.png").touch()  # of an earlier comparison
        assert draw(result, [text], tmp_path) == ["sources.png", "documents.png"]
        assert not (tmp_path / "facts.png").exists()


def test_names_in_pictures_may_hold_anything(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    names = ["wiki_$lang_$year", "新闻", "n" * 320, "_under", ""]
    rows = [
        {"where": f"$a_$b_百科.jsonl:{n}", "source": name, "documents": 1, "before": 1.0, "difference": 0.1 * n,
         "interval": [0.0, 0.2]}
        for n, name in enumerate(names)
    ]  # fmt: skip
    text = rows[1] | {"by_source": rows, "worst": rows}
    result = {"judged": "seen", "text": {"seen": text}, "verdict": {"max_forgetting": 0.02}}
    assert draw(result, rows, tmp_path) == ["sources.png", "documents.png"]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_the_verdict_is_said_before_the_pictures_are_drawn(
    material: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> list[str]:
        raise ValueError("no fonts")

    monkeypatch.setattr(comparison_plots, "draw", broken)
    assert compare(material, tmp_path, BASE, material["tuned"]) == 2
    assert "more than the limit of 0.02" in capsys.readouterr().out


def test_a_broken_document_is_the_worst(material: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load_model(BASE)
    with torch.no_grad():  # finite, but not what comes out
        for projection in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            projection.weight.mul_(1e25)
    export_hf(model, tmp_path / "tuned", tokenizer=DATA / "tokenizer", card="")
    assert compare(material, tmp_path / "out", BASE, tmp_path / "tuned") == 3
    text = read(tmp_path / "out")["text"]["unseen"]
    assert text["perplexity"]["after"] is None and len(text["worst"]) == 10


def test_a_limit_within_the_interval_is_told(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(material, tmp_path, BASE, material["tuned"])
    low = read(tmp_path)["text"]["unseen"]["interval"][0]
    capsys.readouterr()
    assert compare(material, tmp_path, BASE, material["tuned"], f"--max_forgetting={low + 1e-6}") == 3
    assert "the limit lies within the interval: the point estimate decides" in capsys.readouterr().out


def test_checkpoints_and_folders_of_other_tools_are_taken(material: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load_model(BASE)
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"model_config": asdict(model.config)},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    export_hf(model, tmp_path / "hf", tokenizer=DATA / "tokenizer", card="")
    for number, (base, tuned) in enumerate([(BASE, tmp_path / "last.ckpt"), (tmp_path / "last.ckpt", tmp_path / "hf")]):
        out = tmp_path / str(number)
        assert compare(material, out, base, tuned) == 0  # the folder brings its tokenizer
        assert read(out)["text"]["unseen"]["difference"] == 0.0


def test_the_figures_are_those_of_fit_and_its_checkpoint_is_taken(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model.weights": BASE,
        "model.learning_rate": 0.001,
        "data.train_path": DATA / "sft_train.jsonl",
        "data.max_mb": 0.01,
        "data.max_length": 64,  # which compare takes from the run, as what follows
        "data.document_format": "bare",
        "data.too_long": "truncate_left",
        "data.supervise": "last",
        "data.empty_think_ratio": 1,
        "data.seed": 7,
        "data.val_path": material["val"],
        "data.heldout_path": material["heldout"],
        "data.max_overlap": 1.0,
        "data.tokenizer": DATA / "tokenizer",
        "data.cache_dir": material["cache"],
        "trainer.max_epochs": 2,
        "run_dir": tmp_path / "run",
        "device": "cpu",
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    fit = json.loads((tmp_path / "run" / "forgetting.json").read_text(encoding="utf-8"))
    more = ["--val_path", str(material["val"]), "--answer_tokens=1"]
    compare(material, tmp_path / "out", BASE, tmp_path / "run" / "checkpoints" / "last.ckpt", *more)
    found = read(tmp_path / "out")
    text, chats = found["text"]["unseen"], found["chats"]
    assert text["difference"] == pytest.approx(fit["forgetting"], abs=1e-6) and fit["forgetting"] > 1e-3
    for when in ("before", "after"):
        assert text[when] == pytest.approx(fit[when]["pretrain_loss"], rel=1e-6)
        assert text["bits_per_byte"][when] == pytest.approx(fit[when]["bits_per_byte"], rel=1e-6)
        assert chats[when] == pytest.approx(fit[when]["chat_loss"], rel=1e-6)
    told = [(row["source"], row["documents"], row["forgetting"]) for row in fit["by_source"]]
    assert len(told) > 2
    for row, (source, documents, forgetting) in zip(text["by_source"], told, strict=True):
        assert (row["source"], row["documents"]) == (source, documents)
        assert row["difference"] == pytest.approx(forgetting, abs=1e-6)
    told = {name: found[name] for name in ("too_long", "supervise", "empty_think_ratio", "seed")}
    assert told == {"too_long": "truncate_left", "supervise": "last", "empty_think_ratio": 1.0, "seed": 7}
    answers = json.loads((tmp_path / "run" / "answers.json").read_text(encoding="utf-8"))
    assert len(answers) == 3 and all(row["question"] and row["before"] != row["after"] for row in answers)
    assert found["notes"] == []
    for base, tuned, note in (
        (material["tuned"], tmp_path / "run", "TUNED's run did not begin from these weights"),
        (tmp_path / "run", tmp_path / "run" / "export" / "last", None),
    ):
        words = ["compare", base, tuned, "--heldout_path", material["heldout"], "--out", tmp_path / "out"]
        assert main([*map(str, words), "--own_chats=0"]) in (0, 3)  # the run tells which tokenizer
        notes = read(tmp_path / "out")["notes"]
        assert [noted.startswith(note) for noted in notes] == [True] if note else not notes
    capsys.readouterr()
    assert compare(material, tmp_path / "out", tmp_path / "run", BASE) == 2
    assert "was trained from TUNED" in capsys.readouterr().err


def test_what_a_base_s_file_leaves_open_is_as_in_the_config_of_its_fine_tune(
    material: dict[str, Path], tmp_path: Path
) -> None:
    model, _ = load_model(BASE)
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"model_config": asdict(replace(model.config, rope_theta=1e4))},
    }
    torch.save(checkpoint, tmp_path / "tuned.ckpt")
    for base, tuned in ((BASE, tmp_path / "tuned.ckpt"), (tmp_path / "tuned.ckpt", BASE)):
        compare(material, tmp_path / "out", base, tuned)
        text = read(tmp_path / "out")["text"]["unseen"]
        assert (text["difference"], text["kl"]) == (0.0, 0.0)


def test_files_that_are_no_comparison_s_are_not_replaced(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "documents.jsonl"
    mine.write_bytes(material["heldout"].read_bytes())
    assert compare(material, tmp_path, BASE, BASE, "--heldout_path", str(mine), data="none") == 2
    assert "has documents.jsonl, but is no comparison's folder" in capsys.readouterr().err
    assert mine.read_bytes() == material["heldout"].read_bytes()


def test_text_that_a_run_replayed_is_not_measured_on(material: dict[str, Path], tmp_path: Path) -> None:
    seen, run = first_lines("pretrain.jsonl", 10, tmp_path), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model, _ = load_model(material["tuned"])
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"model_config": asdict(model.config)},
    }
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    (run / "run.json").write_text("{}")
    own = "replay_ratio: 0.2, replay_source: "
    for replay, documents in (
        ("replay_ratio: 0.0", 10),
        ("replay_ratio: 0.2", 5),  # fit leaves half of so little text to replay
        (own + "auto, pretrain_path: a.jsonl", 5),
        (own + "self, pretrain_path: a.jsonl", 10),  # the base wrote it
        (own + "auto, pretrain_path: null", 10),
    ):
        (run / "config.yaml").write_text(f"data: {{tokenizer: {DATA / 'tokenizer'}, {replay}}}")
        compare(material, tmp_path / "out", BASE, run, "--pretrain_path", str(seen), data="none")
        assert read(tmp_path / "out")["text"]["seen"]["documents"] == documents
    (run / "config.yaml").write_text("data: {replay_ratio: 0.2, heldout_path: text.jsonl}")
    compare(material, tmp_path / "out", BASE, run, "--pretrain_path", str(seen), "--tokenizer", str(DATA / "tokenizer"))
    assert any("may be what TUNED's run replayed" in note for note in read(tmp_path / "out")["notes"])


def test_text_that_was_seen_is_measured_beside_unseen_text_which_is_judged(
    material: dict[str, Path], tmp_path: Path
) -> None:
    seen = first_lines("pretrain.jsonl", 10, tmp_path)
    compare(material, tmp_path, BASE, material["tuned"], "--pretrain_path", str(seen))
    both = read(tmp_path)
    assert both["judged"] == "unseen" and both["text"]["seen"]["documents"] == 10
    assert both["verdict"]["forgetting"] == both["text"]["unseen"]["difference"]
    compare(material, tmp_path, BASE, material["tuned"], "--pretrain_path", str(seen), data="none")
    assert read(tmp_path)["judged"] == "seen"


def test_chats_alone_are_not_judged(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(material, tmp_path, BASE, material["tuned"], "--answer_tokens=4", "--prompts=5",
                   "--own_documents=0", data="chats") == 0  # fmt: skip
    found = read(tmp_path)
    assert found["verdict"] == {"judged": None, "exceeded": False} and found["answers"]["prompts"] == 5
    assert all(row[when]["tokens"] <= 4 for row in found["answers"]["answers"] for when in ("before", "after"))
    assert "forgetting was not judged" in capsys.readouterr().out


def test_every_option_of_measuring_changes_what_is_measured(material: dict[str, Path], tmp_path: Path) -> None:
    def text(*more: str) -> Any:
        compare(material, tmp_path, BASE, material["tuned"], *more)
        return read(tmp_path)["text"]["unseen"]

    plain = text()
    assert text("--documents=7")["documents"] == 7
    short = text("--max_length=20")
    assert short["cut"] > plain["cut"] == 0 and short["tokens"] < plain["tokens"]
    bare = text("--document_format=bare")
    assert bare["tokens"] == plain["tokens"] - 2 * plain["documents"]  # no end, and the first token is no target
    other = text("--seed=1")
    assert other["difference"] == plain["difference"] and other["interval"] != plain["interval"]


def test_heads_that_tensors_do_not_tell_can_be_given(material: dict[str, Path], tmp_path: Path) -> None:
    model = Transformer(ModelConfig.minimind2(hidden_size=64, num_hidden_layers=1, vocab_size=2560))
    model.initialise(0)
    export_minimind(model, tmp_path / "old.pth")
    for heads in (8, 4):
        old = tmp_path / "old.pth"
        compare(material, tmp_path / "out", old, old, f"--num_attention_heads={heads}")
        assert f"{heads} heads" in read(tmp_path / "out")["base"]["description"]
    found = {}
    for given in ("--rope_theta=1e6", "--rope_theta=2", "--rms_norm_eps=0.5"):
        assert compare(material, tmp_path / given, old, old, given) == 0
        found[given] = read(tmp_path / given)["text"]["unseen"]["before"]
    assert len(set(found.values())) == 3
    notes = read(tmp_path / "out")["notes"]
    assert any("no better than guessing" in note for note in notes) and not any("are chats" in note for note in notes)


def test_chats_in_the_tokens_of_another_tokenizer_are_told(material: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load_model(BASE)
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.copy_(table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))])
    export_minimind(model, tmp_path / "permuted.pth")
    for base, doubted in ((tmp_path / "permuted.pth", True), (BASE, False)):
        compare(material, tmp_path, base, base, "--own_documents=0", "--prompts=1", data="chats")
        notes = read(tmp_path)["notes"]
        assert any("is far worse than guessing: is that tokenizer the base's own?" in note for note in notes) is doubted


def test_held_out_text_that_the_base_has_seen_is_not_measured_as_unseen(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen.jsonl"
    lines = material["heldout"].read_text(encoding="utf-8").splitlines(keepends=True)
    seen.write_text("".join(lines[:5]), encoding="utf-8")
    compare(material, tmp_path, BASE, material["tuned"], f"--pretrain_path={seen}")
    text = read(tmp_path)["text"]
    assert {name: found["documents"] for name, found in text.items()} == {"unseen": len(lines) - 5, "seen": 5}
    seen.write_text("".join(lines), encoding="utf-8")
    assert compare(material, tmp_path / "none", BASE, material["tuned"], f"--pretrain_path={seen}") == 2
    assert "--heldout_path: every document also stands in --pretrain_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "tuned", "more", "told"),
    [
        (BASE, BASE, {"heldout_path": DATA / "sft_val.jsonl"}, ["are chats, not text"]),
        (BASE, BASE, {"val_path": DATA / "heldout.jsonl"}, ["all of it is plain text, without a turn"]),
        (BASE, None, {"val_path": DATA / "sft_val.jsonl"}, []),  # damaged, it is less sure, which is better on chats
        (None, BASE, {"val_path": DATA / "sft_val.jsonl"}, ["worse at the chats than BASE"]),
    ],
)
def test_what_looks_like_a_mistake_is_noted(
    base: Path | None, tuned: Path | None, more: dict[str, Path], told: list[str],
    material: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    words = [f"--{name}={first_lines(path.name, 40, tmp_path)}" for name, path in more.items()]
    words += ["--own_chats=0", "--prompts=1", "--answer_tokens=1", f"--tokenizer={DATA / 'tokenizer'}"]
    compare(material, tmp_path / "out", base or material["tuned"], tuned or material["tuned"], *words)
    notes = read(tmp_path / "out")["notes"]
    assert len(notes) == len(told) and all(part in note for part, note in zip(told, notes, strict=True))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--val_path", "nowhere.jsonl"], "--val_path: "),
        (["--probes", "nowhere.jsonl"], "--probes: "),
        (["--pretrain_log", "nowhere.csv"], "--pretrain_log nowhere.csv: "),
        (["--max_forgeting", "1"], "The nearest option is --max_forgetting"),
        (["--documents", "0"], "0 is not a whole number from 1"),
        (["--max_forgetting", "-1"], "-1 is not a number of nats per token from 0"),
        (["--tokenizer", "nowhere"], "--tokenizer must name a folder"),
        (["--device", "cuda:0,1"], "device"),
        (["--max_length", "1"], "--max_length is 1"),
    ],
)
def test_mistakes_are_one_line_in_the_words_of_the_command(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert compare(material, tmp_path, BASE, BASE, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("minimind_sft: error: ") and error.count("\n") == 1 and said in error


def test_bad_lines_are_refused_or_allowed(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "The capital of Peru is Lima."}\nno\n')
    more = ["--pretrain_path", str(tmp_path / "text.jsonl")]
    assert compare(material, tmp_path, BASE, BASE, *more, data="none") == 2
    assert "more than --max_bad_ratio = 0.01" in capsys.readouterr().err
    assert compare(material, tmp_path, BASE, BASE, *more, "--max_bad_ratio=0.5", data="none") == 0
    assert read(tmp_path)["text"]["seen"]["interval"] is None  # one document


@pytest.mark.parametrize("vocab_size", [3000, 2000])
def test_vocabularies_that_differ_are_refused(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], vocab_size: int
) -> None:
    model = Transformer(ModelConfig.minimind3(hidden_size=32, num_hidden_layers=1, vocab_size=vocab_size))
    model.initialise(0)
    export_minimind(model, tmp_path / "other.pth")
    assert compare(material, tmp_path, BASE, tmp_path / "other.pth") == 2
    assert f"BASE has a vocabulary of 2,560 tokens ({BASE}) and TUNED of {vocab_size:,}" in capsys.readouterr().err


def test_tokenizers_that_differ_are_refused(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_model(BASE)
    export_hf(model, tmp_path / "hf", tokenizer=DATA / "tokenizer", card="")
    specification = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = specification["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last + "x"] = vocabulary.pop(last)
    specification["model"]["merges"] = specification["model"]["merges"][:-1]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(specification), encoding="utf-8")
    assert compare(material, tmp_path, BASE, tmp_path / "hf") == 2
    assert "have different vocabularies" in capsys.readouterr().err
    specification = json.loads((DATA / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    specification["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(specification), encoding="utf-8")
    assert compare(material, tmp_path, BASE, tmp_path / "hf") == 2
    assert "cut text differently" in capsys.readouterr().err


def test_something_to_measure_on_is_needed(
    material: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(material, tmp_path, BASE, BASE, "--own_documents=0", data="none") == 2
    assert "nothing to measure on" in capsys.readouterr().err
    assert compare(material, tmp_path, BASE, BASE, "--own_documents=0", "--max_forgetting=0.1", data="chats") == 2
    assert "needs text" in capsys.readouterr().err
    assert compare(material, tmp_path, BASE, tmp_path / "nothing.pth", "--tokenizer", str(DATA / "tokenizer")) == 2
    assert "TUNED" in capsys.readouterr().err


def test_an_output_that_cannot_hold_chinese_gets_the_exit_status_all_the_same(
    material: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "minimind_sft", "compare", BASE, material["tuned"], "--out", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    more = ["--heldout_path", material["heldout"], "--cache_dir", material["cache"], "--device", "cpu"]
    done = subprocess.run(
        [str(word) for word in [*command, *more]],  # and the tokenizer beside the base is found
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "\\u" in done.stdout


def test_the_top_level_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "\n  compare " in capsys.readouterr().out


def test_comparing_does_not_import_lightning() -> None:
    code = "import sys; import minimind_sft.comparison; print({'lightning', 'torchmetrics'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "set()\n"


def test_a_model_that_is_not_there_is_named_before_its_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "none.pth", "other.pth", "--val_path", "x.jsonl"]) == 2
    assert "BASE none.pth does not exist; it is a .pth, .safetensors or .ckpt file" in capsys.readouterr().err
