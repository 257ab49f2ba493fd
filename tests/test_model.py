"""Parity with the original on golden data and with transformers; a document never notices its company."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minimind_sft.attention import attention_backend, attention_over_documents, needs_device_cu_seqlens
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.moe import Routing, balance_loss
from minimind_sft.starting import Start
from minimind_sft.weights import load_model

DENSE3 = ModelConfig.minimind3(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48)
DENSE2 = ModelConfig.minimind2(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48)
MOE3 = ModelConfig.minimind3(
    hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48, num_experts=4, num_experts_per_tok=2
)
MOE2 = ModelConfig.minimind2(hidden_size=32, num_hidden_layers=2, vocab_size=50, intermediate_size=48, num_experts=4)
CONFIGS = {"minimind3": DENSE3, "minimind2": DENSE2, "minimind3_moe": MOE3, "minimind2_moe": MOE2}


def random_model(config: ModelConfig) -> Transformer:
    """Weights large enough that every token matters."""
    model = Transformer(config)
    model.initialise(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.1)
    return model


def flat(*documents: list[int]) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = [len(document) for document in documents]
    ids = torch.tensor([token for document in documents for token in document])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return ids, positions, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), max(lengths)


A, B, C = [1, 7, 9, 30, 2], [5], [11, 12, 13, 14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("name", ["minimind3_dense", "minimind2_dense", "minimind3_moe"])
def test_logits_and_loss_equal_the_original(shared: Path, name: str) -> None:
    golden = load_file(shared / "golden" / name / "io.safetensors")
    model, _ = load_model(shared / "golden" / name / "weights.pth")
    rows = [row.tolist() for row in golden["input_ids"]]
    with torch.no_grad():
        hidden, balance = model.hidden_and_balance(*flat(*rows), aux_scope="batch")
        logits = model.logits(hidden).view_as(golden["logits"])
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-4)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), golden["labels"][:, 1:].flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)
    assert balance.item() / golden["input_ids"].numel() == pytest.approx(golden["train_aux_loss"].item(), abs=1e-6)


@pytest.mark.parametrize("name", ["minimind3_dense", "minimind2_dense", "minimind3_moe"])
def test_sizes_read_off_the_tensors_are_those_of_the_original_config(shared: Path, name: str) -> None:
    wanted = json.loads((shared / "golden" / name / "config.json").read_text())
    config = load_model(shared / "golden" / name / "weights.pth")[0].config
    same = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size intermediate_size "
    for key in (same + "rms_norm_eps rope_theta").split():
        assert getattr(config, key) == wanted[key], key
    assert config.num_experts == (wanted["num_experts"] if wanted["use_moe"] else 0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_document_gets_the_same_logits_in_company_as_alone(config: ModelConfig) -> None:
    model = random_model(config)
    together = model(*flat(A, B, C)).split([len(A), len(B), len(C)])
    for document, logits in zip((A, B, C), together, strict=True):
        torch.testing.assert_close(logits, model(*flat(document)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_token_depends_on_exactly_the_tokens_up_to_itself_in_its_document(config: ModelConfig) -> None:
    model = random_model(config)
    embedded: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = model(*flat(A, C))
    for row in range(len(A) + len(C)):
        (gradient,) = torch.autograd.grad(logits[row].sum(), embedded[0], retain_graph=True)
        first = 0 if row < len(A) else len(A)
        touched = gradient.abs().sum(-1).nonzero().flatten().tolist()
        assert touched == list(range(first, row + 1))


def test_attention_sees_distances_not_absolute_positions() -> None:
    model = random_model(DENSE3)
    ids, positions, cu_seqlens, longest = flat(C)
    moved = model(ids, positions + 100, cu_seqlens, longest)
    stretched = model(ids, positions * 2, cu_seqlens, longest)
    torch.testing.assert_close(moved, model(ids, positions, cu_seqlens, longest), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stretched, moved, atol=1e-2)


def test_a_tied_head_is_one_parameter_and_is_counted_once() -> None:
    model = Transformer(DENSE3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # embedding 1600, final norm 32, and per layer: q, o 1024 each, k, v 512 each, feed-forward 3 x 1536, norms 64 + 8
    assert model.num_parameters() == 1600 + 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 72)


def test_the_original_recipe_is_a_model_of_nine_tenths_of_a_billion() -> None:
    config = ModelConfig.minimind2(hidden_size=2048, num_hidden_layers=20)
    with torch.device("meta"):
        model = Transformer(config)
    assert config.intermediate_size == 5504
    assert model.num_parameters() == 899_237_888


def test_a_new_head_of_random_weights_is_not_their_embedding() -> None:
    start = Start(
        family="minimind3", shape={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                   "num_key_value_heads": 1, "vocab_size": 40},
        constants={"rope_theta": None, "rms_norm_eps": None, "inference_rope_scaling": False},
        num_experts_per_tok=None, reset_head=True, resize_vocab=False, seed=3,
    )  # fmt: skip
    model = start.scratch(40)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_reset_head_unties_and_leaves_the_embedding_alone() -> None:
    model = random_model(DENSE3)
    embedding = model.model.embed_tokens.weight.detach().clone()
    before = model.num_parameters()
    model.reset_head(seed=3)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)
    assert model.num_parameters() == before + embedding.numel()
    assert model.config.tie_word_embeddings is False
    again = random_model(DENSE3)
    again.reset_head(seed=3)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_initialisation_is_the_same_where_another_device_is_the_default() -> None:
    here, elsewhere = Transformer(DENSE3), Transformer(DENSE3)
    here.initialise(5)
    with torch.device("meta"):  # Lightning makes a GPU the default while a model is configured
        elsewhere.initialise(5)
    for one, other in zip(here.parameters(), elsewhere.parameters(), strict=True):
        assert torch.equal(one, other)


def test_initialisation_is_a_function_of_the_seed() -> None:
    first, same, other = Transformer(DENSE3), Transformer(DENSE3), Transformer(DENSE3)
    for model, seed in ((first, 5), (same, 5), (other, 6)):
        model.initialise(seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(first.model.norm.weight, torch.ones(32))
    with_biases = Transformer(replace(DENSE3, qkv_bias=True))
    with_biases.initialise(seed=5)
    assert not with_biases.model.layers[0].self_attn.q_proj.bias.any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_activation_checkpointing_changes_memory_not_gradients(config: ModelConfig) -> None:
    gradients = []
    for activation_checkpointing in (False, True):
        model = random_model(config)
        model.activation_checkpointing = activation_checkpointing
        calls: list[int] = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        hidden, balance = model.hidden_and_balance(*flat(A, B, C))
        (model.logits(hidden).logsumexp(-1).sum() + balance).backward()
        assert len(calls) == 1 + activation_checkpointing
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("untied", [False, True])
def test_tokens_added_to_the_vocabulary_are_the_mean_and_the_old_ones_stay(untied: bool) -> None:
    model = random_model(DENSE3)
    if untied:
        model.reset_head(seed=3)
    before, tables = model(*flat(A)), [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.clone()]
    model.resize_vocab(53)
    torch.testing.assert_close(model(*flat(A))[:, :50], before)
    for table, old in zip((model.model.embed_tokens.weight, model.lm_head.weight), tables, strict=True):
        assert table.shape == (53, 32)
        torch.testing.assert_close(table[50:], old.mean(0).expand(3, -1))
    assert model.config.vocab_size == 53
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not untied
    with pytest.raises(ValueError, match="cannot shrink the vocabulary from 53 to 52"):
        model.resize_vocab(52)


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero_not_none() -> None:
    model = random_model(MOE3)
    hidden, balance = model.hidden_and_balance(*flat(B))  # one token: two of the four experts
    (model.logits(hidden).sum() + balance).backward()
    idle = [expert for expert in model.model.layers[0].mlp.experts if not expert.gate_proj.weight.grad.any()]
    assert len(idle) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("config", [MOE3, MOE2], ids=["minimind3", "minimind2"])
def test_the_balance_loss_does_not_depend_on_how_documents_are_dealt(config: ModelConfig) -> None:
    model = random_model(config)
    together = model.hidden_and_balance(*flat(A, B, C))[1].item()
    apart = sum(model.hidden_and_balance(*flat(document))[1].item() for document in (A, B, C))
    assert together == pytest.approx(apart, rel=1e-5) and together > 0
    assert model.hidden_and_balance(*flat(A, B, C), aux_scope="batch")[1].item() != pytest.approx(apart, rel=1e-3)


def test_evenly_used_experts_cost_the_coefficient_times_k_or_in_minimind2_the_coefficient() -> None:
    even = Routing(torch.full((4, 4), 0.25), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]]))
    one_document = torch.zeros(4, dtype=torch.int64)
    assert balance_loss([even, even], MOE3, one_document, 1).item() == pytest.approx(2 * 4 * 5e-4 * 2)
    assert balance_loss([even, even], MOE2, one_document, 1).item() == pytest.approx(2 * 4 * 0.1)
    lopsided = Routing(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(4, 4), even.chosen * 0)
    assert balance_loss([lopsided], MOE3, one_document, 1).item() == pytest.approx(4 * 5e-4 * 4 * 2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bf16_autocast_stays_near_fp32_and_reaches_every_parameter(config: ModelConfig) -> None:
    model = random_model(config)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(*flat(A, B, C))
        logits.float().logsumexp(-1).sum().backward()
    cosine = F.cosine_similarity(logits.float(), model(*flat(A, B, C)), dim=-1)
    assert cosine.median() > 0.999  # the median: bf16 may send a token to another expert
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_a_cpu_attends_in_fp32_under_autocast_too() -> None:
    q, k, v = torch.randn(3, 9, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    attend = attention_over_documents("per_document", torch.tensor([0, 4, 9]), 5)
    exact = attend(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 100}, "hidden_size 100 cannot be shared evenly by 8 attention heads"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be a multiple of num_key_value_heads \(3\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": 8}, "head_dim is 1"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.minimind3(**sizes)


def test_padded_attention_equals_the_loop_over_documents_in_values_and_gradients() -> None:
    lengths = [5, 1, 9, 6, 8, 2, 17]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    found = []
    for name in ("per_document", "padded"):
        torch.manual_seed(0)
        rows = [torch.randn(sum(lengths), heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        out = attention_over_documents(name, cu_seqlens, max(lengths))(*rows)
        (out * torch.randn_like(out)).sum().backward()
        found.append([out, *(row.grad for row in rows)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "wanted"),
    [
        ((8, 0), torch.bfloat16, 64, "varlen"),
        ((9, 0), torch.float16, 96, "varlen"),
        ((9, 0), torch.float32, 64, "padded"),
        ((9, 0), torch.bfloat16, 100, "padded"),  # FlashAttention wants multiples of 8
        ((7, 5), torch.float16, 64, "padded"),
        ((7, 5), torch.float16, 16, "padded"),
        ((9, 0), torch.bfloat16, 12, "padded"),
        ((9, 0), torch.float32, 8, "padded"),
        ((6, 1), torch.float16, 64, "padded"),
    ],
)
def test_the_backend_follows_the_device(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    wanted: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    attention_backend.cache_clear()
    found = attention_backend("cuda:0", dtype, head_dim)
    attention_backend.cache_clear()
    assert found == wanted


def test_on_the_cpu_boundaries_stay_on_the_host() -> None:
    assert attention_backend("cpu", torch.bfloat16) == "per_document"
    assert not needs_device_cu_seqlens("per_document")
    assert needs_device_cu_seqlens("varlen") and not needs_device_cu_seqlens("padded")


def test_logits_equal_those_of_qwen3_and_llama_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
        "head_dim": 4, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    qwen = transformers.Qwen3Config(**sizes, num_key_value_heads=4, rms_norm_eps=1e-6)
    llama = transformers.LlamaConfig(**sizes, num_key_value_heads=2, rms_norm_eps=1e-5)
    for config, twin in (
        (DENSE3, transformers.Qwen3ForCausalLM(qwen).eval()),
        (DENSE2, transformers.LlamaForCausalLM(llama).eval()),
    ):
        model = random_model(config)
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(*flat(C)), twin(torch.tensor([C])).logits[0], rtol=1e-5, atol=1e-4)
