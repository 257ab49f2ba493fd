"""The run directory: which checkpoint to go on from, what may be written over, and the W&B run that belongs to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path
from typing import IO

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from minimind_sft.checkpoint_files import check_of_a_run, opened
from minimind_sft.files import resolve
from minimind_sft.origins import BEST, LAST, is_run

OUR_FILES = (
    "checkpoints",
    "export",
    "metrics.csv",
    "forgetting.json",
    "forgetting.png",
    "probes.json",
    "answers.json",
    "report",
    "predictions.jsonl",
    "nonfinite.jsonl",
    "spikes.jsonl",
    "run.json",
    "sample.json",
    "rejected.jsonl",
    "config.yaml",
)
OF_OTHER_VERBS = ("predictions.jsonl", "report")  # which may come before there is a run
EARLIER = ".earlier"  # in a run directory: the run that is being replaced, until the new one trains


def find_checkpoint(asked: str | None, run_dir: Path, verb: str) -> str | None:
    """`last`, `best`, `auto` or a path -> the file, or None for a fresh start.

    Raises:
        ValueError: the checkpoint is not there, or is none of a run.
    """
    if asked is None:
        return None
    folder = run_dir / "checkpoints"
    if asked == "auto":
        return str(folder / LAST) if (folder / LAST).is_file() else None
    path = folder / {"last": LAST, "best": BEST}[asked] if asked in ("last", "best") else Path(asked)
    if not path.is_file():
        there = sorted(str(p) for p in folder.glob("*.ckpt"))
        afresh = "; leave --ckpt_path out, or use auto, to start afresh" if verb == "fit" else ""
        remedy = "; name one of these" if there else afresh
        what = f"{path} is a folder; name a file" if path.is_dir() else f"there is no {path}"
        raise ValueError(f"--ckpt_path {asked}: {what} (checkpoints of this run: {', '.join(there) or 'none'}){remedy}")
    if (content := opened(path)) is not None:  # what cannot be read is told by who loads it
        check_of_a_run(content, path)
    return str(path)


def refuse_own_weights(run_dir: Path, weights: str) -> None:
    """A fresh run clears its directory; weights that lie there would be gone before they are read.

    Raises:
        ValueError: `weights` lies in `run_dir`.
    """
    path = resolve(weights).resolve()
    if path.exists() and path.is_relative_to(run_dir.resolve()):
        raise ValueError(
            f"model.weights ({weights}) lies in run_dir ({run_dir}), which a new run clears; choose another folder "
            "with --run_dir, or go on with the run with --ckpt_path last"
        )


def goes_on(run_dir: Path, checkpoint: str | None) -> bool:
    """Whether a run from this checkpoint, None for a fresh start, is the one of this folder; one from elsewhere begins
    another."""
    return checkpoint is not None and Path(checkpoint).parent.resolve() == (run_dir / "checkpoints").resolve()


def prepare_run_dir(run_dir: Path, *, checkpoint: str | None, overwrite: bool) -> IO[str]:
    """Take the run directory for this process; refuse to write over another run, or set it aside when asked to.

    What is set aside is removed by `discard_earlier` once the new run trains; a run that is refused before that puts it
    back (`leave_run_dir`).

    Returns:
        The lock, for `leave_run_dir`.

    Raises:
        ValueError: the folder holds checkpoints or files that are no run's, cannot be written, or another process is
            using it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a", encoding="utf-8")  # noqa: SIM115 (held for the life of the process)
    except OSError as error:
        raise ValueError(f"cannot write run_dir {run_dir} ({error.strerror}); choose another with --run_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"another process is training in {run_dir}; stop it, or choose another --run_dir") from None
    except OSError:
        pass  # a file system without locks
    _put_back(run_dir)  # of a start that was killed
    try:
        if not goes_on(run_dir, checkpoint):
            _set_aside(run_dir, overwrite=overwrite)
    except (ValueError, OSError):
        leave_run_dir(lock)
        raise
    return lock


def _set_aside(run_dir: Path, *, overwrite: bool) -> None:
    """Out of the way of a new run goes what an earlier one left, with checkpoints or without."""
    if any((run_dir / "checkpoints").glob("*.ckpt")) and not overwrite:
        raise ValueError(
            f"{run_dir} holds the checkpoints of a run. Go on with it (--ckpt_path last), choose another folder "
            "(--run_dir), or replace it (--overwrite)"
        )
    there = [name for name in OUR_FILES if (run_dir / name).exists()]
    of_fit = [name for name in there if name not in OF_OTHER_VERBS]
    if of_fit and not is_run(run_dir):
        raise ValueError(
            f"{run_dir} has {' and '.join(of_fit)}, but is no run's folder, and a run would replace them; choose "
            "another with --run_dir"
        )
    if of_fit:
        (run_dir / EARLIER).mkdir()
        for name in there:
            (run_dir / name).rename(run_dir / EARLIER / name)


def _put_back(run_dir: Path) -> None:
    """Undo `_set_aside`, also where it, or this, was killed half-way: only what comes back replaces anything, which is
    of a run that never took a step."""
    if not (run_dir / EARLIER).is_dir():
        return
    for path in (run_dir / EARLIER).iterdir():
        _remove(run_dir / path.name)
        path.rename(run_dir / path.name)
    (run_dir / EARLIER).rmdir()


def discard_earlier(run_dir: Path) -> None:
    """Remove the run that was set aside for this one."""
    _remove(run_dir / EARLIER)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leave_run_dir(lock: IO[str]) -> None:
    """Let go of a run directory. Where the run was refused, an earlier one comes back; an empty folder goes."""
    file = Path(lock.name)
    with contextlib.suppress(OSError):  # a folder that somebody removed, or that cannot be removed
        _put_back(file.parent)
        if list(file.parent.iterdir()) == [file]:
            file.unlink()
            file.parent.rmdir()
    lock.close()


def is_rank_zero() -> bool:
    """Whether this process is the first of the run, by what its launcher (Lightning, torchrun, srun) says; for what
    comes before there is a Trainer."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def wandb_logger(run_dir: Path, *, offline: bool, checkpoint: str | None) -> WandbLogger:
    """A W&B run that keeps its id when the run is resumed.

    Raises:
        ValueError: it is to be sent, and nobody is logged in.
    """
    if not offline and not os.environ.get("WANDB_MODE"):
        import wandb

        if not wandb.api.api_key:
            raise ValueError(
                "wandb: nobody is logged in to Weights & Biases on this machine: run `wandb login`, set WANDB_API_KEY, "
                "or pass --wandb offline"
            )
    note = run_dir / "wandb_id"
    if not (goes_on(run_dir, checkpoint) and note.is_file()):
        note.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    name = run_dir.resolve().name
    return WandbLogger(
        name=name,
        project="minimind_sft",
        save_dir=run_dir,
        id=note.read_text(encoding="utf-8").strip(),
        offline=offline,
        resume="allow",
    )
