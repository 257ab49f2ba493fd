"""The LightningModule: one optimizer step per window, with an exact mean over all its supervised tokens.

Losses travel as sums. A micro-batch's loss is its sum of nats over the *window's* number of targets, times what
Lightning (the number of accumulated micro-batches) and DDP (the number of ranks) will divide by. So 16 x 1, 4 x 4, 1
x 16 and two processes give the same gradient within rounding; Lightning's own mean of micro-batch means does not.

The device is asked once per optimizer step, for the window's loss and the norm of its gradient together, before the
weights change: what is logged, and what stops a run whose loss is no longer a number.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer

from minimind_sft import weights as weight_files
from minimind_sft.attention import attention_backend, needs_device_cu_seqlens
from minimind_sft.batching import MicroBatch
from minimind_sft.files import resolve
from minimind_sft.forgetting import Meter, Reading
from minimind_sft.generate import generate
from minimind_sft.guard import Guard, StepResult
from minimind_sft.losses import cross_entropy
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.probes import answer_text
from minimind_sft.resume import set_progress
from minimind_sft.schedule import learning_rate_at

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule

SCRATCH = "scratch"
MAX_ANSWER_TOKENS = 256


class SFTModule(LightningModule):
    """A MiniMind transformer under full fine-tuning.

    Args:
        weights: the base: a `.pth`, `.safetensors` or `.ckpt` file, a folder that holds one, or `scratch` for a seeded
            random initialisation (pretraining; nothing to forget yet).
        learning_rate: peak of the schedule.
        warmup_ratio: share of the steps over which the learning rate rises to its peak.
        min_lr_ratio: share of the peak that the cosine ends at.
        weight_decay: AdamW's decoupled decay, on matrices.
        decay_all: decay norms too, as the original does.
        reset_head: give the model a new, untied output layer; the embedding keeps what it knows.
        family: minimind3 or minimind2; null to tell it from the weights (minimind3 for `scratch`).
        hidden_size: width; for `scratch`, else only checked against the weights.
        num_hidden_layers: depth; likewise.
        num_attention_heads: needed where the weights leave it open (minimind2); null for MiniMind's 8.
        num_key_value_heads: null for the family's default.
        num_experts_per_tok: experts per token of an MoE model, which weights leave open; null for the family's default.
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
        learning_rate: float = 5e-4,
        warmup_ratio: float = 0.0,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.01,
        decay_all: bool = False,
        reset_head: bool = False,
        family: str | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        num_experts_per_tok: int | None = None,
        aux_scope: Literal["document", "batch"] = "document",
        vocab_size: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if not 0.0 <= warmup_ratio < 1.0:
            raise ValueError(f"model.warmup_ratio is {warmup_ratio}; it is a share of the steps, from 0 to below 1")
        if not 0.0 <= min_lr_ratio <= 1.0:
            raise ValueError(f"model.min_lr_ratio is {min_lr_ratio}; it is a share of model.learning_rate, from 0 to 1")
        if not learning_rate > 0.0:
            raise ValueError(f"model.learning_rate is {learning_rate}; it must be above 0")
        self.learning_rate, self.warmup_ratio, self.min_lr_ratio = learning_rate, warmup_ratio, min_lr_ratio
        self.weight_decay, self.decay_all, self.seed = weight_decay, decay_all, seed
        self.reset_head = reset_head
        self._shape = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "vocab_size": vocab_size,
        }
        self._family, self._num_experts_per_tok, self.aux_scope = family, num_experts_per_tok, aux_scope
        self.base_sha256: str | None = None  # None: there is no base
        self.description = "random weights"
        self.baseline: Reading | None = None
        self.guard = Guard()
        self.last_step: StepResult | None = None
        self.model: Transformer
        if weights != SCRATCH:
            self._load(weights)

    @property
    def from_scratch(self) -> bool:
        """Whether there was no base: nothing to compare with, nothing to forget."""
        return self.base_sha256 is None

    def _load(self, source: str) -> None:
        self.model, loaded = weight_files.load_model(
            resolve(source),
            family=self._family,
            num_attention_heads=self._shape["num_attention_heads"],
            num_key_value_heads=self._shape["num_key_value_heads"],
            num_experts_per_tok=self._num_experts_per_tok,
        )
        for name, wanted in self._shape.items():
            found = getattr(loaded.config, name)
            if wanted is not None and wanted != found:
                raise ValueError(f"model.{name} is {wanted}, but {loaded.path} has {found}; leave model.{name} out")
        self.base_sha256, self.description = loaded.sha256, loaded.describe()
        if self.reset_head:
            self.model.reset_head(self.seed)

    def configure_model(self) -> None:
        """Build what needs the tokenizer: a model from scratch, and the meter."""
        data = self._data
        if not hasattr(self, "model"):
            make = ModelConfig.minimind2 if self._family == "minimind2" else ModelConfig.minimind3
            shape: dict[str, Any] = {name: value for name, value in self._shape.items() if value is not None}
            self.model = Transformer(make(**{"vocab_size": data.template.vocab_size} | shape))
            self.model.initialise(self.seed)
            if self.reset_head:
                self.model.reset_head(self.seed)
        weight_files.check_vocab(data.template.vocab_size, self.model.config)
        if not hasattr(self, "meter"):
            self.meter = Meter(list(data.evaluation))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **settings: Any) -> SFTModule:  # type: ignore[override]
        """The model of a checkpoint, ready to use; `settings` are those of the constructor."""
        return cls(weights=str(checkpoint_path), **settings)

    @property
    def _data(self) -> SFTDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ---- training

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: where neither epochs nor steps bound it.
        """
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        bounds = [limit for limit in (self._data.plan.windows * (epochs or -1), steps) if limit > 0]
        if not bounds:
            raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
        return min(bounds)

    def configure_optimizers(self) -> Optimizer:
        parameters = list(self.model.parameters())
        # always these two groups, whatever is decayed: a checkpoint knows parameters by their place
        groups = [[p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]]
        decays = self._weight_decays()
        # with a gradient scaler, a fused optimizer unscales by itself and Lightning then refuses to clip
        fused = self.device.type == "cuda" and self._scaler is None
        return AdamW(
            [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)],
            lr=self.learning_rate,
            fused=fused,
        )

    def _weight_decays(self) -> tuple[float, float]:
        """Of matrices, and of norms."""
        return self.weight_decay, self.weight_decay if self.decay_all else 0.0

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the window's mean loss; see the module's docstring for its scale."""
        accumulate = self.trainer.accumulate_grad_batches
        nats, balance = self._nats_and_balance(batch) if self.model.config.num_experts else (self._nats(batch), None)
        if batch_idx % accumulate == 0:
            self._window_nats = torch.zeros((), dtype=torch.float64, device=nats.device)
        self._window_nats += nats.detach()
        self._window_targets = batch.window_targets
        loss = nats / batch.window_targets
        if balance is not None and len(batch.targets):  # a rank without documents has one token that is nobody's
            loss = loss + balance / batch.window_tokens
        return loss * accumulate * self.trainer.world_size

    def _nats_and_balance(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        flat = batch.batch
        hidden, balance = self.model.hidden_and_balance(
            flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length, aux_scope=self.aux_scope
        )
        vocab_size = self.model.config.vocab_size
        return cross_entropy(hidden, flat.labels, batch.targets, self.model.logits, vocab_size), balance

    def _nats(self, batch: MicroBatch) -> Tensor:
        flat = batch.batch
        hidden = self.model.hidden(flat.input_ids, flat.positions, flat.cu_seqlens, flat.max_length)
        return cross_entropy(hidden, flat.labels, batch.targets, self.model.logits, self.model.config.vocab_size)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Set the learning rate and decay of this step, then step."""
        for group, decay in zip(optimizer.param_groups, self._weight_decays(), strict=True):
            group["lr"], group["weight_decay"] = self.learning_rate_now(), decay  # a checkpoint's must not win
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def learning_rate_now(self) -> float:
        """Learning rate of the step that comes next."""
        return learning_rate_at(
            self.trainer.global_step + 1,
            self.total_steps,
            peak=self.learning_rate,
            warmup_ratio=self.warmup_ratio,
            min_lr_ratio=self.min_lr_ratio,
        )

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, and look at the step before it is taken: the only place where training asks the device.

        Raises:
            ValueError: loss or gradient is not finite; the weights have not changed yet.
        """
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            gradient_clip_val = None
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val or math.inf)
        nats = self.trainer.strategy.reduce(self._window_nats, reduce_op="sum")
        loss, grad_norm = torch.stack([nats / self._window_targets, norm.double()]).tolist()
        step = self.trainer.global_step + 1
        self.last_step = StepResult(step, loss, grad_norm, optimizer.param_groups[0]["lr"])
        if not self.guard.takes(self.last_step, self._window_documents, scaled=self._scaler is not None):
            optimizer.zero_grad(set_to_none=True)  # nothing to step with: weights and moments stay

    def _window_documents(self) -> list[str]:
        """The documents of the window that is being learned from, as `file:line`."""
        plan, store = self._data.plan, self._data.plan.documents.store
        epoch, window = divmod(self.trainer.global_step, plan.windows)
        return [store.where(number) for number in plan.window_documents(epoch, window).tolist()]

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # ---- looking

    def validation_step(self, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch's sums to the meter."""
        self.meter.update(dataloader_idx, self._nats(batch), len(batch.targets), batch.target_bytes)

    def on_validation_epoch_start(self) -> None:
        self.meter.reset()

    def on_validation_epoch_end(self) -> None:
        """For the verb `validate`; `fit` measures through a callback."""
        metrics = self.meter.read(self.trainer.global_step).metrics(self.baseline)
        self.log_dict({name: torch.tensor(value) for name, value in metrics.items()})

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """Answer every prompt greedily."""
        template = self._data.template
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
    def attention(self) -> str:
        """The attention that training runs with."""
        dtypes = {"bf16": torch.bfloat16, "16-": torch.float16}
        precision = str(self.trainer.precision)
        dtype = next((dtype for start, dtype in dtypes.items() if precision.startswith(start)), torch.float32)
        return attention_backend(self.device, dtype, self.model.config.head_dim)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a micro-batch; boundaries stay on the host where attention reads them there."""
        if not isinstance(batch, MicroBatch):
            return batch
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if not needs_device_cu_seqlens(self.attention):
            moved = moved._replace(batch=moved.batch._replace(cu_seqlens=batch.batch.cu_seqlens))
        return moved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = {"model_config": asdict(self.model.config)}
        checkpoint["minimind_sft"] = {
            "base_sha256": self.base_sha256,
            "baseline": asdict(self.baseline) if self.baseline else None,
            "plan": self._data.identity,
            "settings": self._settings(),
            "guard": self.guard.state_dict(),
        }

    def _settings(self) -> dict[str, Any]:
        """What may differ in a run that resumes; the YAML and the command line win."""
        trainer = self.trainer
        return {
            "model.learning_rate": self.learning_rate,
            "model.warmup_ratio": self.warmup_ratio,
            "model.min_lr_ratio": self.min_lr_ratio,
            "model.weight_decay": self.weight_decay,
            "model.decay_all": self.decay_all,
            "trainer.max_epochs": trainer.max_epochs,
            "trainer.max_steps": trainer.max_steps,
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "threads": torch.get_num_threads(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the baseline; for `fit`, find the window that comes next.

        Raises:
            ValueError: a checkpoint of another base, of other data, or not one of ours.
        """
        ours = checkpoint.get("minimind_sft")
        if ours is None:
            raise ValueError(
                "the checkpoint was not written by minimind_sft; pass it as model.weights to start from it"
            )
        if ours["base_sha256"] != self.base_sha256:
            raise ValueError(
                f"the checkpoint was trained from another base (SHA-256 {str(ours['base_sha256'])[:12]}, "
                f"model.weights has "
                f"{str(self.base_sha256)[:12]}); its forgetting cannot be measured against this one. Set "
                f"model.weights to "
                "the base it started from, or start a new run from the checkpoint with model.weights"
            )
        self.baseline = Reading(**ours["baseline"]) if ours["baseline"] else None
        if self.trainer.state.fn == "fit":
            self._data.check_identity(ours["plan"])
            plan = self._data.plan
            self._tell_differences(ours["settings"])
            self.guard.load_state_dict(ours["guard"])
            self._data.start_step = set_progress(checkpoint, windows=plan.windows, accumulate=plan.accumulate)

    def _tell_differences(self, saved: dict[str, Any]) -> None:
        changed = [
            f"{name} {saved.get(name)} -> {now}" for name, now in self._settings().items() if saved.get(name) != now
        ]
        if changed and self.trainer.is_global_zero:
            print(f"settings that differ from the checkpoint's: {', '.join(changed)}", flush=True)
