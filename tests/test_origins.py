"""What a name of weights stands for: a file, a run, a folder on the hub; and the tokenizer that belongs to it."""

import builtins
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minimind_sft import hub
from minimind_sft.huggingface import export_hf
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.module import SFTModule
from minimind_sft.origins import find_origin
from minimind_sft.pairs import find_tokenizer
from minimind_sft.rundir import refuse_own_weights
from minimind_sft.stores import Stores
from minimind_sft.weights import load

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig.minimind3(hidden_size=32, num_hidden_layers=1, vocab_size=50, intermediate_size=48)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory: records, two checkpoints of different models, and weights in export/."""
    run = tmp_path / "runs" / "sft"
    (run / "checkpoints").mkdir(parents=True)
    (run / "export").mkdir()
    (run / "config.yaml").write_text(f"data:\n  tokenizer: {PROJECT / 'data' / 'tokenizer'}\n")
    (run / "run.json").write_text("{}")
    for seed, name in enumerate(("checkpoints/best.ckpt", "checkpoints/last.ckpt", "export/last_32.pth")):
        model = Transformer(CONFIG)
        model.initialise(seed)
        torch.save(model.state_dict(), run / name)
    return run


def test_a_run_directory_stands_for_its_best_checkpoint_else_its_last(run_dir: Path) -> None:
    best = run_dir / "checkpoints" / "best.ckpt"
    assert find_origin(run_dir).path == load(run_dir).path == best
    assert str(best) in load(run_dir).describe()
    best.unlink()
    assert load(run_dir).path == run_dir / "checkpoints" / "last.ckpt"


def test_a_hugging_face_folder_is_itself_even_with_checkpoints_in_it(run_dir: Path) -> None:
    (run_dir / "config.json").write_text("{}")
    assert find_origin(run_dir).path == run_dir


@pytest.mark.parametrize("name", ["", "checkpoints/best.ckpt", "export/last_32.pth", "export/best"])
def test_weights_in_a_run_directory_know_the_runs_settings(run_dir: Path, name: str) -> None:
    (run_dir / "export" / "best").mkdir()
    origin = find_origin(run_dir / name)
    assert origin.run_dir == run_dir
    assert origin.tokenizer() == PROJECT / "data" / "tokenizer"
    assert origin.setting("data", "nothing") is None and origin.setting("nothing", "x") is None


def test_a_relative_path_finds_its_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir / "checkpoints")
    assert find_origin("best.ckpt").run_dir == run_dir


def test_the_tokenizer_is_the_given_one_then_the_folders_then_the_runs(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir / "export" / "best"
    export_hf(Transformer(CONFIG), folder, tokenizer=PROJECT / "data" / "tokenizer", card="")
    assert find_origin(folder).tokenizer() == folder
    assert find_origin(folder).tokenizer("elsewhere") == Path("elsewhere")
    shutil.copy(run_dir / "export" / "last_32.pth", tmp_path / "alone.pth")
    with pytest.raises(ValueError, match=r"which tokenizer belongs to .*alone.pth.* --tokenizer FOLDER"):
        find_origin(tmp_path / "alone.pth").tokenizer()
    with pytest.raises(ValueError, match=r"none.pth does not exist"):
        find_origin(tmp_path / "none.pth").tokenizer()
    assert find_origin(PROJECT / "data" / "base.pth").tokenizer() == PROJECT / "data" / "tokenizer"  # beside it
    (run_dir / "config.yaml").write_text("data:\n  tokenizer: gone/tokenizer\n")
    with pytest.raises(ValueError, match="trained with the tokenizer in gone/tokenizer, which is not there"):
        find_origin(run_dir).tokenizer()


def test_a_runs_tokenizer_is_known_by_where_it_was_and_by_its_content(run_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "project" / "data" / "tokenizer"
    shutil.copytree(PROJECT / "data" / "tokenizer", own)
    (own / "tokenizer.json").write_text((own / "tokenizer.json").read_text() + "\n")
    known = {"folder": str(own), "sha256": hashlib.sha256((own / "tokenizer.json").read_bytes()).hexdigest()}
    (run_dir / "config.yaml").write_text("data:\n  tokenizer: data/tokenizer\n")  # the demo's is called so, too
    (run_dir / "run.json").write_text(json.dumps({"tokenizer": known}))
    assert find_origin(run_dir).tokenizer() == own
    own.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"tokenizer in .*project/data/tokenizer, which is not there any more, or is"):
        find_origin(run_dir).tokenizer()
    demo = hashlib.sha256((PROJECT / "data" / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    (run_dir / "run.json").write_text(json.dumps({"tokenizer": known | {"sha256": demo}}))  # made on another machine
    assert find_origin(run_dir).tokenizer().absolute() == PROJECT / "data" / "tokenizer"


@pytest.mark.parametrize(
    ("data", "unreplayed", "all_of_it"),
    [
        ({}, 200, False),
        ({"measure_documents": 2000}, 1000, False),
        ({"heldout_path": "held_out.jsonl"}, 1000, True),  # any of it may have been replayed: fewer are no better
        ({"heldout_path": "held_out.jsonl", "replay_ratio": 0.0}, 1000, False),
        ({"replay_source": "self"}, 1000, False),
        ({"replay_ratio": 0.0}, 1000, False),
    ],
)
def test_what_a_run_replayed_is_not_measured_on(
    run_dir: Path, data: dict[str, Any], unreplayed: int, all_of_it: bool
) -> None:
    usual = {"replay_ratio": 0.2, "replay_source": "auto", "pretrain_path": "text.jsonl", "measure_documents": 200}
    (run_dir / "config.yaml").write_text(json.dumps({"data": usual | data, "model": {"fisher_tokens": 0}}))
    origin = find_origin(run_dir)
    assert (origin.unreplayed(1000), origin.replays_all) == (unreplayed, all_of_it)
    assert origin.halves == (unreplayed == 200 or data == {"measure_documents": 2000})


def test_a_term_that_read_text_counts_as_replay(run_dir: Path) -> None:
    term = {"class_path": "minimind_sft.priors.EWC", "init_args": {"weight": 1.0, "tokens": 100}}
    settings = {"data": {"pretrain_path": "text.jsonl", "replay_source": "auto"}, "model": {"terms": [term]}}
    (run_dir / "config.yaml").write_text(json.dumps(settings))
    assert find_origin(run_dir).halves
    del term["init_args"]["tokens"]  # type: ignore[attr-defined]
    (run_dir / "config.yaml").write_text(json.dumps(settings))
    assert not find_origin(run_dir).halves


def test_a_file_of_an_export_is_of_its_run(run_dir: Path) -> None:
    for place in ("export/best/model.safetensors", "export/best", "checkpoints/best.ckpt"):
        assert find_origin(run_dir / place).run_dir == run_dir


def test_a_new_run_does_not_clear_away_the_weights_that_it_starts_from(run_dir: Path, tmp_path: Path) -> None:
    for weights in (run_dir, run_dir / "checkpoints" / "best.ckpt"):
        with pytest.raises(ValueError, match="lies in run_dir .*which a new run clears"):
            refuse_own_weights(run_dir, str(weights))
    refuse_own_weights(tmp_path / "runs" / "sft2", str(run_dir))
    refuse_own_weights(run_dir, "scratch")
    refuse_own_weights(run_dir, "data/base.pth")


# ---- the hub


class FakeHub:
    """`snapshot_download`, from a folder instead of the network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []  # type: ignore[var-annotated]

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((name, revision, allow_patterns))
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    export_hf(Transformer(CONFIG), tmp_path / "snapshot", tokenizer=PROJECT / "data" / "tokenizer", card="")
    fake = FakeHub(tmp_path / "snapshot")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fake))
    yield fake
    hub._fetched.cache_clear()


def test_a_hub_name_is_fetched_once_and_read_like_a_folder(fake_hub: FakeHub) -> None:
    assert load("hf:someone/small-model").path == fake_hub.folder
    assert find_origin("hf:someone/small-model@v1.0").tokenizer() == fake_hub.folder
    assert find_origin("x.pth").tokenizer("hf:someone/small-model") == fake_hub.folder
    safe = ["*.json", "*.jinja", "*.safetensors"]
    assert fake_hub.calls == [
        ("someone/small-model", None, safe), ("someone/small-model", "v1.0", safe),
    ]  # fmt: skip


def test_fit_takes_weights_and_tokenizer_from_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    assert str(fake_hub.folder) in SFTModule(weights="hf:someone/small-model").start.description
    stores = Stores(train_path="x.jsonl", tokenizer="hf:someone/small-model", cache_dir=str(tmp_path))
    assert stores.template.vocab_size == 2560 and len(fake_hub.calls) == 1


def test_a_run_s_tokenizer_and_a_pair_s_models_may_be_on_the_hub(fake_hub: FakeHub, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("data:\n  tokenizer: hf:someone/small-model\n")
    assert find_origin(run_dir).known_tokenizer() == fake_hub.folder
    assert find_tokenizer("hf:someone/small-model", "hf:someone/small-model", None) == fake_hub.folder


def test_pickled_weights_are_fetched_only_where_there_are_no_safetensors(fake_hub: FakeHub) -> None:
    (fake_hub.folder / "model.safetensors").rename(fake_hub.folder / "pytorch_model.bin")
    find_origin("hf:someone/old")
    assert [call[2][-1] for call in fake_hub.calls] == ["*.safetensors", "*.pth"]


def test_local_names_never_touch_the_network(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:someone" / "model").mkdir(parents=True)
    assert find_origin("hf:someone/model").path == Path("hf:someone/model")
    with pytest.raises(ValueError, match="weights runs/stf do not exist; .*hf:owner/name"):
        load("runs/stf")
    assert fake_hub.calls == []


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"hf:a/b is on the hub, .*pip install -e '\.\[hub\]'"):
        hub.local("hf:a/b")


def test_what_cannot_be_fetched_or_is_no_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no\nroute to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline))
    with pytest.raises(ValueError, match="hf:a/b could not be fetched: ConnectionError: no route to host"):
        hub.local("hf:a/b")
    with pytest.raises(ValueError, match="hf:alone is not a hub name; write hf:owner/name"):
        hub.local("hf:alone")
