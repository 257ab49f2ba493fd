"""What `validate` prints and `predict` writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from minimind_sft.report import aligned


class PrintReading(Callback):
    """What is measured, and one line per measure, by the names that `fit` logs.

    Args:
        measured: the checkpoint; None for the weights that the settings name.
        weights: of the settings.
    """

    def __init__(self, measured: str | None, weights: str) -> None:
        self._told = measured or f"{weights} (model.weights, as no --ckpt_path is given)"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            rows = [("measured", self._told)]
            rows += [(name, f"{value.item():.6f}") for name, value in trainer.callback_metrics.items()]
            print(aligned(rows), flush=True)


class WritePredictions(Callback):
    """Answers as JSON lines: `where`, `messages`, `reference`, `answer`, in the order of the prompts.

    Of several ranks, each answers every so-many-th prompt, and the first one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._rows += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shares: list[list[dict[str, Any]] | None] = [self._rows]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self._rows)
        if not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        in_order = itertools.chain.from_iterable(itertools.zip_longest(*(share or () for share in shares)))
        rows = {row["where"]: row for row in in_order if row is not None}  # some may have been answered twice
        with open(self.path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        print(f"answers in {self.path}", flush=True)
