"""What happens around a training step: looking at the model, logging, and the screen.

Everything counts optimizer steps. At the end of a window the order is: log the step, measure, and only then save
(`checkpoints.Checkpoints`, which Lightning runs last), so that a resumed run has lost no reading.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from minimind_sft.evaluation import affordable_interval, evaluation_tokens
from minimind_sft.forgetting import Reading
from minimind_sft.records import MetricsFile

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule
    from minimind_sft.module import SFTModule


@dataclass(frozen=True)
class Intervals:
    """Optimizer steps between two lines of the log, two readings, two checkpoints."""

    log_every: int
    val_every: int
    save_every: int

    @classmethod
    def resolve(
        cls, data: SFTDataModule, *, log_every: int, val_every: int | None, save_every: int | None
    ) -> Intervals:
        """Fill in what was left open.

        A checkpoint every 100 steps or quarter of an epoch; a reading as often as costs about 5 % of the time, at most
        with every checkpoint and at least once an epoch.

        Raises:
            ValueError: an interval below 1.
        """
        for name, value in (("log", log_every), ("val", val_every), ("save", save_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}_every_steps is {value}; it counts optimizer steps and must be at least 1")
        plan = data.plan
        save = save_every or max(1, min(100, plan.windows // 4))
        affordable = affordable_interval(evaluation_tokens(data.evaluation), float(plan.epoch(0).window_tokens.mean()))
        return cls(log_every, val_every or min(max(affordable, save), plan.windows), save)


class Measure(Callback):
    """Reads the meter at step 0, every `val_every` steps and after the last one.

    Its state in a checkpoint is every reading so far, so that a resumed run tells the same story.

    Args:
        log_every, val_every, save_every: see `Intervals.resolve`.
        max_forgetting: nats of forgetting above which a reading cannot be the best; None for no bound.
        patience: readings in a row without a new best after which training ends; None to train to the end.

    Raises:
        ValueError: a patience below 1.
    """

    def __init__(
        self,
        *,
        log_every: int,
        val_every: int | None,
        save_every: int | None,
        max_forgetting: float | None = None,
        patience: int | None = None,
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience is {patience}; it counts readings and must be at least 1, or null to go on")
        self._asked = {"log_every": log_every, "val_every": val_every, "save_every": save_every}
        self.max_forgetting, self.patience = max_forgetting, patience
        self.readings: list[Reading] = []
        self.seconds = 0.0  # of the last look
        self.intervals: Intervals

    @property
    def best(self) -> Reading | None:
        """The reading with the lowest loss after step 0 within `max_forgetting`, the earliest of equals; where none is
        within it, the one that forgot least."""
        scored = [reading for reading in self.readings if reading.step and reading.score is not None]
        within = [reading for reading in scored if self.within(reading)]
        if within or not scored:
            return min(within, key=lambda reading: (reading.score, reading.step), default=None)
        return min(scored, key=lambda reading: (reading.pretrain_loss, reading.step))

    def within(self, reading: Reading) -> bool:
        """Whether a reading forgot no more than `max_forgetting`."""
        base = self.readings[0].pretrain_loss
        if self.max_forgetting is None or base is None or reading.pretrain_loss is None:
            return True
        return reading.pretrain_loss - base <= self.max_forgetting

    @property
    def at_plateau(self) -> bool:
        """Whether `patience` is at its end."""
        best = self.best
        if self.patience is None or best is None:
            return False
        return sum(reading.step > best.step for reading in self.readings) >= self.patience

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.intervals = Intervals.resolve(trainer.datamodule, **self._asked)  # type: ignore[attr-defined, arg-type]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:
            reading = self.look(trainer, pl_module)
            if not pl_module.from_scratch:
                pl_module.baseline = reading
            self._log(trainer, pl_module, reading)
            for logger in trainer.loggers:
                logger.save()
        trainer.should_stop = self.at_plateau  # of a run that is resumed

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if step % self.intervals.val_every == 0 or step == pl_module.total_steps:
            self._log(trainer, pl_module, self.look(trainer, pl_module))
            trainer.should_stop = self.at_plateau

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or self.best is None:
            return
        if self.at_plateau:
            print(f"stopped at step {trainer.global_step}: no better reading since step {self.best.step}", flush=True)
        if not self.within(self.best):
            print(
                f"no reading was within model.max_forgetting = {self.max_forgetting:g}; best.ckpt is the one that "
                f"forgot least, of step {self.best.step}",
                flush=True,
            )

    def look(self, trainer: pl.Trainer, pl_module: SFTModule) -> Reading:
        """Score the model as it is on every evaluation document, and keep the reading."""
        started = time.monotonic()
        pl_module.meter.reset()
        with evaluating(trainer, pl_module):
            for number, loader in enumerate(trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
                for position, batch in enumerate(loader):
                    moved = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
                    pl_module.validation_step(moved, position, number)
        reading = pl_module.meter.read(trainer.global_step)
        self.readings.append(reading)
        self.seconds = time.monotonic() - started
        return reading

    def _log(self, trainer: pl.Trainer, pl_module: SFTModule, reading: Reading) -> None:
        metrics = reading.metrics(pl_module.baseline)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch_of(trainer, pl_module, reading.step)} | metrics, step=reading.step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"readings": [asdict(reading) for reading in self.readings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.readings = [Reading(**reading) for reading in state_dict["readings"]]


@contextmanager
def evaluating(trainer: pl.Trainer, pl_module: SFTModule) -> Iterator[None]:
    """Evaluation mode and precision, without gradients."""
    pl_module.eval()
    try:
        with torch.inference_mode(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        pl_module.train()


def epoch_of(trainer: pl.Trainer, pl_module: SFTModule, step: int) -> float:
    """Epochs done after `step` optimizer steps."""
    windows = trainer.datamodule.plan.windows  # type: ignore[attr-defined]
    return round(step / windows, 6)


class StepLog(Callback):
    """Logs every `log_every` steps: a progress bar on a terminal, else one plain line.

    Args:
        measure: knows the intervals and what a reading costs.
        bar: whether to draw a bar; None for "where standard output is a terminal".
    """

    def __init__(self, measure: Measure, bar: bool | None = None) -> None:
        self.measure = measure
        self.bar = sys.stdout.isatty() if bar is None else bar
        self._progress: Progress | None = None
        self._window_started = 0.0
        self._busy, self._tokens, self._steps = 0.0, 0, 0  # since the last line
        self._step_seconds = 0.0  # smoothed

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.cut_after(trainer.global_step)
        if self.bar and trainer.is_global_zero:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._progress = Progress(*columns, console=Console())
            self._progress.start()
            done, total = trainer.global_step, pl_module.total_steps
            self._task = self._progress.add_task("training", total=total, completed=done, line="")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window_started = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        result, plan = pl_module.last_step, trainer.datamodule.plan  # type: ignore[attr-defined]
        epoch, window = divmod(result.step - 1, plan.windows)
        seconds = time.monotonic() - self._window_started
        self._busy += seconds
        self._tokens += int(plan.epoch(epoch).window_tokens[window])
        self._step_seconds = 0.9 * self._step_seconds + 0.1 * seconds if self._step_seconds else seconds
        if result.step % self.measure.intervals.log_every and result.step != pl_module.total_steps:
            return
        speed = self._tokens / self._busy
        self._busy, self._tokens = 0.0, 0
        row = {
            "epoch": epoch_of(trainer, pl_module, result.step),
            "train/loss": result.loss,
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            **{f"train/{name}": value for name, value in result.terms.items()},
            "tokens_per_second": round(speed, 1),
            "seconds": round(time.time(), 1),
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, step=result.step)
        if trainer.is_global_zero:
            self._show(trainer, pl_module, epoch, speed)

    def _show(self, trainer: pl.Trainer, pl_module: SFTModule, epoch: int, speed: float) -> None:
        result, total = pl_module.last_step, pl_module.total_steps
        assert result is not None
        left = total - result.step
        looks = math.ceil(left / self.measure.intervals.val_every)
        eta = duration(left * self._step_seconds + looks * self.measure.seconds)
        line = f"loss {result.loss:.4f}  lr {result.learning_rate:.2e}  {speed:,.0f} tokens/s  ETA {eta}"
        if self._progress is not None:
            self._progress.update(self._task, completed=result.step, line=line)
        else:
            epochs = math.ceil(total / trainer.datamodule.plan.windows)  # type: ignore[attr-defined]
            print(f"epoch {epoch + 1}/{epochs}  step {result.step}/{total}  {line}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
