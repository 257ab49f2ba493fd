"""Checkpoints that are never half there.

A file is written under a temporary name, forced to disk and then renamed, so whatever `last.ckpt` is, it is whole.
`best` is the reading with the lowest validation loss after step 0; in a run that resumes under another bound, or from
an earlier checkpoint, among those whose weights are still there. Where both fall on one step, the state is written
once and linked. Our own callback instead of Lightning's ModelCheckpoint, which forgets its best score when the folder
moves and does not know about optimizer steps.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from minimind_sft.checkpoint_files import opened
from minimind_sft.files import sync_folder
from minimind_sft.origins import BEST, LAST
from minimind_sft.rundir import EARLIER
from minimind_sft.signals import StopRequest

if TYPE_CHECKING:
    from minimind_sft.measuring import Measure


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            ValueError: the disk is full or the folder cannot be written; what was there before is untouched.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise ValueError(
                f"cannot write the checkpoint {target} ({error}); the earlier checkpoints are whole. Free space or set "
                "run_dir to another disk, then go on with --ckpt_path last"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, without running code that it might hold.

        Raises:
            ValueError: the file is damaged; names the checkpoints beside it that can be read.
        """
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            whole = [str(other) for other in sorted(Path(path).parent.glob("*.ckpt")) if opened(other) is not None]
            raise ValueError(
                f"the checkpoint {path} cannot be read ({str(error).splitlines()[0]}). Whole ones beside it: "
                f"{', '.join(whole) or 'none'}"
            ) from error


def milestone(step: int) -> str:
    """The name of a checkpoint that is kept."""
    return f"step-{step:06d}.ckpt"


def link(existing: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder, at once or not at all."""
    temporary = existing.with_name(f".{name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(existing, temporary)
    except OSError:  # the file system has no links
        shutil.copyfile(existing, temporary)
    os.replace(temporary, existing.with_name(name))
    sync_folder(existing.parent)


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` every `save_every` steps and after the last one, `best.ckpt` whenever a reading is the best
    yet. Whatever is written is `last.ckpt` as well, which costs a link, so that a run goes on from its newest state.

    Args:
        folder: where they go.
        measure: tells the best reading.
        keep_every: steps between two checkpoints that are kept for good, `step-000100.ckpt`; None for none.

    Raises:
        ValueError: `keep_every` below 1.
    """

    def __init__(self, folder: Path, measure: Measure, *, keep_every: int | None = None) -> None:
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every_steps is {keep_every}; it counts optimizer steps and must be at least 1")
        self.folder, self.measure, self.keep_every = folder, measure, keep_every

    def milestones(self, steps: int) -> int:
        """How many are kept for good of so many steps."""
        return steps // self.keep_every if self.keep_every else 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Clear away what a kill left half written, and refuse a disk that cannot hold the run.

        Raises:
            ValueError: naming what is needed and what is free.
        """
        if trainer.is_global_zero:  # the run directory is locked: nobody else is writing
            for half in self.folder.glob(".*.tmp"):
                half.unlink(missing_ok=True)
        kept = self.milestones(pl_module.total_steps)
        need = pl_module.checkpoint_bytes * (3 + kept)  # last and best, and one being written
        there = next(path for path in (self.folder, *self.folder.resolve().parents) if path.exists())
        written = {file.stat().st_ino: file.stat().st_size for file in self.folder.glob("*.ckpt")}
        earlier = self.folder.parent / EARLIER  # a run that is removed before the first is written
        need -= sum(written.values()) + sum(file.stat().st_size for file in earlier.rglob("*") if file.is_file())
        free = shutil.disk_usage(there).free
        if free < need:
            raise ValueError(
                f"the checkpoints need {need / 1e9:.2f} GB, but {there} has {free / 1e9:.2f} GB free. Free some, set "
                "run_dir to another disk, or raise keep_every_steps"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step:
            there = opened(self.folder / BEST)
            kept = {int(there["global_step"])} if there else set()
            lost = {reading.step for reading in self.measure.readings} - kept
            self.measure.lost = trainer.strategy.broadcast(lost)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        names = []
        ending = step == pl_module.total_steps or trainer.should_stop
        if self.measure.best is not None and self.measure.best.step == step:
            names.append(BEST)
        if self.keep_every and step % self.keep_every == 0:
            names.append(milestone(step))
        # all ranks stop at the same window, whichever was told
        stop: StopRequest = pl_module.stop
        stopping = stop.received is not None if trainer.world_size == 1 else pl_module.last_step.stopping
        if names or ending or stopping or step % self.measure.intervals.save_every == 0:
            self.save(trainer, [LAST, *names])
        if stopping and not ending:  # a run that ends anyway has its last screen still to write
            if trainer.is_global_zero:
                stop.say(f"stopped after step {step}; go on with the same command and --ckpt_path last")
                stop.requeue()
            # Lightning's watch over the processes that it started kills the first one where another fails
            raise SystemExit(stop.exit_status if trainer.is_global_zero else 0)

    def save(self, trainer: pl.Trainer, names: list[str]) -> None:
        """Write the state once, under each of these names; every row of the metrics is on disk before."""
        for logger in trainer.loggers:
            logger.save()
        path = self.folder / names[0]
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for name in names[1:]:
                link(path, name)
