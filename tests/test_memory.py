"""The plan's numbers, held to counts of real tensors; and `fit --plan`, which builds nothing."""

import json
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimind_sft import losses, module
from minimind_sft.__main__ import main
from minimind_sft.batching import pack
from minimind_sft.fisher import Scores, bases_of
from minimind_sft.memory import basis_bytes, basis_flops, footprint, layer_bytes, parameters, training_flops
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.sizing import model_config
from minimind_sft.weights import export_minimind, load

PROJECT = Path(__file__).resolve().parents[1]
DENSE3 = ModelConfig.minimind3(hidden_size=64, num_hidden_layers=2, vocab_size=100)
DENSE2 = ModelConfig.minimind2(hidden_size=64, num_hidden_layers=2, vocab_size=100)
MOE3 = replace(
    ModelConfig.minimind3(hidden_size=64, num_hidden_layers=2, vocab_size=100, num_experts=4), num_experts_per_tok=2
)
MOE2 = ModelConfig.minimind2(hidden_size=64, num_hidden_layers=2, vocab_size=100, num_experts=4)
QWEN2 = replace(DENSE2, family="qwen2", qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=False)
CONFIGS = {"minimind3": DENSE3, "minimind2": DENSE2, "minimind3_moe": MOE3, "minimind2_moe": MOE2, "biases": QWEN2}
CHAT = {
    "conversations": [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": " ".join(str(number * 37 % 1000) for number in range(120))},
    ]
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


# ---- counts


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert parameters(config).total == model.num_parameters()
    if not config.num_experts:
        matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
        assert parameters(config).active == matrices


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bases_take_what_they_are_planned_to(config: ModelConfig) -> None:
    model = Transformer(config)
    model.initialise(seed=1)
    found = bases_of(Scores(model.requires_grad_(False), [pack([(np.arange(9), np.ones(9, bool))])], seed=0))
    sides = {side.data_ptr(): side.nbytes for basis in found.values() for side in basis if side is not None}
    assert basis_bytes(config) == sum(sides.values())


def test_a_checkpoint_takes_what_is_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = PROJECT / "data"
    settings = {
        "model.weights": data / "base.pth",
        "model.fisher_tokens": 3,
        "data.train_path": data / "sft_train.jsonl",
        "data.pretrain_path": data / "pretrain.jsonl",
        "data.tokenizer": data / "tokenizer",
        "data.cache_dir": tmp_path / "cache",
        "data.max_rows": 20,
        "data.max_overlap": 1.0,
        "data.measure_documents": 5,
        "data.own_chats": 0,
        "trainer.max_steps": 1,
        "run_dir": tmp_path / "run",
        "device": "cpu",
        "export": "none",
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    said = float(re.search(r"last and best of ([0-9.]+) MB", capsys.readouterr().out)[1])  # type: ignore[index]
    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size / (1 << 20)
    assert size == pytest.approx(said, rel=0.01)


def test_turning_into_a_basis_and_back_is_two_products_a_side() -> None:
    config = ModelConfig.minimind3(hidden_size=64, num_hidden_layers=2, vocab_size=100)  # 8 heads of 8, 4 kv
    sides = 64 * 64 * (64 + 64) * 2 + 32 * 64 * (32 + 64) * 2 + config.intermediate_size * 64 * 64 * 3  # qo, kv, mlp
    assert basis_flops(config) == 4 * (2 * sides + 100 * 64 * 64)


def test_the_original_recipe_takes_16_bytes_a_parameter_before_anything_else() -> None:
    found = footprint(
        ModelConfig.minimind2(hidden_size=2048, num_hidden_layers=20),
        tokens=12_288,
        targets=12_288,
        precision="bf16-mixed",
        cuda=True,
        activation_checkpointing=False,
    )
    assert (found.weights, found.gradients, found.optimizer) == (3_596_951_552, 3_596_951_552, 7_193_903_104)
    assert found.buckets == 0
    assert found.logits == 10 * 5_242 * 6_400 + 4 * 2048 * (12_288 + 6_400)  # a chunk, and the gradients
    assert found.copies == 2 * (899_237_888 - 41 * 2048)  # everything but the norms


def test_a_token_takes_six_operations_for_each_parameter_that_it_meets_and_attention_besides() -> None:
    config = ModelConfig.minimind2(hidden_size=64, num_hidden_layers=2, vocab_size=100)  # feed-forward 192
    layer = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 192
    plain = 6 * 10 * (2 * layer + 100 * 64) + 6 * 2 * 64 * 58  # documents of 3 and 7 tokens
    flops = training_flops(config, tokens=10, squared_lengths=58, activation_checkpointing=False)
    assert flops == plain
    again = training_flops(config, tokens=10, squared_lengths=58, activation_checkpointing=True)
    assert again == pytest.approx(plain + (plain - 6 * 10 * 100 * 64) / 3)


def test_only_the_experts_that_a_token_is_sent_to_cost_time() -> None:
    one, two = (replace(MOE3, num_experts_per_tok=k) for k in (1, 2))
    assert parameters(two).active - parameters(one).active == 2 * 3 * 64 * MOE3.intermediate_size
    assert parameters(two).total == parameters(one).total


# ---- against real tensors


def kept_bytes(config: ModelConfig, autocast: bool) -> int:
    """What autograd keeps of a forward pass over two documents of 32 tokens, weights not counted."""
    model = Transformer(config)
    model.initialise(seed=1)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    boundaries = torch.tensor([0, 32, 64], dtype=torch.int32)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.hidden(torch.arange(64), torch.arange(32).repeat(2), boundaries, 32)
        return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_layer_keeps_what_the_formula_says_to_the_byte(config: ModelConfig, autocast: bool) -> None:
    two, one = (kept_bytes(replace(config, num_hidden_layers=layers), autocast) for layers in (2, 1))
    copies = 2 * (parameters(config).layers // 2) if autocast else 0  # of one layer's matrices
    found, formula = two - one - copies, 64 * layer_bytes(config, half=autocast, cuda=False)
    assert found == pytest.approx(formula, rel=0.01 if config.num_experts else 0)


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that are alive, whoever made them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) and tensor.device.type == "cpu" else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("experts", "accumulate", "replay"), [(0, 1, False), (0, 2, False), (3, 2, False), (0, 1, True), (0, 2, True)]
)
def test_the_peak_of_fit_is_within_a_tenth_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, accumulate: int, experts: int, replay: bool
) -> None:
    config = ModelConfig.minimind3(hidden_size=64, num_hidden_layers=4, vocab_size=2560, num_experts=experts)
    model = Transformer(config)
    model.initialise(seed=1)
    export_minimind(model, tmp_path / "base.pth")
    lines = [json.dumps(CHAT).replace("Count", f"Count {number}") + "\n" for number in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    sizes: list[tuple[int, int, int]] = []

    def cross_entropy(hidden: Tensor, labels: Tensor, targets: Tensor, *more: Any) -> Tensor:
        sizes.append((len(labels), len(targets), int((labels >= 0).sum()) - len(targets)))
        return losses.cross_entropy(hidden, labels, targets, *more)

    monkeypatch.setattr(module, "cross_entropy", cross_entropy)
    settings = {
        "model.weights": tmp_path / "base.pth",
        "model.activation_checkpointing": checkpointing,
        "data.train_path": tmp_path / "train.jsonl",
        "data.tokenizer": PROJECT / "data" / "tokenizer",
        "data.cache_dir": tmp_path / "cache",
        "data.batch_size": 2 // accumulate,
        "data.own_documents": 0,  # what is trained on is measured, not what is looked at
        "data.own_chats": 0,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.max_epochs": 1,
        "run_dir": tmp_path / "run",
        "device": "cpu",
        "export": "none",
    }
    if replay:
        text = [json.dumps({"text": f"Text {number}. " + line}) + "\n" for number, line in enumerate(lines)]
        (tmp_path / "text.jsonl").write_text("".join(text), encoding="utf-8")
        settings |= {"data.pretrain_path": tmp_path / "text.jsonl", "data.measure_documents": 1}
        settings |= {"data.replay_ratio": 0.3, "data.replay_length": 64, "data.max_overlap": 1.0}
    with LiveBytes() as live:
        assert main(["fit", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    planned = footprint(
        config,
        tokens=max(tokens for tokens, _, _ in sizes),
        targets=max(targets for _, targets, _ in sizes),
        precision="32",
        cuda=False,
        activation_checkpointing=checkpointing,
        accumulate=accumulate,
        replayed=max(replayed for _, _, replayed in sizes),
    )
    assert planned.peak + replay * planned.weights == pytest.approx(live.peak, rel=0.1)  # and the base


# ---- fit --plan


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fit --plan` in an empty folder; any attempt to build a model fails."""

    def built(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Transformer, "__init__", built)
    monkeypatch.setattr(torch.nn.Parameter, "__new__", built)

    def run(*arguments: Any) -> str:
        assert main(["fit", "--config=sft.yaml", *map(str, arguments), "--plan"]) == 0
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().out

    return run


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the plan by their names; columns are two spaces or more apart."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_the_original_recipe_is_planned_without_its_weights(plan: Callable[..., str]) -> None:
    found = rows(plan("--config=minimind2_2048x20.yaml"))
    assert found["parameters"][0].startswith("899,237,888 (20 layers of 2048")
    assert "weights_12_9_2048.pth is not there" in found["model"][0]
    assert found["micro-batch"][0].startswith("at most 12,288 tokens (16 x 768)")
    assert found["weights, fp32"] == ["3.35", "3.35"]
    assert found["AdamW's two moments, fp32"] == ["6.70", "6.70"]
    assert found["base copy, when replay is on, fp16"] == ["1.67", "1.67"]
    plain, checkpointing = (float(peak) for peak in found["peak (not all of it is there at once)"])
    assert 30 < plain < 45 and 14 < checkpointing < 20
    assert found["plain"] == ["does not", "does not", "does not", "fits"]
    assert found["activation_checkpointing"] == ["does not", "does not", "fits", "fits"]


def test_replay_adds_its_share_a_piece_and_the_chats_around_it(plan: Callable[..., str]) -> None:
    found = {
        name: rows(plan("--device=cpu", *more))
        for name, more in {
            "off": ["--data.replay_ratio=0"],
            "pieces": ["--data.replay_ratio=0.25", "--data.replay_in_chat=0"],
            "documents": ["--data.replay_ratio=0.25", "--data.replay_in_chat=0", "--data.replay_length=null"],
            "in chats": ["--data.replay_ratio=0.25", "--data.replay_in_chat=0.5"],
        }.items()
    }
    tokens = {name: int(row["micro-batch"][0].split()[2].replace(",", "")) for name, row in found.items()}
    assert tokens["off"] == 12_288
    assert tokens["pieces"] == 12_288 + 3_072 + 128 and tokens["documents"] == 12_288 + 3_072 + 768
    assert tokens["in chats"] > tokens["pieces"]
    logits = {name: float(row["logits and their gradients"][0]) for name, row in found.items()}
    assert logits["pieces"] > logits["off"]


def test_qwen3_is_planned_from_its_config_alone(plan: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN3_06B), encoding="utf-8")
    found = rows(plan("--model.weights=qwen", "--data.max_tokens_per_batch=2048"))
    assert found["parameters"][0].startswith("596,049,920 (28 layers of 1024")
    assert found["micro-batch"][0].startswith("at most 2,048 tokens (data.max_tokens_per_batch)")
    assert found["activation_checkpointing"] == ["does not", "does not", "fits", "fits"]
    unpulled = rows(plan("--model.weights=qwen", "--data.max_tokens_per_batch=2048", "--model.prior_tokens=0"))
    assert unpulled["activation_checkpointing"] == ["does not", "fits", "fits", "fits"]


def test_the_demo_is_planned_as_it_then_runs(plan: Callable[..., str]) -> None:
    found = rows(plan("--device=cpu"))
    assert found["planned for"] == ["a CPU, precision 32, processes: 1"]
    documents = int(found["data"][0].split()[1].replace(",", ""))
    assert documents == pytest.approx(4_234, rel=0.01)  # a test of the demo counts them
    assert found["steps"] == ["about 399"]
    assert "at so many TFLOP/s (no claim about any device; give yours with --plan_tflops)" in found


def test_a_given_throughput_takes_the_place_of_the_assumed_ones(plan: Callable[..., str]) -> None:
    given, assumed = (plan(*more).splitlines() for more in (["--plan_tflops=0.0005"], []))
    assert [line.split()[0] for line in assumed[-4:]] == ["0.1", "1", "10", "100"]
    speed, minutes = given[-1].split()
    assert speed == "0.0005" and "--" in given[-2]  # the only row
    assert float(minutes) == pytest.approx(200 * float(assumed[-4].split()[1]), rel=0.02)


def test_what_looks_take_is_only_told_where_it_is_bounded(plan: Callable[..., str]) -> None:
    assert "looking at the model is about 5 % more" in plan("--val_every_steps=null")
    assert "looking at the model is not counted (every 7 steps; val_every_steps null: about 5 %" in plan(
        "--val_every_steps=7"
    )


def test_a_plan_of_weights_that_are_there_takes_no_other_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config=sft.yaml", "--plan", "--model.hidden_size=768"]) == 2
    said = capsys.readouterr().err
    assert "model.hidden_size is 768, but" in said and "base.pth has 128; leave it out, or plan for other" in said


def test_what_changes_the_run_changes_the_plan(plan: Callable[..., str]) -> None:
    peak = "peak (not all of it is there at once)"
    before = rows(plan())
    assert rows(plan("--data.batch_size=4"))[peak] != before[peak]
    assert rows(plan("--precision=32"))["planned for"] == ["a GPU, precision 32, processes: 1"]
    assert "gradients to be shared (DDP)" not in before
    several = rows(plan("--trainer.devices=4"))
    assert several == rows(plan("--trainer.devices=4", "--device=cuda")) == rows(plan("--device=cuda:0,1,2,3"))
    assert several["gradients to be shared (DDP)"] == several["weights, fp32"] and several["steps"] == ["about 102"]
    assert rows(plan("--trainer.max_steps=7"))["steps"] == ["about 7"]
    assert "and 19 milestones" in rows(plan("--keep_every_steps=20"))["disk"][0]
    assert "activation_checkpointing (as set)" in plan("--model.activation_checkpointing=true")
    assert float(before["the bases they are kept in, fp32"][0]) > 0
    off = rows(plan("--model.fisher_tokens=0", "--model.prior_tokens=0"))
    assert "the bases they are kept in, fp32" not in off and "the pull towards the base" not in off
    pulled = rows(plan("--model.prior_tokens=1"))
    pull, weights = (float(pulled[name][0]) for name in ("the pull towards the base", "weights, fp32"))
    assert pull == pytest.approx(1.5 * weights, rel=0.1)  # on a GPU: Fisher information in bf16, the base in fp32


def test_every_cap_of_the_sample_is_planned_for(plan: Callable[..., str]) -> None:
    def documents(*caps: str) -> int:
        (told,) = [line for line in plan("--data.max_mb=null", *caps).splitlines() if " documents of " in line]
        found = re.search(r"about ([\d,]+) documents", told)
        assert found is not None
        return int(found[1].replace(",", ""))

    everything = documents()
    assert documents("--data.max_rows=100") == 100 < everything
    assert 0 < documents("--data.max_tokens=5000") < 200
    assert documents("--data.max_rows=100", "--data.max_tokens=1000000000") == 100
    assert documents("--data.max_rows=1000000") == everything


def test_a_file_is_planned_with_the_sizes_that_it_then_loads_with(tmp_path: Path) -> None:
    model = Transformer(MOE2)
    model.initialise(seed=1)
    export_minimind(model, tmp_path / "w.pth")
    keys = "family hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts_per_tok rope_theta"
    settings = dict.fromkeys([*keys.split(), "rms_norm_eps", "vocab_size"]) | {
        "weights": str(tmp_path / "w.pth"),
        "inference_rope_scaling": True,
        "resize_vocab": False,
        "reset_head": False,
    }
    config, said = model_config(settings, tokenizer_vocab=100)
    assert config == load(tmp_path / "w.pth", inference_rope_scaling=True).config and "w.pth" in said
    config, _ = model_config(settings | {"resize_vocab": True, "reset_head": True}, tokenizer_vocab=120)
    assert (config.vocab_size, config.tie_word_embeddings) == (120, False)
    with pytest.raises(ValueError, match="120 tokens .* model.resize_vocab"):
        model_config(settings, tokenizer_vocab=120)


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("fit", ["--model.weights=nowhere.pth"], "set model.hidden_size and model.num_hidden_layers"),
        ("fit", ["--plan_tflops=0"], "--plan_tflops is 0"),
        ("fit", ["--data.batch_size=0"], "data.batch_size is 0"),
        ("fit", ["--model.weights=scratch", "--model.family=qwen3"], "minimind3 or minimind2"),
        ("validate", [], "--plan belongs to fit"),
    ],
)
def test_what_cannot_be_planned_is_told(
    verb: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--config=sft.yaml", *arguments, "--plan"]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_asks_for_what_is_not_implemented_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B | {"hidden_act": "gelu"}), encoding="utf-8")
    assert main(["fit", "--config=sft.yaml", f"--model.weights={tmp_path}", "--plan"]) == 2
    said = capsys.readouterr().err
    assert "config.json: hidden_act is 'gelu'" in said
