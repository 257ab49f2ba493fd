"""The verb `export`, and what `fit` exports at its end."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_huggingface import enlarge

from minimind_sft.__main__ import main
from minimind_sft.chat import ChatTemplate
from minimind_sft.export import export_run
from minimind_sft.files import sha256_file
from minimind_sft.generate import generate
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.weights import export_minimind, load_model

PROJECT = Path(__file__).resolve().parents[1]
TOKENIZER = PROJECT / "data" / "tokenizer"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BEFORE = {"step": 0, "chat_loss": 3.0, "pretrain_loss": 2.0, "bits_per_byte": 1.0}
AFTER = {"step": 9, "chat_loss": 1.5, "pretrain_loss": 2.25, "bits_per_byte": 1.1}
BEST = {"step": 6, "chat_loss": 1.4, "pretrain_loss": 2.125, "bits_per_byte": 1.05}


def random_model(seed: int, name: str = "minimind3") -> Transformer:
    make = ModelConfig.minimind2 if name.startswith("minimind2") else ModelConfig.minimind3
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if name.endswith("moe") else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = Transformer(make(vocab_size=2560, **sizes, **experts))
    enlarge(model, seed)
    if name.endswith("untied"):
        model.reset_head(seed)
    return model


def checkpoint(path: Path, model: Transformer, step: int, base_sha256: str | None = "b" * 64) -> None:
    """As Lightning and `SFTModule` write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"model_config": asdict(model.config)},
        "global_step": step,
        "optimizer_states": [],
        "minimind_sft": {"base_sha256": base_sha256, "settings": {"model.learning_rate": 5e-4}},
    }
    torch.save(content, path)


def make_run(
    run: Path, name: str = "minimind3", weights: str = "/home/me/secret/base.pth", sha256: str = "b" * 64
) -> Path:
    checkpoint(run / "checkpoints" / "best.ckpt", random_model(1, name), 6, sha256)
    checkpoint(run / "checkpoints" / "last.ckpt", random_model(2, name), 9, sha256)
    settings = {
        "model": {"weights": weights, "learning_rate": 5e-4, "family": None},
        "data": {"tokenizer": str(TOKENIZER), "train_path": ["/home/me/secret/chats.jsonl"], "cache_dir": "/tmp/me"},
        "trainer": {"max_epochs": 3},
        "run_dir": str(run),
    }
    sample = {
        "inputs": [{"name": "/home/me/secret/chats.jsonl", "size": 1260, "sha256": "c" * 64}],
        "max_mb": 72.0, "seed": 42, "lines_seen": 13, "blank": 1, "selected": 11, "bytes": 1 << 20,
        "rejected": {"empty": 2},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "run.json").write_text(json.dumps({"base_sha256": sha256, "versions": {"torch": "2.6"}}))
    (run / "sample.json").write_text(json.dumps(sample))
    figures = {"before": BEFORE, "after": AFTER, "best": BEST, "forgetting": 0.25, "seen": False}
    (run / "forgetting.json").write_text(json.dumps(figures))
    return run


def export(*argv: Any) -> int:
    return main(["export", *map(str, argv)])


def same(model: Transformer, other: Transformer) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- minimind


def test_a_run_becomes_the_originals_file_by_the_originals_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "sft")
    assert export(run, tmp_path / "out", "--format=minimind") == 0
    written = tmp_path / "out" / "sft_32.pth"
    said = capsys.readouterr().out
    assert f"{run}/checkpoints/best.ckpt" in said and f"written {written}" in said
    content = torch.load(written, weights_only=True)
    assert {tensor.dtype for tensor in content.values()} == {torch.float16}
    assert content[HEAD].data_ptr() == content[EMBEDDING].data_ptr()
    assert all(torch.equal(content[name], tensor.half()) for name, tensor in random_model(1).state_dict().items())
    assert export(run / "checkpoints" / "last.ckpt", tmp_path / "out", "--format=minimind", "--name=full_sft") == 0
    content = torch.load(tmp_path / "out" / "full_sft_32.pth", weights_only=True)
    assert torch.equal(content[HEAD], random_model(2).state_dict()[HEAD].half())


@pytest.mark.parametrize("name", ["minimind3_dense", "minimind2_dense", "minimind3_moe"])
def test_the_golden_weights_come_out_as_they_went_in(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "golden" / name / "weights.pth"
    assert export(source, tmp_path, "--format=minimind") == 0
    (written,) = tmp_path.iterdir()
    assert written.name == f"weights_{json.loads((source.parent / 'config.json').read_text())['hidden_size']}" + (
        "_moe.pth" if name.endswith("moe") else ".pth"
    )
    ours, golden = (torch.load(path, weights_only=True) for path in (written, source))
    assert ours.keys() == golden.keys() and all(torch.equal(ours[key], golden[key]) for key in golden)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": 1e4}, "rope_theta 10000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ({"qkv_bias": True}, "qkv_bias True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "a RoPE scaling"),
        ({"tie_word_embeddings": False}, "untied"),
    ],
)
def test_what_the_originals_file_would_turn_into_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], message: str
) -> None:
    fields = asdict(random_model(1).config) | config
    checkpoint(tmp_path / "x.ckpt", Transformer(ModelConfig(**fields)), 1)
    assert export(tmp_path / "x.ckpt", tmp_path / "out", "--format=minimind") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- hf


@pytest.mark.parametrize("name", ["minimind3", "minimind2", "minimind3_moe", "minimind3_untied"])
def test_a_run_opens_in_transformers_with_our_logits_and_says_the_same(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "sft", name)
    assert export(run, tmp_path / "out", "--format=hf") == 0
    model = random_model(1, name)
    assert same(load_model(tmp_path / "out")[0], model)  # bit for bit
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "钬 is what?"}]
    template = ChatTemplate.from_folder(TOKENIZER)
    prompt = template.prompt(messages)
    theirs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert theirs[0].tolist() == prompt
    length = len(prompt)
    with torch.no_grad():
        ours = model(theirs[0], torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length)
        torch.testing.assert_close(twin(theirs).logits[0], ours, rtol=1e-4, atol=1e-4)
    text = twin.generate(theirs, max_new_tokens=16, do_sample=False)[0, length:].tolist()  # its own end of turn
    assert generate(model, [prompt], max_new_tokens=16, stop_ids=template.stop_ids) == [text]


@pytest.mark.parametrize(
    "option, value",
    [("num_attention_heads", 2), ("num_experts_per_tok", 2), ("rope_theta", 3.0), ("rms_norm_eps", 0.5)],
)
def test_what_a_config_settles_cannot_be_given_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: float
) -> None:
    run = make_run(tmp_path / "sft")
    assert export(run, tmp_path / "out", "--format=hf", f"--{option}={value}") == 2
    assert f"--{option} is {value}, but" in capsys.readouterr().err


def test_the_card_tells_cost_and_lineage_but_no_paths(tmp_path: Path) -> None:
    assert export(make_run(tmp_path / "sft"), tmp_path / "out", "--format=hf", "--name=Little Chat") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# Little Chat", "minimind3, 0.10 M parameters", "Fine-tuned with",
        "|  | before (step 0) | after (step 9) | best (step 6) |", "unseen by the base",
        "| chats, nats per token | 3.0000 | 1.5000 | 1.4000 |",
        "| forgotten, nats per token | +0.0000 | +0.2500 | +0.1250 |", "These weights are those of step 6",
        "| base | base.pth, SHA-256 `" + "b" * 64,
        "11 of 12 lines, 1.00 MB (cap 72 MB, seed 42); rejected: 2 empty", "chats.jsonl, 1,260 bytes, SHA-256 `cccc",
        "torch 2.6", "learning_rate: 0.0005", "- chats.jsonl", "best.ckpt, after step 6, float32, SHA-256 `"
        + sha256_file(tmp_path / "sft" / "checkpoints" / "best.ckpt"),
    ):  # fmt: skip
        assert part in card, part
    for secret in ("/home", "secret", "/tmp", str(tmp_path), "family"):
        assert secret not in card, secret
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_the_card_tells_of_a_best_looked_at_in_part_and_of_losses_that_are_no_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft")
    figures = json.loads((run / "forgetting.json").read_text())
    figures["best"] |= {"looked_at": 0.1, "pretrain_loss": None}
    (run / "forgetting.json").write_text(json.dumps(figures))
    assert export(run, tmp_path / "out", "--format=hf") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "best (step 6, on 10% of the documents) |" in card
    assert "| forgotten, nats per token | +0.0000 | +0.2500 | - |" in card


def test_other_weights_in_a_runs_folder_do_not_have_its_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft")
    for name, told in (("held.pth", False), ("export/best_32.pth", True)):
        export_minimind(random_model(3), run / name)
        out = tmp_path / Path(name).stem
        assert export(run / name, out, "--format=hf") == 0
        assert ("What training cost" in (out / "README.md").read_text()) == told


def test_where_answers_end_is_told_though_the_tokenizer_names_no_end(tmp_path: Path) -> None:
    folder, names = tmp_path / "tokenizer", ("generation_config.json", "config.json")
    shutil.copytree(TOKENIZER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert export(make_run(tmp_path / "sft"), tmp_path / "out", "--format=hf", "--tokenizer", folder) == 0
    assert [json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] for name in names] == [2, 2]


def test_prompts_on_the_card_are_whole_and_paths_are_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["system_prompts"] = ["Answer yes/no."]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert export(run, tmp_path / "out", "--format=hf") == 0
    assert "Answer yes/no." in (tmp_path / "out" / "README.md").read_text()


def test_the_card_follows_earlier_stages_as_far_as_their_hashes_agree(tmp_path: Path) -> None:
    first = make_run(tmp_path / "pretrain", weights="scratch")
    (first / "run.json").write_text(json.dumps({"base_sha256": None}))
    base = first / "checkpoints" / "best.ckpt"
    second = make_run(tmp_path / "sft", weights=str(first), sha256=sha256_file(base))
    assert export(second, tmp_path / "one", "--format=hf") == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| earlier: pretrain, base | none: random weights |" in card
    assert "| earlier: pretrain, data | 11 of 12 lines" in card
    checkpoint(base, random_model(7), 6)  # another file now
    assert export(second, tmp_path / "two", "--format=hf") == 0
    assert "earlier" not in (tmp_path / "two" / "README.md").read_text()


def test_weights_without_a_run_have_a_card_that_claims_nothing(tmp_path: Path) -> None:
    export_minimind(random_model(1), tmp_path / "pretrain_32.pth")
    assert export(tmp_path / "pretrain_32.pth", tmp_path / "out", "--format=hf", "--tokenizer", TOKENIZER) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# pretrain\n" in card and "Exported by" in card and "Fine-tuned" not in card and "| base" not in card
    checkpoint(tmp_path / "moved.ckpt", random_model(1), 9, None)
    assert export(tmp_path / "moved.ckpt", tmp_path / "o2", "--format=hf", "--tokenizer", TOKENIZER) == 0
    card = (tmp_path / "o2" / "README.md").read_text()
    assert "Trained from scratch" in card and "| base | none: random weights |" in card and "learning_rate" in card


@pytest.mark.parametrize(("dtype", "stored"), [(None, "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_dtype_is_that_of_the_written_weights(tmp_path: Path, dtype: str | None, stored: str) -> None:
    more = [f"--dtype={dtype}"] if dtype else []
    assert export(make_run(tmp_path / "sft"), tmp_path / "out", "--format=hf", *more) == 0
    assert f'"dtype":"{stored}"'.encode() in (tmp_path / "out" / "model.safetensors").read_bytes()
    wanted = dtype or "float32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == wanted


# ---- both


@pytest.mark.parametrize("format", ["minimind", "hf"])
def test_what_is_there_stays_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    run = make_run(tmp_path / "sft")
    target = tmp_path / "out" / ("sft_32.pth" if format == "minimind" else "README.md")
    assert export(run, tmp_path / "out", "--format", format) == 0
    first = target.read_bytes()
    last = run / "checkpoints" / "last.ckpt"
    assert export(last, tmp_path / "out", "--format", format) == 2
    assert "--overwrite" in capsys.readouterr().err and target.read_bytes() == first
    assert export(last, tmp_path / "out", "--format", format, "--overwrite") == 0
    assert target.read_bytes() != first


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["RUN", "OUT"], "--format"),
        (["RUN", "OUT", "--format=gguf"], "invalid choice: 'gguf'"),
        (["RUN", "OUT", "--format=minimind", "--dtype=float32"], "fp16"),
        (["RUN", "OUT", "--format=minimind", "--name=../x"], "--name"),
        (["RUN", "OUT", "--format=hf", "--overwrit"], "did you mean --overwrite?"),
        (["RUN", "OUT", "--format=hf", "--tokenizer=nowhere"], "nowhere has no tokenizer.json"),
        (["nowhere", "OUT", "--format=minimind"], "weights nowhere do not exist"),
        (["FILE", "OUT", "--format=hf"], "--tokenizer FOLDER"),
        (["RUN", "FILE", "--format=minimind"], "w.pth is a file, but a folder is to be written"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    run = make_run(tmp_path / "sft")
    export_minimind(random_model(1), tmp_path / "w.pth")
    names = {"RUN": str(run), "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "w.pth")}
    assert export(*(names.get(word, word) for word in argv)) == 2
    said = capsys.readouterr().err
    assert said.startswith("minimind_sft: error: ") and said.count("\n") == 1 and says in said, said
    assert not (tmp_path / "out").exists()


def test_lightning_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from minimind_sft.__main__ import main; code = main(sys.argv[1:]); "
        "print({'lightning', 'transformers', 'matplotlib'} & set(sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "export", make_run(tmp_path / "sft"), tmp_path / "out", "--format=hf"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


# ---- at the end of fit


def test_best_and_last_of_a_run_are_exported_in_every_format_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft")
    assert export_run(run, ()) == [] and not (run / "export").exists()
    assert len(export_run(run, ("minimind",))) == 2
    assert sorted(path.name for path in (run / "export").iterdir()) == ["best_32.pth", "last_32.pth"]
    for _ in range(2):  # a run that goes on replaces its own
        told = export_run(run, ("minimind", "hf"))
        assert [line.split()[:2] for line in told] == [["exported", "best.ckpt"], ["exported", "last.ckpt"]]
    for seed, name in ((1, "best"), (2, "last")):
        assert same(load_model(run / "export" / name)[0], random_model(seed))
        assert f"# sft, {name}\n" in (run / "export" / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("minimind3", ""),  # whose norms tell the heads
        ("minimind2", " (whose reader must be told num_attention_heads 4)"),
        ("minimind3_moe", " (whose reader must be told num_experts_per_tok 2)"),
    ],
)
def test_what_a_file_of_minimind_s_does_not_tell_is_said_when_it_is_written(
    name: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = make_run(tmp_path / "sft", name), f"_32{'_moe' * name.endswith('moe')}.pth"
    assert export_run(run, ("minimind",))[0].endswith(f"best{file}{more}")
    assert export(run, tmp_path / "out", "--format=minimind") == 0
    assert capsys.readouterr().out.rstrip().endswith(f"sft{file}{more}")


def test_what_cannot_be_exported_is_told_and_stops_nothing(tmp_path: Path) -> None:
    told = export_run(make_run(tmp_path / "untied", "minimind3_untied"), ("minimind", "hf"))
    assert [line.split(":")[0].split()[0] for line in told] == ["not", "exported", "not", "exported"]
    assert "untied" in told[0] and "hf" not in told[1].split("export/")[0]
    told = export_run(make_run(tmp_path / "experts", "minimind2_moe"), ("minimind", "hf"))
    assert "no class for MiniMind-2 with experts" in told[0] and "best_32_moe.pth" in told[1]
    run = make_run(tmp_path / "broken")
    (run / "checkpoints" / "best.ckpt").write_bytes(b"nothing")
    (run / "export").write_text("a file is in the way")
    told = export_run(run, ("minimind", "hf"))
    assert len(told) == 3 and all(line.startswith("not exported: ") for line in told), told


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    row = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}
    lines = [json.dumps(row).replace("Hi", f"Hi {number}") + "\n" for number in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(lines[:8]))
    (tmp_path / "val.jsonl").write_text(lines[8])
    return {
        "model.weights": "scratch", "model.hidden_size": 16, "model.num_hidden_layers": 1,
        "data.train_path": tmp_path / "train.jsonl", "data.val_path": tmp_path / "val.jsonl",
        "data.tokenizer": TOKENIZER, "data.cache_dir": tmp_path / "cache", "data.batch_size": 4,
        "trainer.max_epochs": 1, "run_dir": tmp_path / "run", "device": "cpu",
    }  # fmt: skip


def fit(settings: dict[str, Any], *more: str) -> int:
    return main(["fit", *(f"--{name}={value}" for name, value in settings.items()), *more])


def test_fit_exports_its_checkpoints_and_exports_again_when_it_goes_on(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(settings) == 0
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "export").iterdir()) == ["best", "best_16.pth", "last", "last_16.pth"]
    assert same(load_model(run / "export" / "last")[0], load_model(run / "checkpoints" / "last.ckpt")[0])
    assert "exported last.ckpt as" in capsys.readouterr().out
    first = (run / "export" / "last" / "model.safetensors").read_bytes()
    assert fit(settings | {"trainer.max_epochs": 2}, "--ckpt_path=last") == 0
    assert (run / "export" / "last" / "model.safetensors").read_bytes() != first
    assert same(load_model(run / "export" / "last")[0], load_model(run / "checkpoints" / "last.ckpt")[0])
    # and a new run starts from the run by its name
    second = settings | {"model.weights": run, "run_dir": tmp_path / "two"}
    del second["model.hidden_size"], second["model.num_hidden_layers"]
    assert fit(second, "--export=none") == 0
    assert "run/checkpoints/best.ckpt" in capsys.readouterr().out and not (tmp_path / "two" / "export").exists()
    assert fit(second | {"run_dir": run}, "--overwrite") == 2
    assert "lies in run_dir" in capsys.readouterr().err and (run / "checkpoints" / "best.ckpt").is_file()


def test_a_new_run_clears_away_the_exports_of_an_old_one(settings: dict[str, Any], tmp_path: Path) -> None:
    assert fit(settings, "--export=minimind") == 0
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == ["best_16.pth", "last_16.pth"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert fit(settings, "--export=none") == 0
    assert not (tmp_path / "run" / "export").exists()
