"""What is said of a step: a progress bar or a line on the screen, and a row for the loggers."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from minimind_sft.measuring import Measure, epoch_of
from minimind_sft.records import MetricsFile

if TYPE_CHECKING:
    from minimind_sft.module import SFTModule


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
        pl_module.stop.listen()  # before the base is looked at, which takes a while
        # Lightning would ask all processes before every micro-batch whether one was told to stop
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
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
        terms = dict(result.terms)
        if plan.replay is not None and not len(plan.epoch(epoch).replay[window]):
            terms.pop("replay", None)  # of a window that replays nothing, nothing is known
        row = {
            "epoch": epoch_of(trainer, pl_module, result.step),
            "train/loss": result.loss,
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            **{f"train/{name}": value for name, value in terms.items()},
            **{f"{name}_weight": value for name, value in result.weights.items()},
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
        look = self.measure.seconds * self.measure.intervals.live_share
        eta = duration(left * self._step_seconds + looks * look)
        line = f"loss {result.loss:.4f}  lr {result.learning_rate:.2e}  {speed:,.0f} tokens/s  ETA {eta}"
        if self._progress is not None:
            self._progress.update(self._task, completed=result.step, line=line)
        else:
            epochs = math.ceil(total / trainer.datamodule.plan.windows)  # type: ignore[attr-defined]
            pl_module.stop.say(f"epoch {epoch + 1}/{epochs}  step {result.step}/{total}  {line}")

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
