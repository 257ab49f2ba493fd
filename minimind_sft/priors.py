"""Pulls towards the base, as strong in each direction as its text depends on it: its Fisher information as a prior.

The information is read once, from text of pretraining (or by the base), before the first step; in training no text is
needed. `EKFAC` is what `model.prior_tokens` turns on; `EWC` is the baseline of the studies, a term for `model.terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minimind_sft.batching import MicroBatch
from minimind_sft.fisher import Basis, Scores, bases_of, moved_bases, shared_bases, turning
from minimind_sft.model import Transformer
from minimind_sft.terms import Term

PRIOR_TOKENS, MOST_PRIOR_TOKENS, LONG_RUN, MOST_PER_TOKEN = 4e6, 16e6, 320, 400  # measured, see docs/forgetting.md


def prior_tokens_for(steps: int, chat_tokens: int) -> float:
    """Tokens of the base's text that a pull stands for in a run of so many steps: 4 million, and in proportion more in
    one of less than 320, up to 16 million. The fewer the steps, the less replay brings back of what the first ones
    moved, and the more is left to the pull. At most 400 for each supervised token of the chats, so that a few dozen of
    them are learned as well.
    """
    return min(MOST_PRIOR_TOKENS, PRIOR_TOKENS * max(1.0, LONG_RUN / steps), MOST_PER_TOKEN * chat_tokens)


class EWC(Term):
    """Elastic weight consolidation: a pull towards the base, the stronger the more its text depends on a weight:

        1/2 * sum over weights of F * (w - w_base)^2

    F is the diagonal of the base's Fisher information, per token, on text to replay (`fisher.Scores`). Near the base,
    the loss is KL(base || model) per token, but for the terms off the diagonal; `weight` is thus on the scale of
    `model.replay_weight`. A backward pass over the text, once; no text in training.
    Source: arXiv 1612.00796.

    Args:
        weight: factor of the loss.
        tokens: of text to estimate F on.
        seed: of the drawn tokens.
    """

    name = "ewc"

    def __init__(self, weight: float = 1.0, tokens: int = 100_000, seed: int = 42) -> None:
        super().__init__(weight)
        if tokens < 1:
            raise ValueError(f"the tokens of {self.name} are {tokens}; it needs at least 1")
        self.tokens, self.seed = tokens, seed
        self.bases: dict[str, Basis] = {}
        self.fisher: dict[str, Tensor] = {}

    def start(self, base: Transformer, control_ids: list[int], *, half: torch.dtype | None) -> None:
        self._base = dict(base.named_parameters())
        self._turning = turning(base.lm_head.weight.device, half=half is not None)

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        self.fisher = {name: broadcast(values) for name, values in self.fisher.items()}
        if self.bases:
            self.bases = shared_bases(self.bases, broadcast)

    def _basis(self, name: str) -> Basis:
        return self.bases.get(name, Basis(None, None))

    def read(self, base: Transformer, text: Iterable[MicroBatch]) -> None:
        self._estimate(Scores(base, text, self.seed))

    def _estimate(self, scores: Scores) -> None:
        base, weights = scores.base, list(self._base.values())
        sums, targets = [torch.zeros_like(weight) for weight in weights], 0
        base.requires_grad_(True)
        for score, drawn in scores:
            gradients = torch.autograd.grad(score, weights, allow_unused=True)
            for name, total, gradient in zip(self._base, sums, gradients, strict=True):
                if gradient is not None:  # an expert that was not asked
                    with torch.autocast(gradient.device.type, enabled=False):  # squares outgrow half precision
                        total += self._basis(name).turned(gradient).square()
            targets += drawn
        base.requires_grad_(False)
        # an estimate that half of the bits are enough for; of bf16, as it spans more than fp16 does
        self.fisher = {
            name: (total / max(1, targets)).bfloat16() for name, total in zip(self._base, sums, strict=True)
        }

    def pull(self, model: Transformer) -> Tensor:
        return self._pull(model, turned=False)

    def _pull(self, model: Transformer, *, turned: bool) -> Tensor:
        """`pull`, to gradients as they are or as they are in the bases."""
        nats = model.lm_head.weight.new_zeros(())
        for name, parameter in model.named_parameters():
            if name not in self._base or not parameter.requires_grad:  # a new output layer has no base
                continue
            basis = self._basis(name)
            with self._turning():
                distance = basis.turned(parameter - self._base[name]).float()
                force = self.fisher[name] * distance
                gradient = force if turned else basis.back(force).float()
            if parameter.grad is None:
                parameter.grad = self.weight * gradient
            else:
                parameter.grad.add_(gradient, alpha=self.weight)
            nats += 0.5 * force.mul_(distance).sum()  # torch.dot takes ten times as long on a CPU
        return nats


class EKFAC(EWC):
    """EWC along the directions that the base's text depends on, instead of along the axes of the weights:

        1/2 * sum over directions of F * (U^T (w - w_base) V)^2

    U and V are the eigenvectors that AdamW's moments are kept in (`fisher.py`), F the Fisher information in that basis.
    There, next to nothing of the Fisher information lies off the diagonal, which is all that EWC knows of it. With F
    per token, n tokens of the base's text beside N supervised tokens of chat give the sum n / N: the Laplace
    approximation of training on both, and the weight that `model.prior_tokens` stands for. The more chats there are,
    the less the pull counts.
    Source: arXiv 1806.03884 (EKFAC); a pull with Kronecker factors, arXiv 1805.07810.

    Attributes:
        bases: by parameter; taken from the text by `read`, where none were given before.
    """

    name = "ekfac"

    def read(self, base: Transformer, text: Iterable[MicroBatch]) -> None:
        scores = Scores(base, list(text), self.seed)
        self.bases = moved_bases(self.bases, base.lm_head.weight.device) or bases_of(scores)
        self._estimate(scores)

    def pull_turned(self, model: Transformer) -> Tensor:
        """`pull`, where the gradients have been turned into `bases` already: a quarter of the turning is saved."""
        return self._pull(model, turned=True)
