"""The transformer, for both generations of MiniMind: flat tokens in, logits out.

What comes in is a micro-batch of whole documents laid end to end (`batching.Batch`): ids, positions that restart at
every document, and the boundaries. What goes out is one row per token: hidden states (`hidden`), or logits (`logits` of
the rows that a loss needs: at 256 x 4 the output layer is a third of all arithmetic, and 60 % of rows carry no label).

Names of parameters are the checkpoint's, so a state dict goes to and from a MiniMind file unchanged. Nothing but
parameters is stored: rotary angles are computed from the positions once per forward and shared by the layers.
The arithmetic is the original's, under autocast too: norms and rotations in fp32, results back in the input's type.
Attention is a function handed to the layers (`attention.Attend`), so decoding with a cache stays in `generate.py`.

Shapes: N tokens, D documents, C hidden size, H query heads, K key/value heads, E head dimension, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimind_sft.attention import Attend, attention_backend, attention_over_documents, document_of_token
from minimind_sft.model_config import ModelConfig as ModelConfig
from minimind_sft.moe import AUX_SCOPES, FeedForward, MixtureOfExperts, Routing, balance_loss
from minimind_sft.norm import RMSNorm
from minimind_sft.rotary import cos_sin, frequencies, rotate


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: FeedForward | MixtureOfExperts
        if config.num_experts:
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, FeedForward):
            return x + self.mlp(normed), None
        y, routing = self.mlp(normed)
        return x + y, routing


class Backbone(nn.Module):
    """Everything under the checkpoint's ``model.``"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A decoder-only language model over flat batches. A tied head *is* the embedding: one parameter, two names.

    Args:
        config: sizes.

    Attributes:
        activation_checkpointing: keep only what goes into each layer, and compute the rest again in the backward pass:
            a third more arithmetic for a fraction of the memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the output layer the embedding, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (N,) int64.
            positions: (N,) int64, from 0 in every document.
            cu_seqlens: (D + 1,) int32, on the device or the CPU as `attention.needs_device_cu_seqlens` says.
            max_length: tokens of the longest document.

        Returns:
            (N, C), in the type of the weights.
        """
        return self._run(input_ids, positions, cu_seqlens, max_length)[0]

    def hidden_and_balance(
        self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_length: int, *, aux_scope: str = "document"
    ) -> tuple[Tensor, Tensor]:
        """`hidden`, and the experts' balance loss as a sum over tokens (0 for a dense model); see `moe.balance_loss`.

        Args:
            input_ids: this and the next three as in `hidden`.
            aux_scope: ``document``, or ``batch`` to take all tokens together, as the original MiniMind-3 does.
        """
        assert aux_scope in AUX_SCOPES, aux_scope
        hidden, routings = self._run(input_ids, positions, cu_seqlens, max_length)
        boundaries = cu_seqlens if aux_scope == "document" else cu_seqlens[:: len(cu_seqlens) - 1]
        documents = document_of_token(boundaries, len(input_ids)).to(input_ids.device)
        return hidden, balance_loss(routings, self.config, documents, len(boundaries) - 1)

    def _run(
        self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_length: int
    ) -> tuple[Tensor, list[Routing]]:
        backend = attention_backend(input_ids.device, self.compute_dtype(), self.config.head_dim)
        attend = attention_over_documents(backend, cu_seqlens, max_length)
        return self.run_layers(input_ids, positions, [attend] * self.config.num_hidden_layers)

    def run_layers(
        self, input_ids: Tensor, positions: Tensor, attends: Sequence[Attend]
    ) -> tuple[Tensor, list[Routing]]:
        """Hidden states with the attention of every layer given (`generate.py` puts its caches there), and routings."""
        config = self.config
        cos, sin = cos_sin(
            positions, *frequencies(config.head_dim, config.rope_theta, config.rope_scaling, positions.device)
        )
        x = self.model.embed_tokens(input_ids)  # (N, C)
        routings = []
        for layer, attend in zip(self.model.layers, attends, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(layer, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x, routing = layer(x, cos, sin, attend)
            if routing is not None:
                routings.append(routing)
        return self.model.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), in the output layer's type; whoever takes a softmax wants ``.float()`` first."""
        return self.lm_head(hidden)

    def forward(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
        """Logits of every row, (N, V). Arguments as in `hidden`."""
        return self.logits(self.hidden(input_ids, positions, cu_seqlens, max_length))

    def compute_dtype(self) -> torch.dtype:
        """The type in which matrices are multiplied: autocast's where it is on, else the weights'."""
        weight = self.model.embed_tokens.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialise(self, seed: int) -> None:
        """Start from scratch, alike on every device: matrices normal with deviation 0.02, norms 1, as the original.

        Measured on MiniMind's pretraining text (96 x 4, lr 3e-3): deviations of 1 / sqrt(fan in) in the layers gain
        0.07 nats at 120,000 tokens (o and down starting at zero) and 0.04 at 240,000 (o and down divided by sqrt(2 L)):
        a head start that wears off, not worth leaving the original for.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                _fill_normal(parameter, 0.02, generator)

    def reset_head(self, seed: int) -> None:
        """Replace the output layer by a fresh one, untied from the embedding, which keeps what it knows."""
        weight = nn.Parameter(torch.empty_like(self.model.embed_tokens.weight))
        _fill_normal(weight, 0.02, torch.Generator().manual_seed(seed))
        self.lm_head.weight = weight
        self.config = replace(self.config, tie_word_embeddings=False)

    @torch.no_grad()
    def resize_vocab(self, vocab_size: int) -> None:
        """Make room for more tokens; each new one starts as the mean of the old, in embedding and output layer.

        Raises:
            ValueError: if that would take tokens away.
        """
        old = self.config.vocab_size
        if vocab_size < old:
            raise ValueError(f"cannot shrink the vocabulary from {old} to {vocab_size}: tokens would be lost")
        for table in (self.model.embed_tokens, self.lm_head):
            rows = table.weight.mean(0, keepdim=True).expand(vocab_size - old, -1)
            table.weight = nn.Parameter(torch.cat([table.weight, rows]))
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = vocab_size
        self.config = replace(self.config, vocab_size=vocab_size)
        self.tie_head()


@torch.no_grad()
def _fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    # on the CPU whatever the default device is, as the generator, so that a seed gives the same weights everywhere
    parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
