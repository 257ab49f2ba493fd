"""Where a run stands, as Lightning's loops want to hear it.

Every window is exactly one optimizer step, so the number of steps alone says which window comes next. Lightning's own
counters, in contrast, depend on the hook that the checkpoint was written in, on the number of micro-batches per
window and on whether an epoch had just ended (a position equal to the length makes the next epoch empty, and the run
"succeeds"). They are therefore rewritten when a checkpoint is loaded.
"""

from __future__ import annotations

from typing import Any


def set_progress(checkpoint: dict[str, Any], *, windows: int, accumulate: int) -> int:
    """Rewrite the loop counters of a checkpoint to the window that comes next.

    Args:
        checkpoint: as Lightning wrote it; changed in place.
        windows: of an epoch.
        accumulate: micro-batches per window and rank, in the run that resumes.

    Returns:
        Optimizer steps done.
    """
    step = int(checkpoint["global_step"])
    epoch, window = divmod(step, windows)
    position, total = window * accumulate, step * accumulate
    checkpoint["epoch"] = epoch
    loops = checkpoint["loops"]["fit_loop"]
    batch = loops["epoch_loop.batch_progress"]
    batch["current"] = dict.fromkeys(batch["current"], position)
    batch["total"] = dict.fromkeys(batch["total"], total)
    batch["is_last_batch"] = False
    started = epoch + 1 if window else epoch  # an epoch counts as started once its first window is done
    for counters in (loops["epoch_progress"]["current"], loops["epoch_progress"]["total"]):
        counters.update(ready=started, started=started, processed=epoch, completed=epoch)
    return step
