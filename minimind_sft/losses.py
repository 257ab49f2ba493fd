"""Token losses as sums: every function returns a sum of nats, to be divided by a count of tokens, never a mean.

Means are taken once, over a whole window (`module.py`), which is what makes 16 x 1 = 4 x 4 = 1 x 16. Only the hidden
states that are asked for something reach the output layer: with 40 % of the tokens supervised and a vocabulary of
6,400, that saves more than half of the largest matrix product.

Output layer and loss are one operation. The gradient of a softmax's loss is known with its logits (q - p), so both are
made chunk by chunk in the forward pass: no logit is kept or made twice, and a chunk stays in a CPU's cache (the idea of
Liger Kernel, arXiv 2410.10989). Against autograd's cross-entropy and KL over 1,400 rows of 6,400 logits, forward and
backward on one core: 1.2 and 1.5 times as fast at H 256, 1.4 and 2 times at H 64.

Shapes: N tokens of a micro-batch, M of them targets, H hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimind_sft.chunks import rows_at_once

_SUMS_IN_FP32 = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None  # since torch 2.8

# rows of the M, their logits (R, V) in fp32 -> sum of nats (), its gradient by the logits (R, V), which may reuse them
Chunk = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(hidden: Tensor, labels: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Sum of -log p(label) over the targets, in nats.

    Args:
        hidden: (N, H), after the final norm.
        labels: (N,) int64.
        targets: (M,) int64, where `labels` counts; may be empty.
        weight: (V, H) of the output layer.

    Returns:
        () fp32. The count is `len(targets)`.
    """
    wanted = labels[targets, None]  # (M, 1)

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.log_softmax(-1)
        at_label = log_q.gather(1, wanted[rows])  # (R, 1)
        return -at_label.sum(), log_q.exp_().scatter_(1, wanted[rows], at_label.exp() - 1.0)

    return _sum(hidden[targets], weight, chunk)


def kl_divergence(hidden: Tensor, base_hidden: Tensor, weight: Tensor, base_weight: Tensor) -> Tensor:
    """Sum of KL(base || model) over positions, in nats, over the whole vocabulary.

    sum_v p(v) (log p(v) - log q(v)), p the base's distribution and q the model's: the forward direction, which asks the
    model to keep what the base gives weight to (Li and Hoiem, Learning without Forgetting, arXiv 1606.09282).

    Args:
        hidden: (M, H), after the final norm.
        base_hidden: (M, H) of the same positions; no gradient goes there.
        weight: (V, H) of the model's output layer.
        base_weight: (V, H) of the base's.

    Returns:
        () fp32, zero where M is 0.
    """
    base_matrix = base_weight.to(_multiplied_in(base_weight))

    def chunk(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = _logits(base_hidden[rows], base_matrix).log_softmax(-1)
        log_q = logits.log_softmax(-1)
        p = log_p.exp()
        with torch.autocast(p.device.type, enabled=False):  # else in half precision
            nats = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
        return nats, log_q.exp_().sub_(p)

    return _sum(hidden, weight, chunk)


def _sum(hidden: Tensor, weight: Tensor, chunk: Chunk) -> Tensor:
    if torch.is_grad_enabled():
        return _SumOfLosses.apply(hidden, weight, chunk)
    return _in_chunks(hidden, weight, chunk, None, None)


class _SumOfLosses(torch.autograd.Function):
    """The sum of a loss of softmax(hidden @ weight.T) over rows; its gradients are ready when the sum is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk: Chunk) -> Tensor:
        to_hidden, to_weight = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        )
        total = _in_chunks(hidden, weight, chunk, to_hidden, to_weight)
        ctx.save_for_backward(to_hidden, to_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_hidden, to_weight = (tensor if tensor is None else tensor * gradient for tensor in ctx.saved_tensors)
        return to_hidden, to_weight, None


def _logits(states: Tensor, matrix: Tensor) -> Tensor:
    """states @ matrix.T (R, V) in fp32, multiplied in autocast's type where it is on.

    A GPU adds in fp32, and that is what it gives: rounded to bf16, logits of 16 to 32 are up to 0.06 off, and the
    gradient of a KL of 0.0002 nats by more than half of itself. A CPU, and torch before 2.8, round them.
    """
    states, matrix = (tensor.to(_multiplied_in(matrix)) for tensor in (states, matrix))
    if states.is_cuda and states.dtype != torch.float32 and _SUMS_IN_FP32:
        return torch.mm(states, matrix.t(), out_dtype=torch.float32)
    return F.linear(states, matrix).float()


def _multiplied_in(matrix: Tensor) -> torch.dtype:
    """Autocast's type where it is on, else the matrix's own."""
    device = matrix.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype


def _in_chunks(
    hidden: Tensor, weight: Tensor, chunk: Chunk, to_hidden: Tensor | None, to_weight: Tensor | None
) -> Tensor:
    """The sum over all rows (M, H); gradients are written to (M, H) and added to (V, H) where these are given.

    Matrices are multiplied in autocast's type where it is on; losses are taken in fp32.
    """
    dtype = _multiplied_in(weight)
    matrix, step = weight.to(dtype), rows_at_once(len(weight), weight.device.type)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        states = hidden[rows].to(dtype)
        nats, gradient = chunk(rows, _logits(states, matrix))
        total += nats
        gradient = gradient.to(dtype)
        if to_hidden is not None:
            to_hidden[rows] = gradient @ matrix
        if to_weight is not None and to_weight.dtype == dtype:
            to_weight.addmm_(gradient.t(), states)
        elif to_weight is not None:
            to_weight += gradient.t() @ states
    return total

