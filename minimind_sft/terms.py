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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minimind_sft.batching import MicroBatch, Replayed
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
        """Called behind `read` where several processes train: take what `broadcast` gives for what was read, a tensor
        or any object, which is what the first process read. All ask in the same order, for tensors of one shape.
        Rounding is not the same on all devices, and differing pulls would go unseen.
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


def checked(term: Term, method: str, nats: Any) -> Tensor:
    """What a term's `loss` or `pull` gave.

    Raises:
        ValueError: it is no tensor of shape ().
    """
    if isinstance(nats, Tensor) and not nats.ndim:
        return nats
    given = f"a tensor of shape {tuple(nats.shape)}" if isinstance(nats, Tensor) else f"a {type(nats).__name__}"
    raise ValueError(f"model.terms: {method} of {type(term).__name__} gave {given}; it must give a tensor of shape ()")


def _replay_of(batch: MicroBatch, term: Term) -> Replayed:
    if batch.replay is None:
        raise ValueError(f"model.terms: {type(term).__name__} needs text to replay; set data.replay_ratio above 0")
    return batch.replay


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
        replay = _replay_of(batch, self)
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
        replay = _replay_of(batch, self)
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
