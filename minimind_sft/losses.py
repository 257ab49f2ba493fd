"""Token losses as sums: every function returns (sum of nats, count of tokens), never a mean.

Means are taken once, over a whole window (`module.py`), which is what makes 16 x 1 = 4 x 4 = 1 x 16. Only the hidden
states that are asked for something reach the output layer: with 40 % of the tokens supervised and a vocabulary of
6,400, that saves more than half of the largest matrix product.

Shapes: N tokens of a micro-batch, M of them targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Project = Callable[[Tensor], Tensor]  # (M, H) -> (M, V)

MAX_LOGITS = 1 << 27  # 512 MiB in fp32; above it the logits are made in chunks, and again in the backward pass


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

    def nats(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(project(hidden).float(), wanted, reduction="sum")

    return _in_chunks(nats, hidden[targets], labels[targets], vocab_size)


def kl_divergence(
    hidden: Tensor, base_hidden: Tensor, project: Project, base_project: Project, vocab_size: int
) -> Tensor:
    """Sum of KL(base || model) over positions, in nats, over the whole vocabulary.

    sum_v p(v) (log p(v) - log q(v)), p the base's distribution and q the model's: the forward direction, which asks the
    model to keep what the base gives weight to (Li and Hoiem, Learning without Forgetting, arXiv 1606.09282).

    Args:
        hidden, base_hidden: (M, H) of the same positions, after the final norm; the base's without gradient.
        project, base_project: the two output layers.
        vocab_size: V.

    Returns:
        () fp32, zero where M is 0.
    """

    def nats(hidden: Tensor, base_hidden: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(base_project(base_hidden).float(), dim=-1)
        return F.kl_div(F.log_softmax(project(hidden).float(), dim=-1), wanted, reduction="sum", log_target=True)

    return _in_chunks(nats, hidden, base_hidden, 2 * vocab_size)


def _in_chunks(nats: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor, logits_each: int) -> Tensor:
    """Sum of `nats` over rows (M, ...), as many at once as `MAX_LOGITS` lets; the rest is made again going back."""
    rows = max(1, MAX_LOGITS // logits_each)
    if len(hidden) <= rows:
        return nats(hidden, other)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, chunk_other in zip(hidden.split(rows), other.split(rows), strict=True):
        total = total + checkpoint(nats, chunk, chunk_other, use_reentrant=False)
    return total
