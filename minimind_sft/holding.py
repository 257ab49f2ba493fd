"""What holds on to the base in one run: terms, a frozen copy of the base that they share, and the optimizer's basis.

It lives outside the module's children, so that nothing here is trained or saved as a weight. Whatever reads text before
the first step gets documents of pretraining, or by the base, that nobody measures on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from minimind_sft.batching import MicroBatch
from minimind_sft.fisher import Basis, RotatedAdamW, Scores, bases_of, most_tokens, shared_bases
from minimind_sft.frozen import frozen_copy
from minimind_sft.model import Transformer
from minimind_sft.priors import EKFAC, prior_tokens_for
from minimind_sft.ranges import check_ranges
from minimind_sft.terms import L2SP, ReplayKL, ReplayNextToken, Term, checked

Read = Callable[[int], Iterable[MicroBatch]]  # whole documents of so many tokens, on the device
Broadcast = Callable[[Any], Any]  # what the first process has; tensors stay on their device


class Holding:
    """The settings, checked, and what comes of them.

    Args:
        replay_loss: ``kl`` or ``ntp``.
        replay_weight: factor of that loss; 0 is off.
        replay_target: the KL that the weight is to follow; None for a weight that stays.
        l2_sp: decay towards the base; 0 is off.
        fisher_tokens: of text to read the optimizer's basis and the pull from; 0 is off.
        prior_tokens: how many tokens of its text the pull towards the base in that basis stands for; 0 is off; auto:
            by the number of steps and of chats, see `priors.prior_tokens_for`, from `choose` on that number.
        seed: of the tokens that are drawn for the basis.
        more: terms of the user's.

    Attributes:
        terms: those at work, in the order in which they are logged.
        losses: those of them that add to a micro-batch's loss.
        pulls: those that add to a step's gradient.
        prior: the pull that `prior_tokens` asks for, once `choose` took it; else None.

    Raises:
        ValueError: settings that make no sense.
    """

    def __init__(
        self,
        *,
        replay_loss: str,
        replay_weight: float,
        replay_target: float | None,
        l2_sp: float,
        fisher_tokens: int,
        prior_tokens: float | Literal["auto"],
        seed: int,
        more: list[Term] | None,
    ) -> None:
        check_ranges(
            "model", replay_weight=replay_weight, fisher_tokens=fisher_tokens, prior_tokens=prior_tokens, l2_sp=l2_sp
        )
        if replay_target is not None and not replay_target > 0.0:
            raise ValueError(
                f"model.replay_target is {replay_target}; it is nats per token, above 0, or null for a fixed weight"
            )
        if replay_target is not None and replay_loss != "kl":
            raise ValueError(
                f"model.replay_target is a KL, which model.replay_loss {replay_loss} does not take; set it to null"
            )
        if replay_target is not None and not replay_weight:
            raise ValueError(
                "model.replay_target has no effect with model.replay_weight 0, which turns replay off; give the weight "
                "that it begins with, such as 1"
            )
        if prior_tokens and not fisher_tokens:
            raise ValueError(
                f"model.prior_tokens is {prior_tokens}, but model.fisher_tokens 0 leaves no text to read the "
                "Fisher information from; set it to 50000, or model.prior_tokens to 0"
            )
        self.replay_loss, self.replay_weight, self.replay_target = replay_loss, replay_weight, replay_target
        self.l2_sp, self.fisher_tokens, self.prior_tokens = l2_sp, fisher_tokens, prior_tokens
        self._seed, self._more = seed, more or []
        for term in self._more:
            kind = type(term).__name__
            if not hasattr(term, "weight"):
                raise ValueError(f"model.terms: {kind} has no weight; let its __init__ call super().__init__(weight)")
            if term.name == "loss":
                raise ValueError(f"model.terms: {kind} is named loss, as what the chats give; give it another name")
            if _overrides(term, "loss") and _overrides(term, "pull"):
                raise ValueError(f"model.terms: {kind} has both a loss and a pull; make two terms of it")
        self.prior: EKFAC | None = None
        self.terms: list[Term] = []
        self.losses: list[Term] = []
        self.pulls: list[Term] = []
        self._base: Transformer | None = None
        self._chosen = False

    @property
    def tokens_to_read(self) -> int:
        """How much text is read before the first step."""
        return max(self.fisher_tokens, *(term.tokens for term in self._more), 0)

    def tokens_of_basis(self, model: Transformer) -> int:
        """How many of them the optimizer's basis is taken from."""
        return min(self.fisher_tokens, most_tokens(model.config.hidden_size))

    @property
    def own_losses(self) -> list[str]:
        """The names of the user's terms that do either."""
        return [term.name for term in self._more if _overrides(term, "loss") or _overrides(term, "pull")]

    def refuse_scratch(self) -> None:
        """Without a base there is nothing to hold on to; what `sft.yaml` has on is left out.

        Raises:
            ValueError: settings that ask for more than that.
        """
        asked = {"model.l2_sp": self.l2_sp, "model.terms": len(self._more)}
        if on := [name for name, value in asked.items() if value]:
            raise ValueError(
                f"{' and '.join(on)} hold on to a base, and model.weights is scratch; leave them out, or give a base"
            )

    def choose(
        self, model: Transformer, head: Tensor | None, *, steps: int, chat_tokens: int, replay: bool
    ) -> None:
        """Take what the settings name, and a copy of the base where anything looks at it; once.

        Args:
            model: before the first step and before a checkpoint is restored.
            head: the base's output layer (V, C), where the model has another.
            steps: of the whole run.
            chat_tokens: supervised ones of the sample, which the base's prior tokens are weighed against.
            replay: whether there is text to replay.

        Raises:
            ValueError: two terms of one name, under which both would be logged.
        """
        if self._chosen:
            return
        self._chosen = True
        if replay and self.replay_weight:
            kl = self.replay_loss == "kl"
            self.terms.append(
                ReplayKL(self.replay_weight, self.replay_target) if kl else ReplayNextToken(self.replay_weight)
            )
        if self.l2_sp:
            self.terms.append(L2SP(self.l2_sp))
        if isinstance(self.prior_tokens, str):
            self.prior_tokens = prior_tokens_for(steps, chat_tokens)
        if self.prior_tokens:
            self.prior = EKFAC(self.prior_tokens / chat_tokens, self.fisher_tokens, self._seed)
            self.terms.append(self.prior)
        self.terms += self._more
        names = [term.name for term in self.terms]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"model.terms: {' and '.join(sorted(twice))} would be logged twice under one name; leave one out, or "
                "give its class another name"
            )
        self.losses = [term for term in self.terms if _overrides(term, "loss")]
        self.pulls = [term for term in self.terms if _overrides(term, "pull")]
        if self.terms or self.fisher_tokens:
            self._base = frozen_copy(model, head)

    def go_on_in(self, bases: Mapping[str, Basis]) -> None:
        """Behind `choose`, in a run that resumes: pull in the bases that its moments are kept in, by parameter. Read
        again, on other threads or another device, they would not be quite the same."""
        if self.prior is not None:
            self.prior.bases = dict(bases)

    def start(
        self,
        device: torch.device,
        control_ids: list[int],
        *,
        half: torch.dtype | None,
        read: Read,
        broadcast: Broadcast | None,
    ) -> None:
        """Show the base to the terms, and text to those that ask for it; arguments as in `Term.start` and `Term.share`,
        None where there is one process."""
        if self._base is None:
            return
        self._base.to(device)
        for term in self.terms:
            term.start(self._base, control_ids, half=half)
            if term.tokens:
                term.read(self._base, read(term.tokens))
                if broadcast is not None:
                    term.share(broadcast)

    def bases(self, read: Read, broadcast: Broadcast | None) -> Mapping[str, Basis]:
        """What the optimizer's moments are to be kept in, by parameter, the same in every process; empty where that is
        off. With a pull, its own tensors."""
        if self._base is None or not self.fisher_tokens:
            return {}
        if self.prior is not None:
            return self.prior.bases
        found = bases_of(Scores(self._base, read(self.tokens_of_basis(self._base)), self._seed))
        return found if broadcast is None else shared_bases(found, broadcast)

    def pull(self, model: Transformer, optimizer: RotatedAdamW) -> list[Tensor]:
        """Let every pull add to the gradients, and turn them into the optimizer's basis.

        Returns:
            The losses, (), in the order of `pulls`.
        """
        nats = {term.name: checked(term, "pull", term.pull(model)) for term in self.pulls if term is not self.prior}
        optimizer.turn_gradients()
        if self.prior is not None:
            nats[self.prior.name] = self.prior.pull_turned(model)
        return [nats[term.name] for term in self.pulls]

    def release(self) -> None:
        """Let go of the base, once it was shown and read: terms that look at it in training have it, or a copy in
        half precision."""
        self._base = None


def _overrides(term: Term, method: str) -> bool:
    return getattr(type(term), method) is not getattr(Term, method)
