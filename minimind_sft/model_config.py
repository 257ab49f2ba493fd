"""Sizes and constants of a model, and what each family of MiniMind fixes.

Everything that the tensors of a checkpoint cannot say (eps, theta, how a width is divided into heads) stands here once.
"""

import math
from dataclasses import dataclass

FAMILIES = ("minimind3", "minimind2")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model. `minimind3` and `minimind2` fill in what the family fixes.

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

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model family {self.family!r} is unknown; known are {', '.join(FAMILIES)}")
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")

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
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        tie_word_embeddings: bool = True,
    ) -> "ModelConfig":
        """MiniMind-3 (2026): Qwen3's layers, with q/k norms; feed-forward width pi times the hidden size."""
        return cls(
            family="minimind3",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim or _head_dim(hidden_size, num_attention_heads),
            intermediate_size=intermediate_size or 64 * math.ceil(hidden_size * math.pi / 64),
            rms_norm_eps=rms_norm_eps,
            rope_theta=rope_theta,
            tie_word_embeddings=tie_word_embeddings,
            qk_norm=True,
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
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        tie_word_embeddings: bool = True,
    ) -> "ModelConfig":
        """MiniMind-2 (2025), the original recipe's: Llama's layers; feed-forward width 8/3 of the hidden size."""
        return cls(
            family="minimind2",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim or _head_dim(hidden_size, num_attention_heads),
            intermediate_size=intermediate_size or 64 * math.ceil(hidden_size * 8 // 3 / 64),
            rms_norm_eps=rms_norm_eps,
            rope_theta=rope_theta,
            tie_word_embeddings=tie_word_embeddings,
            qk_norm=False,
        )


def _head_dim(hidden_size: int, num_attention_heads: int) -> int:
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(f"hidden_size {hidden_size} cannot be shared evenly by {num_attention_heads} attention heads")
    return hidden_size // num_attention_heads
