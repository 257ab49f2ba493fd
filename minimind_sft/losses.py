"""Token losses as sums: every function returns (sum of nats, count of tokens), never a mean.

Means are taken once, over a whole window (`module.py`), which is what makes 16 x 1 = 4 x 4 = 1 x 16. Only the hidden
states that are asked for something reach the output layer: with 40 % of the tokens supervised and a vocabulary of
6,400, that saves more than half of the largest matrix product.

Shapes: N tokens of a micro-batch, M of them targets, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Project = Callable[[Tensor], Tensor]  # (M, H) -> (M, V)

MAX_LOGITS = 1 << 27  # 512 MiB in fp32; above it the logits are made in chunks, and again in the backward pass


def perplexity(nats: float) -> float:
    """exp of nats per token; infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def cross_entropy(hidden: Tensor, labels: Tensor, targets: Tensor, project: Project, vocab_size: int) -> Tensor:
    """Sum of -log p(label) over the targets, in nats.

    Args:
        hidden: (N, H), after the final norm.
        labels: (N,) int64.
        targets: (M,) int64, where `labels` counts; may be empty.
        project: the output layer.
        vocab_size: V, which decides how many logits fit at once.

    Returns:
        () fp32. The count is `len(targets)`.
    """
    selected, wanted = hidden[targets], labels[targets]
    rows = max(1, MAX_LOGITS // vocab_size)
    if len(wanted) <= rows:
        return _chunk_nats(selected, wanted, project)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, chunk_wanted in zip(selected.split(rows), wanted.split(rows), strict=True):
        total = total + checkpoint(_chunk_nats, chunk, chunk_wanted, project, use_reentrant=False)
    return total


def _chunk_nats(hidden: Tensor, wanted: Tensor, project: Project) -> Tensor:
    return F.cross_entropy(project(hidden).float(), wanted, reduction="sum")
