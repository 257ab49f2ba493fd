"""Terms: what is added to a window's loss or gradient, or done after a step, to hold on to what the model knew.

A term gets a frozen copy of the base before training, which lives outside the module and is neither trained nor
saved. Losses are sums over the window's own count, as everywhere (`losses.py`), so a term splits over
micro-batches and ranks like the loss that it is added to.

One's own term is a class with these methods, named in the YAML under `model.terms`:

    terms:
      - class_path: my_package.MyTerm
        init_args: {weight: 0.1}
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minimind_sft.batching import MicroBatch
from minimind_sft.fisher import Basis, Scores, bases_of, matmul_precision, shared_bases, turning_precision
from minimind_sft.losses import cross_entropy, kl_divergence
from minimind_sft.model import Transformer
from minimind_sft.weight_control import adapted


class Term:
    """Something that holds on; does nothing by itself.

    Args:
        weight: factor of its loss.

    Attributes:
        name: under which it is logged, as `train/<name>`, in nats before the weight.
        tokens: how many tokens of the base's text, in whole documents that are not measured on, are handed to `read`.
        adapts: whether the weight changes on the way, so that a run which resumes takes it from the checkpoint.
    """

    name = "term"
    tokens = 0
    adapts = False

    def __init__(self, weight: float = 1.0) -> None:
        if not weight >= 0.0:
            raise ValueError(f"the weight of {self.name} is {weight}; it must not be negative")
        self.weight = weight

    def start(self, base: Transformer, control_ids: list[int], *, half: torch.dtype | None) -> None:
        """Look at the base, on its device, before the first step (and again in a process that resumes).

        Args:
            base: the model as it was loaded, frozen; all terms share it, so none may change it.
            control_ids: the ids of the tokenizer's control tokens.
            half: the type that the device multiplies fastest, where that is a half-precision one.
        """

    def read(self, base: Transformer, text: Iterable[MicroBatch]) -> None:
        """Called behind `start` where `tokens` asks for text, in the base's own framing, short documents together."""

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        """Called behind `read` where several processes train: take what `broadcast` gives for what was read, which is
        what the first process read. Rounding is not the same on all devices, and differing pulls would go unseen.
        """

    def loss(self, model: Transformer, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """The micro-batch's share of the window's loss, (), before the weight. Not asked where it is not overridden.

        Args:
            model: as it is now.
            hidden: (N, C) its states for the micro-batch, after the final norm.
            batch: the micro-batch, with chats and replay text.
        """
        raise NotImplementedError

    def pull(self, model: Transformer) -> Tensor:
        """Of a loss of the weights alone: add its gradient, times the weight, to `grad` of what is trained.

        Called without autograd once a window, behind the backward pass and before clipping, on every rank alike. Not
        asked where it is not overridden; a term has this or a `loss`.

        Returns:
            The loss, (), before the weight.
        """
        raise NotImplementedError

    def after_step(self, model: Transformer, learning_rate: float) -> None:
        """Called without gradients after an optimizer step that was taken with this learning rate."""

    def observe(self, nats: float) -> None:
        """Called after a step with the whole window's loss of this term, before the weight, the same on every rank."""


class ReplayKL(Term):
    """KL(base || model) on the replay text, the mean over its tokens.

    The base's whole distribution is kept, not only the next token that happens to stand there; nothing new is learned
    from the replay text. The base's layers lie in half precision where the device is good at it.

    Source: arXiv 1606.09282 (Learning without Forgetting), with text of pretraining instead of the new task's.

    Args:
        weight: factor of the loss; with a target, of the first step's.
        target: the KL that the weight is to bring about, in nats per token, see `weight_control.py`; None for a weight
            that stays.
    """

    name = "replay"

    def __init__(self, weight: float = 1.0, target: float | None = None) -> None:
        super().__init__(weight)
        self.target, self.adapts = target, target is not None
        self._window_targets = 0

    def observe(self, nats: float) -> None:
        if self.target is not None and self._window_targets:  # a window without replay says nothing of the distance
            self.weight = adapted(self.weight, nats, self.target)

    def start(self, base: Transformer, control_ids: list[int], *, half: torch.dtype | None) -> None:
        self._base = base if half is None else _with_layers_in(half, base)

    def loss(self, model: Transformer, hidden: Tensor, batch: MicroBatch) -> Tensor:
        replay = batch.replay
        assert replay is not None
        self._window_targets = replay.window_targets
        if not len(replay.targets):
            return hidden.new_zeros((), dtype=torch.float32)
        text = replay.base
        with torch.no_grad():
            kept = self._base.hidden(text.input_ids, text.positions, text.cu_seqlens, text.max_length)
        nats = kl_divergence(
            hidden[replay.targets], kept[replay.base_targets], model.lm_head.weight, self._base.lm_head.weight
        )
        return nats / replay.window_targets


def _with_layers_in(half: torch.dtype, base: Transformer) -> Transformer:
    """A copy to run under autocast, whose layers' matrices lie in half precision. Embedding and norms stay in fp32, and
    with them what the layers add up to: as in the model, so that as long as it is the base, KL is exactly 0; and fp16
    does not overflow."""
    copied = copy.deepcopy(base)
    for module in copied.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.to(half)
    return copied


class ReplayNextToken(Term):
    """Next-token loss on the replay text, the mean over its tokens: experience replay, which also goes on learning from
    that text. Source: arXiv 2403.08763."""

    name = "replay"

    def loss(self, model: Transformer, hidden: Tensor, batch: MicroBatch) -> Tensor:
        replay = batch.replay
        assert replay is not None
        nats = cross_entropy(hidden, batch.batch.labels, replay.targets, model.lm_head.weight)
        return nats / max(1, replay.window_targets)


class L2SP(Term):
    """Decay towards the base instead of towards zero, decoupled from the gradient as in AdamW:

        w <- w - lr * weight * (w - w_base)

    Rows of control tokens in the embedding (and output layer) are left alone, because pretraining may never have
    trained them. Source: arXiv 1802.01483 (L2-SP), decoupled as in arXiv 1711.05101.
    """

    name = "l2_sp"

    def start(self, base: Transformer, control_ids: list[int], *, half: torch.dtype | None) -> None:
        self._base = dict(base.named_parameters())
        self._control = torch.tensor(control_ids, dtype=torch.long, device=base.lm_head.weight.device)

    def after_step(self, model: Transformer, learning_rate: float) -> None:
        for name, parameter in model.named_parameters():
            if name not in self._base or not parameter.requires_grad:  # a new output layer has no base
                continue
            pull = parameter - self._base[name]
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                pull[self._control] = 0.0
            parameter.sub_(pull, alpha=learning_rate * self.weight)


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
        self._precision = turning_precision(tensor_cores=half is not None and base.lm_head.weight.is_cuda)

    def share(self, broadcast: Callable[[Any], Any]) -> None:
        fisher = broadcast({name: values.to("cpu") for name, values in self.fisher.items()})
        self.fisher = {name: values.to(self._base[name].device) for name, values in fisher.items()}
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
            with matmul_precision(self._precision):
                distance = basis.turned(parameter - self._base[name])
                force = self.fisher[name] * distance
                gradient = self.weight * (force if turned else basis.back(force))
            nats += 0.5 * torch.sum(force * distance)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
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
        given = {name: basis.to(base.lm_head.weight.device) for name, basis in self.bases.items()}
        self.bases = given or bases_of(scores)
        self._estimate(scores)

    def pull_turned(self, model: Transformer) -> Tensor:
        """`pull`, where the gradients have been turned into `bases` already: a quarter of the turning is saved."""
        return self._pull(model, turned=True)


def freeze(model: Transformer, patterns: Sequence[str]) -> None:
    """Train no parameter whose name matches one of the patterns, as in a shell.

    Raises:
        ValueError: a pattern that matches nothing; nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(f"model.freeze: no parameter is called {pattern!r}; there are {', '.join(names)[:400]}")
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model.freeze {list(patterns)} leaves nothing to train")


def frozen_copy(model: Transformer, head: Tensor | None) -> Transformer:
    """A copy that is not trained. Where an output layer (V, C) is given, the copy reads with that one, and has no
    parameter `lm_head.weight`: the model's is new, and nothing to be held to."""
    base = copy.deepcopy(model).requires_grad_(False).eval()
    if head is not None:
        more = base.config.vocab_size - len(head)  # a vocabulary that was resized, as `Transformer.resize_vocab` does
        rows = torch.cat([head, head.mean(0, keepdim=True).expand(more, -1)]).detach().clone()
        del base.lm_head.weight
        base.lm_head.register_buffer("weight", rows)  # not a parameter, which terms would pull the new one towards
    return base
