"""Mixture-of-experts feed-forward layers of both generations, and the loss that keeps experts evenly used.

Tokens are sorted by expert once per layer; each expert then multiplies its own contiguous rows. There is no loop over
tokens and no masking. An expert that nobody chose multiplies zero rows: next to no work, and its gradient is zero
rather than absent, which DistributedDataParallel needs. The price is one read of the counts per layer.

The balance loss is taken per document and weighted by its tokens, so that it does not depend on how a window is dealt
into micro-batches; ``batch`` scope takes it over all tokens together, as the original MiniMind-3 does.

Shapes: N tokens, D documents, C hidden size, X experts, k of them per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_sft.model_config import ModelConfig

AUX_SCOPES = ("document", "batch")


class Routing(NamedTuple):
    """What one layer's router said."""

    probabilities: Tensor  # (N, X)
    chosen: Tensor  # (N, k) int64


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared ones where the family has them."""

    shared_experts: nn.ModuleList | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.num_experts_per_tok, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(*sizes) for _ in range(config.num_experts))
        shared = config.num_shared_experts
        self.shared_experts = nn.ModuleList(FeedForward(*sizes) for _ in range(shared)) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(N, C) -> (N, C), and what the router said."""
        probabilities = self.gate(x).softmax(-1)  # (N, X)
        weights, chosen = probabilities.topk(self.num_experts_per_tok)  # (N, k)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        order = chosen.flatten().argsort(stable=True)  # places (N k), expert by expert
        rows = x.index_select(0, order // self.num_experts_per_tok)
        counts = _counts(chosen.flatten(), len(self.experts)).tolist()
        parts = [expert(part) for expert, part in zip(self.experts, rows.split(counts), strict=True)]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        outputs = torch.cat(parts).index_select(0, back).unflatten(0, chosen.shape)  # (N, k, C)
        y = (outputs * weights[..., None]).sum(1).type_as(x)
        for shared in self.shared_experts or ():
            y = y + shared(x)
        return y, Routing(probabilities, chosen)


def _counts(numbers: Tensor, size: int) -> Tensor:
    """(size,) how often each number occurs; `bincount` would ask the device for the least and the largest."""
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))


def balance_loss(routings: Sequence[Routing], config: ModelConfig, documents: Tensor, num_documents: int) -> Tensor:
    """Sum over layers and documents of tokens times coefficient times X sum(f p); a model without experts gets 0.

    f is the share of a document's tokens that chose an expert, p the mean probability the router gave it; evenly used
    experts give the minimum. MiniMind-2 divides by k besides.

    Args:
        routings: one per layer.
        documents: (N,) which document a token belongs to; all zeros takes the batch as one.
        num_documents: D.

    Returns:
        () fp32: divide by the number of tokens for a mean.
    """
    total = documents.new_zeros((), dtype=torch.float32)
    if not routings:
        return total
    lengths = _counts(documents, num_documents).clamp_min(1)[:, None]  # (D, 1)
    scale = config.router_aux_loss_coef * config.num_experts
    if config.family == "minimind2":
        scale /= config.num_experts_per_tok
    for probabilities, chosen in routings:
        hits = F.one_hot(chosen, config.num_experts).sum(1).float()  # (N, X)
        used, given = (  # (D, X) sums over each document
            values.new_zeros(num_documents, config.num_experts).index_add(0, documents, values)
            for values in (hits, probabilities.float())
        )
        total = total + scale * (used * given / lengths).sum()
    return total
