"""`config.json` to and from `ModelConfig`, for the families whose layers are ours.

Whatever in a `config.json` would change the arithmetic and is not implemented (a sliding window, another activation, an
unknown RoPE scaling) is an error that names it. Written is what transformers' versions 4 and 5 both read.
"""

from collections.abc import Mapping
from typing import Any

from minimind_sft.model_config import ModelConfig
from minimind_sft.rotary import MINIMIND_YARN

MODEL_TYPES = ("minimind", "qwen3", "qwen3_moe", "qwen2", "llama")


def config_from_json(raw: Mapping[str, Any], names: set[str]) -> ModelConfig:
    """Sizes from the content of a `config.json`.

    Args:
        raw: the content.
        names: of the tensors; generations of `minimind` differ in whether there is a q_norm.

    Raises:
        ValueError: saying what is missing, impossible or not implemented.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    _refuse_unimplemented(raw)
    is_minimind = model_type == "minimind"
    generation = "minimind3" if any(name.endswith("q_norm.weight") for name in names) else "minimind2"
    family = generation if is_minimind else model_type.removesuffix("_moe")
    hidden_size, heads = _need(raw, "hidden_size"), _need(raw, "num_attention_heads")
    max_positions = raw.get("max_position_embeddings", 32768)
    theta, scaling = _rope(raw, default_theta=1e6 if is_minimind else 1e4, max_positions=max_positions)
    experts = _experts(raw, family) if raw.get("use_moe", model_type == "qwen3_moe") else {}
    width = raw.get("moe_intermediate_size") if experts else None
    default_width = getattr(ModelConfig, generation)(hidden_size=hidden_size).intermediate_size if is_minimind else None
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=_need(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=_need(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden_size // heads,
        intermediate_size=width or raw.get("intermediate_size") or default_width or _need(raw, "intermediate_size"),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5 if generation == "minimind2" and is_minimind else 1e-6),
        rope_theta=theta,
        tie_word_embeddings=raw.get("tie_word_embeddings", is_minimind),
        qk_norm=family in ("minimind3", "qwen3"),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        **experts,
    )


def _refuse_unimplemented(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}; only silu is implemented")
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("sliding-window attention is not implemented")
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise ValueError("models of dense and expert layers mixed are not implemented")
    if raw.get("scoring_func", "softmax") != "softmax":
        raise ValueError(f"scoring_func is {raw['scoring_func']!r}; only softmax is implemented")


def _experts(raw: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Fields of ModelConfig about experts. transformers has renamed their number over time."""
    counts = [raw[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)]
    if family == "minimind2":
        counts = [raw.get("n_routed_experts", 4)]
    per_token = _need(raw, "num_experts_per_tok")
    return {
        "num_experts": counts[0] if counts else _need(raw, "num_experts"),
        "num_experts_per_tok": per_token,
        "num_shared_experts": raw.get("n_shared_experts", 1) if family == "minimind2" else 0,
        "norm_topk_prob": raw.get("norm_topk_prob", family != "qwen3") and (family != "minimind2" or per_token > 1),
        "router_aux_loss_coef": raw.get("router_aux_loss_coef", raw.get("aux_loss_alpha", 0.0)),
    }


def _rope(
    raw: Mapping[str, Any], *, default_theta: float, max_positions: int
) -> tuple[float, Mapping[str, Any] | None]:
    """Theta and scaling, from the old form (`rope_theta`, `rope_scaling`) or the new one (`rope_parameters`)."""
    parameters = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or default_theta
    old_name = parameters.pop("type", None)
    kind = parameters.setdefault("rope_type", old_name or "default")
    if parameters.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not implemented")
    if raw.get("inference_rope_scaling"):
        return float(theta), MINIMIND_YARN
    if kind == "default":
        return float(theta), None
    if kind in ("yarn", "llama3"):
        parameters.setdefault("original_max_position_embeddings", max_positions)
    return float(theta), {key: value for key, value in parameters.items() if value is not None}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """What transformers needs to know, in the form that its versions 4 and 5 both read.

    Raises:
        ValueError: for a model that transformers has no class for.
    """
    if config.num_shared_experts:
        raise ValueError(
            "transformers has no class for MiniMind-2 with experts (softmax routing and shared experts); "
            "export it as format minimind"
        )
    kind, name = {
        "minimind3": ("qwen3", "Qwen3"),
        "qwen3": ("qwen3", "Qwen3"),
        "qwen2": ("qwen2", "Qwen2"),
        "minimind2": ("llama", "Llama"),
        "llama": ("llama", "Llama"),
    }[config.family]
    content: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if kind != "qwen2":
        content["attention_bias"] = config.qkv_bias
    if kind == "llama":
        content["mlp_bias"] = config.mlp_bias
    else:
        content |= {"use_sliding_window": False, "sliding_window": None}
    if config.num_experts:
        kind, name = "qwen3_moe", "Qwen3Moe"
        content |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return {"architectures": [f"{name}ForCausalLM"], "model_type": kind, **content}


def _need(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int):
        raise ValueError(f"{key} is {value!r}; a whole number is needed")
    return value
