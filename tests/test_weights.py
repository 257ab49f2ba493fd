"""A checkpoint loads whole or not at all, and what is written is read back bit for bit."""

import hashlib
import pickle
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind_sft.files import sha256_file
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.weights import OF_FIT, build, check_vocab, export_minimind, load, load_model

CONFIG = ModelConfig.minimind3(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def fp16_model(config: ModelConfig = CONFIG) -> Transformer:
    """A model whose fp32 weights are fp16 numbers, so that nothing is lost on the way through a file."""
    model = Transformer(config)
    model.initialise(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def state(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    return {name: tensor.detach().half() for name, tensor in fp16_model(config).state_dict().items()}


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_equal(model: Transformer, wanted: Transformer) -> None:
    assert model.config == wanted.config
    for (name, tensor), (wanted_name, wanted_tensor) in zip(
        model.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert name == wanted_name and tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted_tensor), name


# ---- what loads


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_do_not_matter(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path / "w.pth", {prefix + name: tensor for name, tensor in state().items()})
    assert_equal(load_model(path)[0], fp16_model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_type_becomes_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "w.pth", {name: tensor.to(dtype) for name, tensor in state().items()})
    loaded = load(path)
    assert loaded.dtype == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}


def test_a_head_that_is_absent_or_equal_to_the_embedding_is_tied(tmp_path: Path) -> None:
    tensors = state()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    equal = write(tmp_path / "equal.pth", tensors)
    absent = write(tmp_path / "absent.pth", {name: tensor for name, tensor in tensors.items() if name != HEAD})
    for path in (equal, absent):
        model, _ = load_model(path)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_equal(model, fp16_model())


def test_a_head_of_its_own_stays_its_own(tmp_path: Path) -> None:
    model = fp16_model()
    model.reset_head(seed=2)
    loaded, _ = load_model(write(tmp_path / "w.pth", model.state_dict()))
    assert loaded.config.tie_word_embeddings is False
    assert_equal(loaded, model)


def test_the_originals_half_run_state_gives_its_model(tmp_path: Path) -> None:
    path = write(tmp_path / "w_resume.pth", {"model": state(), "optimizer": {"state": {}}, "epoch": 1, "step": 100})
    assert_equal(load_model(path)[0], fp16_model())


def test_a_checkpoint_of_ours_gives_its_model_and_its_own_config(tmp_path: Path) -> None:
    config = ModelConfig.minimind2(
        hidden_size=32, num_hidden_layers=1, vocab_size=50, num_attention_heads=4, num_key_value_heads=2
    )
    lightning = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": tensor for name, tensor in fp16_model(config).state_dict().items()},
        "hyper_parameters": {"model_config": asdict(config)},
        "optimizer_states": [],
    }
    model, loaded = load_model(write(tmp_path / "last.ckpt", lightning))
    assert loaded.defaults == ()  # nothing had to be guessed, though minimind2 tensors do not tell heads
    assert_equal(model, fp16_model(config))


@pytest.mark.parametrize("prefix", ["", "net.", "_forward_module.", "model._orig_mod.", "student.model."])
def test_a_lightning_checkpoint_of_another_project_gives_its_transformer(prefix: str, tmp_path: Path) -> None:
    found = {f"{prefix}{name}": tensor for name, tensor in state().items()}
    others = {"metric.total": torch.ones(1)} if prefix else {}
    path = write(tmp_path / "theirs.ckpt", {"state_dict": others | found, "hyper_parameters": {"lr": 1e-3}})
    assert_equal(load_model(path)[0], fp16_model())


def test_safetensors_load(tmp_path: Path) -> None:
    save_file({name: tensor for name, tensor in state().items() if name != HEAD}, tmp_path / "w.safetensors")
    assert_equal(load_model(tmp_path / "w.safetensors")[0], fp16_model())


def test_a_folder_stands_for_the_one_file_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", state())
    (tmp_path / "notes.txt").write_text("not weights")
    assert load(tmp_path).path == path


def test_a_built_model_can_train_without_changing_what_was_loaded(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "w.pth", fp16_model().state_dict()))
    with torch.no_grad():
        for parameter in build(loaded).parameters():
            parameter.add_(1.0)
    assert_equal(build(loaded), fp16_model())


def test_the_description_says_what_was_found_and_what_was_guessed(tmp_path: Path) -> None:
    config = ModelConfig.minimind2(hidden_size=32, num_hidden_layers=2, vocab_size=50, num_experts=4)
    path = write(tmp_path / "w.pth", state(config))
    line = load(path).describe()
    assert "\n" not in line
    for part in (
        "minimind2 MoE (top 2 of 4 and 1 shared)", "0.13 M parameters", "2 layers of 32", "8 heads (2 kv)", "float16",
        str(path), sha256_file(path)[:12], "8 attention heads (model.num_attention_heads)",
        "2 experts per token (model.num_experts_per_tok)",
    ):  # fmt: skip
        assert part in line, part
    assert "attention_heads" not in load(path, num_attention_heads=8).describe()


def test_where_tensors_leave_heads_open_the_argument_decides(tmp_path: Path) -> None:
    config = ModelConfig.minimind2(
        hidden_size=32, num_hidden_layers=1, vocab_size=50, num_attention_heads=4, num_key_value_heads=2
    )
    path = write(tmp_path / "w.pth", state(config))
    assert load(path, num_attention_heads=4).config == config
    with pytest.raises(ValueError, match="model.num_key_value_heads is 4, but by its tensors it is 2"):
        load(path, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(ValueError, match="w.pth: .*cannot be divided into 3 attention heads; set model.num_attention"):
        load(path, num_attention_heads=3)
    with pytest.raises(ValueError, match="model.family is minimind3, but by its tensors it is minimind2"):
        load(path, family="minimind3")


def test_reading_further_than_trained_is_a_setting_not_a_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", state())
    plain, stretched = load(path), load(path, inference_rope_scaling=True)
    assert plain.config.rope_scaling is None and "RoPE scaling" not in plain.describe()
    assert "RoPE not stretched (model.inference_rope_scaling)" in plain.describe()
    assert stretched.config.rope_scaling is not None and stretched.config.rope_scaling["factor"] == 16
    assert "RoPE scaling yarn" in stretched.describe() and "inference_rope_scaling" not in stretched.describe()


def test_constants_that_tensors_leave_open_are_told_with_the_key_that_changes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", state())
    line = load(path).describe()
    assert "eps 1e-06 (model.rms_norm_eps)" in line and "theta 1e+06 (model.rope_theta)" in line
    changed = load(path, rope_theta=5e5, rms_norm_eps=1e-3)
    assert (changed.config.rope_theta, changed.config.rms_norm_eps) == (5e5, 1e-3)
    assert "rope_theta" not in changed.describe() and "rms_norm_eps" not in changed.describe()
    plain, model = load_model(path)[0], load_model(path, rope_theta=5e5)[0]
    ids, positions, boundaries = torch.tensor([3, 4, 5]), torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)
    assert not torch.equal(model(ids, positions, boundaries, 3), plain(ids, positions, boundaries, 3))
    for bad in ({"rope_theta": 0.0}, {"rms_norm_eps": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; it must be above 0"):
            load(path, **bad)


def test_what_a_checkpoint_says_of_itself_cannot_be_contradicted(tmp_path: Path) -> None:
    lightning = {
        "state_dict": {f"model.{name}": tensor for name, tensor in fp16_model().state_dict().items()},
        "hyper_parameters": {"model_config": asdict(CONFIG)},
    }
    path = write(tmp_path / "last.ckpt", lightning)
    assert load(path, rope_theta=1e6, rms_norm_eps=1e-6).defaults == ()
    with pytest.raises(ValueError, match="model.rope_theta is 10000.0, but .*last.ckpt says 1000000.0; leave"):
        load(path, rope_theta=1e4)
    linear = {"rope_type": "linear", "factor": 2.0}
    lightning["hyper_parameters"] = {"model_config": asdict(replace(CONFIG, rope_scaling=linear))}
    with pytest.raises(ValueError, match="RoPE scaling linear of its own; leave model.inference_rope_scaling out"):
        load(write(path, lightning), inference_rope_scaling=True)


# ---- what does not


def test_one_error_lists_everything_that_does_not_fit(tmp_path: Path) -> None:
    tensors = state()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(3)
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(5, 32)
    tensors["model.norm.weight"] = torch.full((32,), float("nan"))
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(32, dtype=torch.int32)
    path = write(tmp_path / "w.pth", tensors)
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    for part in (
        str(path),
        "missing model.layers.1.mlp.up_proj.weight [48, 32]",
        "unexpected model.layers.0.mlp.extra.weight [3]",
        "model.layers.1.self_attn.v_proj.weight is [5, 32], not [16, 32]",
        "model.norm.weight holds NaN or infinity",
        "model.layers.0.input_layernorm.weight holds torch.int32",
    ):
        assert part in message, part


def test_a_layer_that_is_missing_whole_is_noticed(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in state().items() if not name.startswith("model.layers.0.")}
    with pytest.raises(ValueError, match=r"w.pth: .*no matrix model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(write(tmp_path / "w.pth", tensors))


def test_tensors_of_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a MiniMind model: no matrix .*; the tensors are conv1.weight"):
        load(write(tmp_path / "w.pth", {"conv1.weight": torch.zeros(3, 3)}))


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.victim)!r}, 'w').write('gotcha')",)


@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_pickle_is_refused_without_running_it(tmp_path: Path, plain: bool) -> None:
    victim, path = tmp_path / "victim", tmp_path / "w.pth"
    if plain:
        path.write_bytes(pickle.dumps({"a": Malice(victim)}, protocol=2))
    else:
        torch.save({"model.embed_tokens.weight": torch.zeros(2, 2), "a": Malice(victim)}, path)
    with pytest.raises(ValueError, match=r"w.pth holds Python code \(\S*exec\) .* refused without running it"):
        load(path)
    assert not victim.exists()


def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.pth", state()).read_bytes()
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    safe = (tmp_path / "whole.safetensors").read_bytes()
    lie = b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'
    contents = {
        "truncated.pth": (whole[: len(whole) // 2], "is truncated"),
        "empty.pth": (b"", "is empty"),
        "text.pth": (b"hello, world\n", "is not a checkpoint"),
        "binary.pth": (bytes(range(256)) * 8, "is not a checkpoint"),
        "archive.pth": (b"PK\x05\x06" + bytes(18), "is not a checkpoint"),
        "empty.safetensors": (b"", "is empty"),
        "truncated.safetensors": (safe[: len(safe) // 2], "is not a whole safetensors file"),
        "huge_header.safetensors": (struct.pack("<Q", 1 << 60) + safe[8:], "is not a whole safetensors file"),
        "lying_header.safetensors": (struct.pack("<Q", len(lie)) + lie + bytes(8), "is not a whole safetensors file"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            load(tmp_path / name)
    for name, content in {"list.pth": [1, 2], "numbers.pth": {"a": 1}, "none.pth": None, "nothing.pth": {}}.items():
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint"):
            load(write(tmp_path / name, content))


def test_a_path_that_names_no_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.pth do not exist"):
        load(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load(tmp_path)
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several weights, name one: a.pth, b.safetensors"):
        load(tmp_path)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    check_vocab(50, CONFIG, key="--tokenizer")
    check_vocab(49, CONFIG, key="--tokenizer")
    with pytest.raises(ValueError, match="has 51 tokens but the model's vocabulary is 50; .* --tokenizer [^,]*$"):
        check_vocab(51, CONFIG, key="--tokenizer")
    with pytest.raises(ValueError, match="data.tokenizer .*, or set model.resize_vocab"):
        check_vocab(51, CONFIG, **OF_FIT)


# ---- export


@pytest.mark.parametrize("family", ["minimind3", "minimind2"])
@pytest.mark.parametrize("experts", [0, 3])
def test_what_is_exported_is_read_back_bit_for_bit(tmp_path: Path, family: str, experts: int) -> None:
    make = ModelConfig.minimind2 if family == "minimind2" else ModelConfig.minimind3
    model = fp16_model(make(hidden_size=32, num_hidden_layers=2, vocab_size=50, num_experts=experts))
    export_minimind(model, tmp_path / "out" / "w.pth")
    assert_equal(load_model(tmp_path / "out" / "w.pth")[0], model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["w.pth"]


def test_the_exported_file_holds_what_the_original_writes(shared: Path, tmp_path: Path) -> None:
    for name in ("minimind3_dense", "minimind2_dense", "minimind3_moe"):
        source = shared / "golden" / name / "weights.pth"
        export_minimind(load_model(source)[0], tmp_path / "w.pth")
        wanted, written = (torch.load(path, weights_only=True) for path in (source, tmp_path / "w.pth"))
        assert written.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
        assert written[HEAD].data_ptr() == written[EMBEDDING].data_ptr()  # one matrix in the file, too


def test_what_the_format_cannot_hold_is_refused_and_leaves_the_target_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_text("precious")
    untied, huge = fp16_model(), fp16_model()
    untied.reset_head(seed=2)
    with torch.no_grad():
        huge.model.norm.weight[0] = 1e5
    with pytest.raises(ValueError, match="output layer is untied"):
        export_minimind(untied, path)
    with pytest.raises(ValueError, match="not finite in fp16: model.norm.weight"):
        export_minimind(huge, path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_breaks_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    path.write_text("precious")

    def full_disk(state: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_minimind(fp16_model(), path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
