"""Folders of Hugging Face open here, and ours open there, with the same logits and the same greedy text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind_sft.generate import generate
from minimind_sft.huggingface import config_from_json, export_hf
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.weights import load, load_model

IDS = [1, 7, 9, 30, 2, 44, 8, 8, 8, 21, 3, 16]
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3_untied": ("Qwen3", {"tie_word_embeddings": False}),
    "qwen3_wide_heads": ("Qwen3", {"head_dim": 16}),
    "qwen3_yarn": ("Qwen3", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "qwen3_linear": ("Qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "qwen3_moe_unnormalised": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_llama3": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
}


def one_document(ids: list[int], model: Transformer) -> Tensor:
    length = len(ids)
    with torch.no_grad():
        return model(torch.tensor(ids), torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length)


def enlarge(model: torch.nn.Module, seed: int = 1) -> None:
    """Weights large enough that every token and every bias matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def own_model(name: str) -> Transformer:
    make = ModelConfig.minimind2 if name.startswith("minimind2") else ModelConfig.minimind3
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if name.endswith("moe") else {}
    model = Transformer(make(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48, **experts))
    enlarge(model)
    if name.endswith("untied"):
        model.reset_head(seed=3)
    return model


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_transformers_gives_its_logits_and_its_greedy_text(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, more = FOREIGN[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | {"tie_word_embeddings": True} | more))
    twin = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    enlarge(twin)
    twin.save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path)
    assert loaded.defaults == ()
    ids = IDS * 9  # past the original length of the scalings
    wanted = twin(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(one_document(ids, model), wanted, rtol=1e-4, atol=1e-4)
    text = twin.generate(torch.tensor([IDS]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, [IDS], max_new_tokens=16) == [text[0, len(IDS) :].tolist()]


def test_a_folder_as_a_trainer_leaves_it_and_the_file_in_it_are_read_with_its_config(tmp_path: Path) -> None:
    config = ModelConfig.minimind2(
        hidden_size=32, num_hidden_layers=1, vocab_size=50, num_attention_heads=4, num_key_value_heads=2
    )
    model = Transformer(replace(config, rope_theta=1e4))
    model.initialise(0)
    export_hf(model, tmp_path / "out", tokenizer=None, card="")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "out" / name).write_bytes(b"state")
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        found, loaded = load_model(source)
        assert loaded.defaults == () and loaded.config.rope_theta == 1e4 and loaded.config.num_attention_heads == 4
        assert torch.equal(one_document(IDS, found), one_document(IDS, model))


def test_a_tokenizer_may_have_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    model = Transformer(ModelConfig.minimind3(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    model.initialise(0)
    export_hf(model, tmp_path / "out", tokenizer=tmp_path / "tokenizer", card="")
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, tie_word_embeddings=True)).eval()
    enlarge(twin)
    twin.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    torch.testing.assert_close(
        one_document(IDS, load_model(tmp_path)[0]), twin(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=1e-4
    )
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"names shards that are not there: {shards[1].name}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["minimind3", "minimind2", "minimind3_moe", "minimind3_untied"])
def test_an_exported_folder_opens_in_transformers_with_our_logits_and_our_greedy_text(
    tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers")
    model = own_model(name)
    export_hf(model, tmp_path / "out", tokenizer=None, card="# A model\n")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = {"minimind2": "LlamaForCausalLM", "minimind3_moe": "Qwen3MoeForCausalLM"}.get(name, "Qwen3ForCausalLM")
    assert type(twin).__name__ == wanted
    torch.testing.assert_close(twin(torch.tensor([IDS])).logits[0], one_document(IDS, model), rtol=1e-4, atol=1e-4)
    text = twin.generate(torch.tensor([IDS]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [text[0, len(IDS) :].tolist()] == generate(model, [IDS], max_new_tokens=16)


@pytest.mark.parametrize("name", ["minimind3", "minimind2", "minimind3_moe", "minimind3_untied"])
def test_what_is_exported_is_read_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = own_model(name)
    export_hf(model, tmp_path / "out", tokenizer=None, card="")
    back, _ = load_model(tmp_path / "out")
    wanted = model.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in back.state_dict().items())
    assert back.config.tie_word_embeddings is model.config.tie_word_embeddings
    assert torch.equal(one_document(IDS, back), one_document(IDS, model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_tokenizer_and_its_special_ids_travel_along(shared: Path, tmp_path: Path) -> None:
    model, _ = load_model(shared / "golden" / "minimind3_dense" / "weights.pth")
    export_hf(model, tmp_path / "out", tokenizer=shared / "minimind_tokenizer", card="# Card\n")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    assert (tmp_path / "out" / "README.md").read_text() == "# Card\n"
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.startswith("<|im_start|>")


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    export_hf(own_model("minimind3"), tmp_path / "out", tokenizer=None, card="old")
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        export_hf(own_model("minimind3"), tmp_path / "out", tokenizer=None, card="new")
    assert (tmp_path / "out" / "README.md").read_text() == "old"
    export_hf(own_model("minimind3"), tmp_path / "out", tokenizer=None, card="new", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "new" and load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_never_removes_what_an_export_does_not_write(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    export_hf(own_model("minimind3"), tmp_path / "out", tokenizer=None, card="")
    (tmp_path / "out" / "model.gguf").touch()
    for name, other in (("home", "precious"), ("out", "model.gguf")):
        with pytest.raises(ValueError, match=f"such as {other}.*name another folder"):
            export_hf(own_model("minimind3"), tmp_path / name, tokenizer=None, card="", overwrite=True)
        assert (tmp_path / name / other).exists()
    (tmp_path / "empty").mkdir()
    export_hf(own_model("minimind3"), tmp_path / "empty", tokenizer=None, card="")
    assert load(tmp_path / "empty")


def test_several_ends_of_an_answer_are_all_named_for_generation(shared: Path, tmp_path: Path) -> None:
    tokenizer = shared / "minimind_tokenizer"
    export_hf(own_model("minimind3"), tmp_path / "out", tokenizer=tokenizer, card="", stop_ids=(2, 0))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


def test_minimind2_with_experts_has_no_class_to_be_exported_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class for MiniMind-2 with experts.*format minimind"):
        export_hf(own_model("minimind2_moe"), tmp_path / "out", tokenizer=None, card="")
    assert not (tmp_path / "out").exists()


GOOD = SIZES | {"model_type": "qwen3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are minimind, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is unknown"),
        ({"rope_scaling": {"type": "linear"}}, r"RoPE scaling linear: missing \['factor'\]"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 3}}, r"RoPE scaling yarn: .* unknown \['mscale'\]"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; a whole number is needed"),
        ({"model_type": "qwen3_moe"}, "num_experts_per_tok is None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert config_from_json(GOOD, set()).family == "qwen3"
    with pytest.raises(ValueError, match=message):
        config_from_json(GOOD | change, set())


def test_errors_name_the_folder(tmp_path: Path) -> None:
    export_hf(own_model("minimind3"), tmp_path / "out", tokenizer=None, card="")
    config = tmp_path / "out" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"out does not fit qwen3 .*gate_proj.weight is \[48, 32\], not \[64, 32\]"):
        load(tmp_path / "out")
    config.write_text(json.dumps(content | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match=r"out/config.json: hidden_act is 'relu'"):
        load(tmp_path / "out")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"out/config.json cannot be read as JSON"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("raw", "names", "wanted"),
    [
        (
            {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 6400, "num_attention_heads": 8,
             "num_key_value_heads": 4, "rope_theta": 1000000.0, "num_experts": 4, "num_experts_per_tok": 1,
             "use_moe": False, "rope_scaling": None},
            {"model.layers.0.self_attn.q_norm.weight"},
            ModelConfig.minimind3(hidden_size=64, num_hidden_layers=2),
        ),
        (
            {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 6400, "num_attention_heads": 8,
             "num_key_value_heads": 2, "intermediate_size": None, "rms_norm_eps": 1e-05, "use_moe": True,
             "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "aux_loss_alpha": 0.1},
            set(),
            ModelConfig.minimind2(hidden_size=64, num_hidden_layers=2, num_experts=4),
        ),
    ],
    ids=["minimind3", "minimind2_moe"],
)  # fmt: skip
def test_a_minimind_config_is_that_of_its_generation(raw: dict[str, Any], names: set[str], wanted: ModelConfig) -> None:
    assert config_from_json(raw | {"model_type": "minimind"}, names) == wanted
