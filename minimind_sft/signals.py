"""Being asked to stop: the signal is noted, the window is finished and saved, and only then the process ends.

Lightning's own handler for SIGTERM stops in the middle of a window and exits 0, which a scheduler takes for success.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from types import FrameType

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from minimind_sft.report import no_more_output
from minimind_sft.rundir import is_rank_zero

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM sends the last one before a time limit, if asked to


class StopRequest:
    """Notes the first SIGTERM, SIGUSR1 or Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def listen(self) -> None:
        """Install the handlers; Lightning puts the earlier ones back when training ends."""
        for number in STOPS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if is_rank_zero():
            with suppress(RuntimeError):  # in the middle of another print
                self.say(f"\n{signal.Signals(number).name}: finishing this step, then saving")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def say(self, text: str) -> None:
        """Print. Ctrl-C ends `| tee` as well: an output that is closed by then is no reason not to save."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            if self.received is None:
                raise
            no_more_output()

    def requeue(self) -> None:
        """Put a SLURM job that was told of its time limit (SIGUSR1) back into the queue."""
        job = os.environ.get("SLURM_JOB_ID")
        if self.received == signal.SIGUSR1 and job:
            done = subprocess.run(["scontrol", "requeue", job], check=False)
            print(f"scontrol requeue {job}: exit status {done.returncode}", flush=True)

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.received or signal.SIGTERM)


class EndTogether(Callback):
    """Where the first of the processes that Lightning started fails, the others end as well: they would wait for it, on
    GPUs until a timeout of half an hour."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        launcher = trainer.strategy.launcher
        if trainer.is_global_zero and isinstance(exception, Exception) and launcher is not None:
            launcher.kill(signal.SIGKILL)
