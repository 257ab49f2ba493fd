"""Looking at the model in training: what is read when, what it says, and which reading is the best.

Everything counts optimizer steps. At the end of a window the order is: log the step (`step_log.py`), measure, and only
then save (`checkpoints.Checkpoints`, which Lightning runs last), so that a resumed run has lost no reading.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from minimind_sft.baselines import Baseline, Baselines
from minimind_sft.batching import MicroBatch
from minimind_sft.forgetting import PRETRAIN, Reading
from minimind_sft.intervals import Intervals
from minimind_sft.readings import numbers_first

if TYPE_CHECKING:
    from minimind_sft.data import SFTDataModule
    from minimind_sft.module import SFTModule


class Measure(Callback):
    """Reads the meter at step 0, every `val_every` steps and after the last one.

    Its state in a checkpoint is every reading so far, so that a resumed run tells the same story. What readings between
    the first and the last read is `intervals.py`'s.

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
        self.live_start: Reading | None = None  # of step 0, on the documents that are looked at in between
        self.by_live: dict[int, Reading] = {}  # what whole looks after step 0 would have been by those alone, by step
        self.lost: set[int] = set()  # steps of readings whose weights a run that resumed no longer has
        self.seconds = 0.0  # of the last whole look
        self.base_is_known = False  # whether an earlier run looked at the base
        self.intervals: Intervals

    @property
    def best(self) -> Reading | None:
        """The reading with the lowest loss after step 0 within `max_forgetting`, the earliest of equals; where none is
        within it, the one that forgot least. All are judged by the same documents; `lost` ones are none, nor is one
        whose loss is no number."""
        judged = {reading.step: self._judged(reading) for reading in self.readings}
        there = [reading for reading in self.readings if reading.step and reading.step not in self.lost]
        scored = [reading for reading in there if reading.score is not None and math.isfinite(reading.score)]
        within = [reading for reading in scored if self.within(reading)]
        if within or not scored:
            return min(within, key=lambda reading: (judged[reading.step].score, reading.step), default=None)
        return min(scored, key=lambda reading: (numbers_first(judged[reading.step].pretrain_loss), reading.step))

    def _judged(self, reading: Reading) -> Reading:
        """The reading by the live documents alone."""
        return self.by_live.get(reading.step, reading)

    def within(self, reading: Reading) -> bool:
        """Whether a reading forgot no more than `max_forgetting`."""
        base, reading = self.readings[0].pretrain_loss, self._judged(reading)
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
        """Take the intervals that follow from the data.

        Raises:
            ValueError: a bound or a patience, and nothing measured that they could go by.
        """
        measured = trainer.datamodule.evaluation  # type: ignore[attr-defined]
        if self.max_forgetting is not None and PRETRAIN not in measured:
            raise ValueError(
                f"model.max_forgetting is {self.max_forgetting:g}, but no text is measured on; set data.heldout_path, "
                "data.pretrain_path or data.own_documents, or model.max_forgetting to null"
            )
        if self.patience is not None and not measured:
            raise ValueError(
                f"patience is {self.patience}, but nothing is measured on; set data.val_path, or patience to null"
            )
        self.intervals = Intervals.resolve(
            trainer.datamodule,  # type: ignore[attr-defined]
            total_steps=pl_module.total_steps,
            **self._asked,  # type: ignore[arg-type]
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:
            reading = self._look_at_base(trainer, pl_module)
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
            last = step == pl_module.total_steps
            reading = self.look(trainer, pl_module, whole=last)
            if self.at_plateau and not last and self.intervals.live_share < 1:  # this is the end, so all is looked at
                self.readings.pop()
                reading = self.look(trainer, pl_module, whole=True)
            self._log(trainer, pl_module, reading)
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

    def _look_at_base(self, trainer: pl.Trainer, pl_module: SFTModule) -> Reading:
        baselines = Baselines(trainer.datamodule, pl_module, self.intervals.live_share)  # type: ignore[attr-defined]
        if (known := baselines.find()) is not None:
            self.readings.append(known.reading)
            self.live_start, self.seconds, self.base_is_known = known.live, known.seconds, True
            return known.reading
        with pl_module.as_base():
            reading = self.look(trainer, pl_module, whole=True)
        baselines.keep(Baseline(reading, self.live_start, self.seconds))
        return reading

    def look(self, trainer: pl.Trainer, pl_module: SFTModule, *, whole: bool) -> Reading:
        """Score the model as it is, and keep the reading.

        Args:
            whole: on every evaluation document; else on the live ones, as a change since step 0.
        """
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        share, started = self.intervals.live_share, time.monotonic()
        whole = whole or self.live_start is None or share == 1
        pl_module.meter.reset()
        with evaluating(trainer, pl_module):
            self._score(trainer, pl_module, data.evaluation_loaders(share))
            reading = pl_module.meter.read(trainer.global_step)
            if whole and share < 1:
                live = reading
                self._score(trainer, pl_module, data.evaluation_loaders(share, rest=True))
                reading = pl_module.meter.read(trainer.global_step)
                if trainer.global_step == 0:
                    self.live_start = live
                elif self.live_start is not None:
                    self.by_live[trainer.global_step] = live.moved(self.live_start, self.readings[0])
        if whole:
            self.seconds = time.monotonic() - started
        else:
            assert self.live_start is not None
            reading = reading.moved(self.live_start, self.readings[0])
        self.readings.append(reading)
        return reading

    def _score(self, trainer: pl.Trainer, pl_module: SFTModule, loaders: list[DataLoader[MicroBatch]]) -> None:
        for number, loader in enumerate(loaders):
            for position, batch in enumerate(loader):
                moved = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
                pl_module.validation_step(moved, position, number)

    def _log(self, trainer: pl.Trainer, pl_module: SFTModule, reading: Reading) -> None:
        metrics = reading.metrics(pl_module.baseline)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch_of(trainer, pl_module, reading.step)} | metrics, step=reading.step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def state_dict(self) -> dict[str, Any]:
        return {
            "readings": [asdict(reading) for reading in self.readings],
            "by_live": {step: asdict(reading) for step, reading in self.by_live.items()},
            "live_start": None if self.live_start is None else asdict(self.live_start),
            "live_share": self.intervals.live_share,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.readings = [Reading(**reading) for reading in state_dict["readings"]]
        # a run from before there were live documents goes on with whole looks
        self.by_live = {step: Reading(**reading) for step, reading in state_dict.get("by_live", {}).items()}
        live = state_dict.get("live_start")
        self.live_start = None if live is None else Reading(**live)
        self.intervals = replace(self.intervals, live_share=state_dict.get("live_share", 1.0))


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
