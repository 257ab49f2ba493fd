"""The LightningModule: one optimizer step per window, with an exact mean over all its supervised tokens.

Losses travel as sums. A micro-batch's loss is its sum of nats over the *window's* number of targets, times what
Lightning (the number of accumulated micro-batches) and DDP (the number of ranks) will divide by. So 16 x 1, 4 x 4, 1
x 16 and two processes give the same gradient within rounding; Lightning's own mean of micro-batch means does not.

The device is asked once per optimizer step, for the window's loss and the norm of its gradient together, before the
weights change: what is logged, and what stops a run whose loss is no longer a number. Besides, experts ask for their
counts, and several processes whether to stop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from minimind_sft import identity, resume
from minimind_sft.attention import attention_backend, needs_device_cu_seqlens
from minimind_sft.batching import MicroBatch, pack
from minimind_sft.evaluation import sources_of
from minimind_sft.fisher import RotatedAdamW
from minimind_sft.forgetting import PRETRAIN, Meter, Reading
from minimind_sft.frozen import freeze, frozen_copy
from minimind_sft.generate import generate
from minimind_sft.guard import Guard, StepResult
from minimind_sft.holding import Broadcast, Holding
from minimind_sft.losses import cross_entropy
from minimind_sft.memory import checkpoint_bytes
from minimind_sft.model import Transformer
from minimind_sft.optimizing import Optimization
from minimind_sft.probes import answer_text
from minimind_sft.ranges import check_ranges
from minimind_sft.report import later_rows
from minimind_sft.signals import StopRequest
from minimind_sft.starting import Start
from minimind_sft.terms import Term, checked

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule

SCRATCH = "scratch"
MAX_ANSWER_TOKENS = 256


class SFTModule(LightningModule):
    """A MiniMind transformer under full fine-tuning.

    Args:
        weights: the base: a `.pth`, `.safetensors` or `.ckpt` file, a folder that holds one, a Hugging Face folder, a
            run directory (its best), `hf:owner/name` on the hub, or `scratch` for a seeded random initialisation
            (pretraining; nothing to forget yet).
        learning_rate: peak of the schedule; auto: by the model's width, see `schedule.peak_for`.
        warmup_ratio: share of the steps over which the learning rate rises to its peak.
        min_lr_ratio: share of the peak that the cosine ends at.
        weight_decay: AdamW's decoupled decay, on matrices.
        decay_all: decay norms too, as the original does.
        reset_head: give the model a new, untied output layer; the embedding keeps what it knows.
        resize_vocab: where the tokenizer has more tokens than the model, give it rows for them, each the mean of the
            old ones; else that is an error.
        activation_checkpointing: keep what goes into each layer and compute the rest again in the backward pass: a
            third more arithmetic for a fraction of the memory; `fit --plan` prints both.
        replay_loss: what is asked of the replay text (`data.replay_ratio`): kl, to give it the base's distribution, or
            ntp, to predict its next token.
        replay_weight: factor of that loss; 0 is off.
        replay_target: nats per token of KL that the model may be away from the base on replay text: the weight then
            only begins as `replay_weight`, and follows; null for a weight that stays.
        fisher_tokens: tokens of pretraining text (or by the base) from which the Fisher information is taken: 64 of
            them a channel, at most, for the basis that AdamW's moments are kept in, see `fisher.py`, all of them for
            the pull; 0 for AdamW as it is.
        prior_tokens: a pull towards the base in that basis, as strong in each direction as so many tokens of such text
            would be beside the sample's supervised ones, see `priors.EKFAC`; 0 is off; auto: by the number of steps
            and of supervised tokens, see `priors.prior_tokens_for`.
        l2_sp: decay towards the base, decoupled as AdamW's; 0 is off.
        freeze: patterns of parameters that are not trained, as in a shell: "*.mlp.*", or a list of them.
        max_forgetting: nats per token of forgetting above which no reading is the best; null for no bound.
        terms: further losses and pulls, as `class_path` and `init_args`; see `terms.py`.
        family: minimind3 or minimind2; null to tell it from the weights (minimind3 for `scratch`).
        hidden_size: width; for `scratch`, else only checked against the weights.
        num_hidden_layers: depth; likewise.
        num_attention_heads: needed where the weights leave it open (minimind2); null for MiniMind's 8.
        num_key_value_heads: null for the family's default.
        num_experts_per_tok: experts per token of an MoE model, which weights leave open; null for the family's default.
        rope_theta: base of the rotary angles, which a `.pth` leaves open; null for MiniMind's 1e6.
        rms_norm_eps: of the norms, likewise; null for the family's 1e-6 (minimind3) or 1e-5 (minimind2).
        inference_rope_scaling: read 16 times further than trained, by MiniMind's YaRN, likewise.
        aux_scope: the experts' balance loss is taken per document, which splits over micro-batches, or per batch, as
            the original does.
        vocab_size: for `scratch`; null for the tokenizer's size.
        seed: of everything that is initialised at random.

    Raises:
        ValueError: weights that cannot be loaded strictly, or settings that contradict them.
    """

    def __init__(
        self,
        weights: str,
        learning_rate: float | Literal["auto"] = 5e-4,
        warmup_ratio: float = 0.0,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.01,
        decay_all: bool = False,
        reset_head: bool = False,
        resize_vocab: bool = False,
        activation_checkpointing: bool = False,
        replay_loss: Literal["kl", "ntp"] = "kl",
        replay_weight: float = 1.0,
        replay_target: float | None = None,
        fisher_tokens: int = 0,
        prior_tokens: float | Literal["auto"] = 0.0,
        l2_sp: float = 0.0,
        freeze: str | list[str] | None = None,
        max_forgetting: float | None = None,
        terms: list[Term] | None = None,
        family: str | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        num_experts_per_tok: int | None = None,
        rope_theta: float | None = None,
        rms_norm_eps: float | None = None,
        inference_rope_scaling: bool = False,
        aux_scope: Literal["document", "batch"] = "document",
        vocab_size: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_ranges(
            "model",
            learning_rate=learning_rate,
            warmup_ratio=warmup_ratio,
            min_lr_ratio=min_lr_ratio,
            weight_decay=weight_decay,
            rope_theta=rope_theta,
            rms_norm_eps=rms_norm_eps,
            max_forgetting=max_forgetting,
        )
        self.holding = Holding(
            replay_loss=replay_loss,
            replay_weight=replay_weight,
            replay_target=replay_target,
            l2_sp=l2_sp,
            fisher_tokens=fisher_tokens,
            prior_tokens=prior_tokens,
            seed=seed,
            more=terms,
        )
        self.optimization = Optimization(learning_rate, warmup_ratio, min_lr_ratio, weight_decay, decay_all)
        self.activation_checkpointing, self.aux_scope = activation_checkpointing, aux_scope
        self.frozen = [freeze] if isinstance(freeze, str) else freeze or []
        self.max_forgetting = max_forgetting
        self.start = Start(
            family=family,
            shape={
                "hidden_size": hidden_size,
                "num_hidden_layers": num_hidden_layers,
                "num_attention_heads": num_attention_heads,
                "num_key_value_heads": num_key_value_heads,
                "vocab_size": vocab_size,
            },
            constants={
                "rope_theta": rope_theta,
                "rms_norm_eps": rms_norm_eps,
                "inference_rope_scaling": inference_rope_scaling,
            },
            num_experts_per_tok=num_experts_per_tok,
            reset_head=reset_head,
            resize_vocab=resize_vocab,
            seed=seed,
        )
        self.baseline: Reading | None = None
        self.guard, self.stop = Guard(), StopRequest()
        self.last_step: StepResult | None = None
        self.model: Transformer
        if weights != SCRATCH:
            self.model = self.start.load(weights)

    @property
    def from_scratch(self) -> bool:
        """Whether there was no base: nothing to compare with, nothing to forget."""
        return self.start.sha256 is None

    @property
    def base(self) -> Transformer:
        """The model as it is, with the base's output layer; before training, the base."""
        return self.model if self.start.head is None else frozen_copy(self.model, self.start.head)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """With the base in place of the model, before the first step; where the output layer is not new, they are one.
        What is forgotten is the base's, not that of random weights."""
        own, self.model = self.model, self.base
        try:
            yield
        finally:
            self.model = own

    def configure_model(self) -> None:
        """Build what needs the tokenizer: a model from scratch, rows for new tokens, and the meter."""
        data = self.data
        if not hasattr(self, "model"):
            self.model = self.start.scratch(data.template.vocab_size)
        self.start.fit_vocab(self.model, data.template.vocab_size)
        self.model.activation_checkpointing = self.activation_checkpointing
        freeze(self.model, self.frozen)
        if self.trainer.state.fn == "fit" and self.from_scratch:
            self.holding.refuse_scratch()
        elif self.trainer.state.fn == "fit":  # now, because a checkpoint is restored next
            plan = data.plan
            self.holding.choose(
                self.model,
                self.start.head,
                steps=self.total_steps,
                chat_tokens=plan.most_targets,
                replay=plan.replay is not None,
            )
        if not hasattr(self, "meter"):
            text = data.evaluation.get(PRETRAIN)
            self.meter = Meter(list(data.evaluation), sources_of(text).names if text else [""])

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            identity.check_alike(self.data)
        if self.nothing_left:
            return
        with self.trainer.precision_plugin.forward_context():
            self.holding.start(
                self.device,
                self.data.template.control_ids,
                half=self._half,
                read=self._text_to_read,
                broadcast=self._broadcast,
            )

    def on_train_start(self) -> None:
        """Find the basis that AdamW's moments are kept in, the same on every rank. A run that resumes has its own;
        where it pulls, moments and pull share one copy."""
        if not self.trainer.global_step or self.holding.prior is not None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, RotatedAdamW)
            with self.trainer.precision_plugin.forward_context():
                found = self.holding.bases(self._text_to_read, self._broadcast)
            optimizer.turn({self.model.get_parameter(name): basis for name, basis in found.items()})
        self.holding.release()

    @property
    def _broadcast(self) -> Broadcast | None:
        return self._first_ranks if self.trainer.world_size > 1 else None

    def _first_ranks(self, value: Any) -> Any:
        """What the first process has; of a tensor, which must have one shape everywhere, without a copy on the CPU."""
        if not isinstance(value, Tensor):
            return self.trainer.strategy.broadcast(value)
        value = value.contiguous()
        torch.distributed.broadcast(value.view(-1).view(torch.uint8), 0)  # bytes, which every backend sends
        return value

    @property
    def tokens_to_read(self) -> int:
        """How much text is read before the first step, by terms and for the optimizer's basis."""
        return 0 if self.from_scratch else self.holding.tokens_to_read

    def _text_to_read(self, tokens: int) -> Iterator[MicroBatch]:
        assert self.data.spare_text is not None
        if self.trainer.is_global_zero:
            step = f"step {self.data.start_step + 1:,}" if self.data.start_step else "the first step"
            told = f"up to {tokens:,} tokens of the base's text, before {step}"
            print(later_rows([("reading", told)]), flush=True)
        for rows in self.data.spare_text.first(tokens):
            yield self.transfer_batch_to_device(pack(rows), self.device, 0)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **settings: Any) -> SFTModule:  # type: ignore[override]
        """The model of a checkpoint, ready to use; `settings` are those of the constructor."""
        return cls(weights=str(checkpoint_path), **settings)

    @property
    def data(self) -> SFTDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ---- training

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: where neither epochs nor steps bound it.
        """
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        for name, count in (("max_epochs", epochs), ("max_steps", steps)):
            if count == 0:
                raise ValueError(f"trainer.{name} is 0, which trains nothing; give at least 1, or -1 for no such bound")
        bounds = [limit for limit in (self.data.plan.windows * (epochs or -1), steps) if limit > 0]
        if not bounds:
            raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
        return min(bounds)

    @property
    def nothing_left(self) -> bool:
        """Whether a resumed run already took its last step."""
        return self.data.start_step >= self.total_steps

    def configure_optimizers(self) -> Optimizer:
        self.optimization.check_decays(self.model.config.hidden_size, l2_sp=self.holding.l2_sp)
        return self.optimization.adamw(
            self.model, self.device, half=self._half is not None, scaled=self._scaler is not None
        )

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the window's mean loss; see the module's docstring for its scale."""
        accumulate = self.trainer.accumulate_grad_batches
        flat, config = batch.batch, self.model.config
        rows = (flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)
        balance = None
        if config.num_experts:
            hidden, balance = self.model.hidden_and_balance(*rows, aux_scope=self.aux_scope)
        else:
            hidden = self.model.hidden(*rows)
        nats = cross_entropy(hidden, flat.labels, batch.targets, self.model.lm_head.weight)
        loss, shares = nats / batch.window_targets, [nats.detach()]
        for term in self.holding.losses:
            share = checked(term, "loss", term.loss(self.model, hidden, batch))
            shares.append(share.detach())
            loss = loss + term.weight * share
        if batch_idx % accumulate == 0:
            self._window = torch.zeros(len(shares), dtype=torch.float64, device=nats.device)
        self._window += torch.stack(shares)
        self._window_targets = batch.window_targets
        if balance is not None and batch.has_documents:  # else there is one token that is nobody's
            loss = loss + balance / batch.window_tokens
        return loss * accumulate * self.trainer.world_size

    def _nats(self, batch: MicroBatch) -> Tensor:
        flat = batch.batch
        hidden = self.model.hidden(flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)
        return cross_entropy(hidden, flat.labels, batch.targets, self.model.lm_head.weight)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Set the learning rate and decay of this step, then step."""
        for group, decay in zip(optimizer.param_groups, self.optimization.decays, strict=True):
            group["lr"], group["weight_decay"] = self.learning_rate_now(), decay  # a checkpoint's must not win
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.guard.skipped and not self.guard.overflows:
            with torch.no_grad():
                for term in self.holding.terms:
                    term.after_step(self.model, optimizer.param_groups[0]["lr"])
            assert self.last_step is not None
            for term in self.holding.losses + self.holding.pulls:
                term.observe(self.last_step.terms[term.name])

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule."""
        return self.optimization.peak(self.model.config.hidden_size)

    def learning_rate_now(self) -> float:
        """Learning rate of the step that comes next."""
        return self.optimization.rate(self.trainer.global_step + 1, self.total_steps, self.model.config.hidden_size)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Pull, clip, and look at the step before it is taken: the only place where training asks the device.

        Gradients are in the optimizer's basis from here on: their norm is the same there, and values are clipped there.

        Raises:
            ValueError: loss or gradient is not finite; the weights have not changed yet.
        """
        assert isinstance(optimizer, RotatedAdamW)
        with torch.no_grad():
            pulled = [nats.double().view(1) for nats in self.holding.pull(self.model, optimizer)]
        norm = self._clip(gradient_clip_val, by_value=gradient_clip_algorithm == "value")
        self.last_step = self._result(norm, pulled, optimizer.param_groups[0]["lr"])
        if not self.guard.takes(self.last_step, self._window_documents, scaled=self._scaler is not None):
            optimizer.zero_grad(set_to_none=True)  # nothing to step with: weights and moments stay

    def _clip(self, limit: float | None, *, by_value: bool) -> Tensor:
        """Clip, not by Lightning, which refuses to clip values for a fused optimizer; the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if by_value or not limit else limit)
        if by_value and limit:  # behind the norm: what is clipped is always finite
            torch.nn.utils.clip_grad_value_(self.model.parameters(), limit)
        return norm

    def _result(self, norm: Tensor, pulled: list[Tensor], learning_rate: float) -> StepResult:
        """What the window came to, of all ranks, read from the device at once."""
        sums = torch.cat([self._window, self._window.new_tensor([self.stop.received is not None])])
        if self.trainer.world_size > 1:  # Lightning's `reduce` has all processes wait for each other first
            torch.distributed.all_reduce(sums)
        terms = self.holding.losses + self.holding.pulls
        grad_norm, nats, *shares, stopping = torch.cat([norm.double()[None], sums[:-1], *pulled, sums[-1:]]).tolist()
        return StepResult(
            step=self.trainer.global_step + 1,
            loss=nats / self._window_targets,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            terms={term.name: share for term, share in zip(terms, shares, strict=True)},
            weights={term.name: term.weight for term in terms},
            stopping=stopping > 0,
        )

    def _window_documents(self) -> list[str]:
        """The documents of the window that is being learned from, as `file:line`."""
        plan, store = self.data.plan, self.data.plan.documents.store
        epoch, window = divmod(self.trainer.global_step, plan.windows)
        return [store.where(number) for number in plan.window_documents(epoch, window).tolist()]

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # ---- looking

    def validation_step(self, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch's sums to the meter."""
        self.meter.update(dataloader_idx, self._nats(batch), len(batch.targets), batch.target_bytes, batch.source)

    def on_validation_epoch_start(self) -> None:
        self.meter.reset()

    def on_validation_epoch_end(self) -> None:
        """For the verb `validate`; `fit` measures through a callback."""
        metrics = self.meter.read(self.trainer.global_step).metrics(self.baseline)
        self.log_dict({name: torch.tensor(value) for name, value in metrics.items()})

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """Answer every prompt greedily."""
        template = self.data.template
        answers = generate(
            self.model,
            [row["prompt_ids"] for row in batch],
            max_new_tokens=MAX_ANSWER_TOKENS,
            stop_ids=template.stop_ids,
        )
        return [
            {name: row[name] for name in ("where", "messages", "reference")} | {"answer": answer_text(template, ids)}
            for row, ids in zip(batch, answers, strict=True)
        ]

    # ---- device and checkpoints

    @property
    def checkpoint_bytes(self) -> int:
        """About what one checkpoint of `fit` takes on disk."""
        bases = self.holding.fisher_tokens > 0 and not self.from_scratch
        return checkpoint_bytes(self.model.config, bases=bases)

    @property
    def _half(self) -> torch.dtype | None:
        """The half-precision type that training multiplies in, if it does."""
        dtypes = {"bf16": torch.bfloat16, "16-": torch.float16}
        precision = str(self.trainer.precision)
        return next((dtype for start, dtype in dtypes.items() if precision.startswith(start)), None)

    @property
    def attention(self) -> str:
        """The attention that training runs with."""
        return attention_backend(self.device, self._half or torch.float32, self.model.config.head_dim)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a micro-batch; boundaries stay on the host where attention reads them there."""
        if not isinstance(batch, MicroBatch):
            return batch
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if not needs_device_cu_seqlens(self.attention):
            moved = moved._replace(batch=moved.batch._replace(cu_seqlens=batch.batch.cu_seqlens))
            if batch.replay is not None:
                base = moved.replay.base._replace(cu_seqlens=batch.replay.base.cu_seqlens)
                moved = moved._replace(replay=moved.replay._replace(base=base))
        return moved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        resume.note(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the baseline; for `fit`, find the window that comes next.

        Raises:
            ValueError: a checkpoint of another base, of another model, or of other data.
        """
        resume.take_over(self, checkpoint)
