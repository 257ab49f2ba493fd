"""Sizes and constants of a model, and what each family of MiniMind fixes.

| | minimind3 (2026) | minimind2 (2025) |
|---|---|---|
| layers of | Qwen3: q/k RMSNorm before the rotation | Llama |
| heads, key/value heads | 8, 4 | 8, 2 |
| eps | 1e-6 | 1e-5 |
| feed-forward width | 64 ceil(pi C / 64) | 64 ceil(floor(8 C / 3) / 64) |
| experts | 4, top-1, weights normalised | 4, top-2, weights normalised, and 1 shared |
| balance loss | 0.0005 E sum(f p) | 0.1 E / k sum(f p) |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minimind_sft.rotary import MINIMIND_YARN, check_scaling

FAMILIES = ("minimind3", "minimind2", "qwen3", "qwen2", "llama")
AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model. `minimind3` and `minimind2` fill in what the family fixes.

    Attributes:
        intermediate_size: feed-forward width; of each expert where there are experts.
        num_experts: experts that the router chooses from; 0 for a dense model.
        num_experts_per_tok: how many it chooses.
        num_shared_experts: experts that every token passes besides.
        norm_topk_prob: divide the chosen experts' weights by their sum.
        router_aux_loss_coef: weight of the balance loss, see `moe.py`.
        qkv_bias: whether these projections add a bias; likewise `o_bias`, `mlp_bias`.
        rope_scaling: how positions are stretched, see `rotary.py`; None: not at all.
        max_position_embeddings: the length the model was made for; written into exports, enforced nowhere.

    Raises:
        ValueError: for sizes that no model can have, naming them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qk_norm: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    num_shared_experts: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is unknown; known are {', '.join(FAMILIES)}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        for constant in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, constant) > 0:
                raise ValueError(f"{constant} is {getattr(self, constant)}; it must be above 0")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling)
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be 1 to {self.num_experts} (num_experts)"
            )

    @classmethod
    def minimind3(
        cls,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 8,
        vocab_size: int = 6400,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        tie_word_embeddings: bool = True,
        num_experts: int = 0,
        num_experts_per_tok: int = 1,
        router_aux_loss_coef: float = 5e-4,
    ) -> "ModelConfig":
        """MiniMind-3 (2026); see the module's table."""
        return cls(
            family="minimind3",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim or _head_dim(hidden_size, num_attention_heads),
            intermediate_size=intermediate_size or 64 * math.ceil(hidden_size * math.pi / 64),
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=tie_word_embeddings,
            qk_norm=True,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok if num_experts else 0,
            router_aux_loss_coef=router_aux_loss_coef if num_experts else 0.0,
        )

    @classmethod
    def minimind2(
        cls,
        *,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        vocab_size: int = 6400,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        tie_word_embeddings: bool = True,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        num_shared_experts: int = 1,
        router_aux_loss_coef: float = 0.1,
    ) -> "ModelConfig":
        """MiniMind-2 (2025), the original recipe's; see the module's table."""
        return cls(
            family="minimind2",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim or _head_dim(hidden_size, num_attention_heads),
            intermediate_size=intermediate_size or 64 * math.ceil(hidden_size * 8 // 3 / 64),
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            tie_word_embeddings=tie_word_embeddings,
            qk_norm=False,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok if num_experts else 0,
            num_shared_experts=num_shared_experts if num_experts else 0,
            norm_topk_prob=num_experts_per_tok > 1,  # a single expert keeps its probability as its weight
            router_aux_loss_coef=router_aux_loss_coef if num_experts else 0.0,
        )


def from_sizes(
    family: str | None,
    sizes: Mapping[str, Any],
    *,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    inference_rope_scaling: bool = False,
) -> ModelConfig:
    """A MiniMind by its sizes alone, as `model.weights: scratch` makes it.

    Args:
        family: ``minimind3`` (also for None) or ``minimind2``.
        sizes: arguments of `ModelConfig.minimind3` or `minimind2`; one that is None is left to the family.
        rope_theta, rms_norm_eps: None for the family's.
        inference_rope_scaling: see `stretched`.

    Raises:
        ValueError: sizes that no model can have, or a family that is not MiniMind's.
    """
    makers = {None: ModelConfig.minimind3, "minimind3": ModelConfig.minimind3, "minimind2": ModelConfig.minimind2}
    if family not in makers:
        raise ValueError(f"model.family is {family!r}; a model from its sizes alone is minimind3 or minimind2")
    config = makers[family](**{name: size for name, size in sizes.items() if size is not None})
    config = with_constants(config, rope_theta=rope_theta, rms_norm_eps=rms_norm_eps)
    return stretched(config) if inference_rope_scaling else config


def with_constants(config: ModelConfig, *, rope_theta: float | None, rms_norm_eps: float | None) -> ModelConfig:
    """The same model with another theta or eps, where one is given."""
    given: dict[str, Any] = {"rope_theta": rope_theta, "rms_norm_eps": rms_norm_eps}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def stretched(config: ModelConfig) -> ModelConfig:
    """The same model reading 16 times further than it was trained, by MiniMind's YaRN (`inference_rope_scaling`).

    Raises:
        ValueError: if its positions are stretched in another way already.
    """
    if config.rope_scaling is not None and dict(config.rope_scaling) != dict(MINIMIND_YARN):
        raise ValueError(
            f"the model has RoPE scaling {config.rope_scaling['rope_type']} of its own; "
            "leave model.inference_rope_scaling out"
        )
    return replace(config, rope_scaling=MINIMIND_YARN)


def _head_dim(hidden_size: int, num_attention_heads: int) -> int:
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(f"hidden_size {hidden_size} cannot be shared evenly by {num_attention_heads} attention heads")
    return hidden_size // num_attention_heads
