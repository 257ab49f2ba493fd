"""The config of a checkpoint, read off the shapes of its tensors.

What shapes leave open (how a width without q/k norms is divided into heads, how many experts a token gets, eps, theta)
is the family's default, and whoever loads is told.
"""

import re
from collections.abc import Mapping
from typing import Any

from minimind_sft.model_config import ModelConfig, with_constants


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied: bool,
    family: str | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Sizes from the shapes of a MiniMind checkpoint.

    Args:
        shapes: of every tensor, by its canonical name.
        tied: whether output layer and embedding are one.
        family: what the user says it is; checked.
        num_attention_heads: where there is no q_norm, shapes leave it open; by default 8.
        num_key_value_heads: what the user says; checked.
        num_experts_per_tok, rope_theta, rms_norm_eps: shapes leave them open; by default the family's.

    Returns:
        The config, and for each thing left open and not given what was taken, with the key that changes it.

    Raises:
        ValueError: shapes that are no MiniMind model's, or that contradict an argument. Says no file name.
    """
    layer = "model.layers.0."
    vocab_size, hidden_size = _matrix(shapes, "model.embed_tokens.weight")
    q_size, k_size = (_matrix(shapes, f"{layer}self_attn.{name}_proj.weight")[0] for name in "qk")
    num_experts, num_shared_experts = (_count(shapes, f"{layer}mlp.{kind}.") for kind in ("experts", "shared_experts"))
    feed_forward = "mlp.experts.0." if num_experts else "mlp."
    q_norm = shapes.get(f"{layer}self_attn.q_norm.weight")
    found_family = "minimind3" if q_norm else "minimind2"
    _agree("model.family", family, found_family)
    heads = num_attention_heads or (q_size // q_norm[0] if q_norm else 8)
    head_dim = q_norm[0] if q_norm else q_size // heads
    if head_dim < 1 or k_size % head_dim or q_size != heads * head_dim:
        raise ValueError(
            f"q_proj of {q_size} and k_proj of {k_size} rows cannot be divided into {heads} attention heads; "
            "set model.num_attention_heads"
        )
    _agree("model.num_key_value_heads", num_key_value_heads, k_size // head_dim)
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(shapes, "model.layers."),
        "vocab_size": vocab_size,
        "num_attention_heads": heads,
        "num_key_value_heads": k_size // head_dim,
        "head_dim": head_dim,
        "intermediate_size": _matrix(shapes, f"{layer}{feed_forward}gate_proj.weight")[0],
        "tie_word_embeddings": tied,
        "num_experts": num_experts,
    }
    if num_experts and num_experts_per_tok is not None:
        sizes["num_experts_per_tok"] = num_experts_per_tok
    if found_family == "minimind3":
        config = ModelConfig.minimind3(**sizes)
    else:
        config = ModelConfig.minimind2(**sizes, num_shared_experts=num_shared_experts)
    taken = [] if q_norm or num_attention_heads else [f"{heads} attention heads (model.num_attention_heads)"]
    if num_experts and num_experts_per_tok is None:
        taken.append(f"{config.num_experts_per_tok} experts per token (model.num_experts_per_tok)")
    config = with_constants(config, rope_theta=rope_theta, rms_norm_eps=rms_norm_eps)
    if rms_norm_eps is None:
        taken.append(f"eps {config.rms_norm_eps:g} (model.rms_norm_eps)")
    if rope_theta is None:
        taken.append(f"theta {config.rope_theta:g} (model.rope_theta)")
    return config, tuple(taken)


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = shapes.get(name, ())
    if len(shape) != 2 or 0 in shape:
        names = ", ".join([*sorted(shapes)[:8], *(["..."] if len(shapes) > 8 else [])])
        raise ValueError(f"not a MiniMind model: no matrix {name}; the tensors are {names}")
    return shape


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """One more than the largest number that follows the prefix in any name."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = [int(match.group(1)) for name in shapes if (match := pattern.match(name))]
    return max(numbers, default=-1) + 1


def _agree(key: str, wanted: object, found: object) -> None:
    if wanted is not None and wanted != found:
        raise ValueError(f"{key} is {wanted}, but by its tensors it is {found}; leave {key} out")
