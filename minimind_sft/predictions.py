"""What `validate` prints and `predict` writes."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from minimind_sft.files import write_whole
from minimind_sft.report import aligned


def which(checkpoint: str | None, weights: str) -> str:
    """What a verb reads: the checkpoint, or where none is given, the weights that the settings name."""
    return checkpoint or f"{weights} (model.weights, as no --ckpt_path is given)"


class PrintReading(Callback):
    """What is measured, and one line per measure, by the names that `fit` logs.

    Args:
        measured: the checkpoint; None for the weights that the settings name.
        weights: of the settings.
    """

    def __init__(self, measured: str | None, weights: str) -> None:
        self._told = which(measured, weights)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            rows = [("measured", self._told)]
            rows += [(name, f"{value.item():.6f}") for name, value in trainer.callback_metrics.items()]
            print(aligned(rows), flush=True)


class WritePredictions(Callback):
    """Answers as JSON lines: `where`, `messages`, `reference`, `answer`, in the order of the prompts.

    Of several ranks, each answers every so-many-th prompt, and the first one writes.

    Args:
        path: the file.
        checkpoint, weights: as for `PrintReading`.
    """

    def __init__(self, path: Path, checkpoint: str | None, weights: str) -> None:
        self.path, self._told = path, which(checkpoint, weights)
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that cannot be written, before minutes are spent on answers.

        Raises:
            ValueError: naming it.
        """
        if not trainer.is_global_zero:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder with --run_dir"
            ) from error

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
        in_order = itertools.chain.from_iterable(itertools.zip_longest(*(share or () for share in shares)))
        rows = {row["where"]: row for row in in_order if row is not None}  # some may have been answered twice
        write_whole(self.path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
        print(f"answers of {self._told} in {self.path}", flush=True)
