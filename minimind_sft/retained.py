"""How much of pretraining is left, from the base's own loss log.

A rise of 0.1 nats means little by itself. The log says what it cost to win them: the loss fell by the last 0.1 nats
over, say, the last fifth of pretraining, so a fifth of it is undone and 80 % are kept. Precisely, with m(t) the running
minimum of the logged loss, m its end, and T the point at which m was first reached:

    kept = t / T, where t is the first point with m(t) <= m + forgetting, interpolated linearly between logged points

What is carried over is the rise, not the loss itself, since the log was taken on other text. A loss above the log's
first point leaves at most that point's share. Late points were won at a low learning rate, so the first percent of
forgetting undoes more of the log than of the knowledge: a yardstick, not a clock.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

PROGRESS = ("tokens", "samples", "step")
LOSSES = ("val_nll", "val/pretrain/loss", "val_loss", "eval_loss", "loss", "train/loss")


class LossLog(NamedTuple):
    """A base's pretraining, as it was logged; both in the order of the progress."""

    progress: list[float]
    losses: list[float]  # nats per token
    unit: str  # the name of the progress
    name: str  # the name of the loss


class Retained(NamedTuple):
    """What is kept of pretraining.

    Attributes:
        share: in [0, 1].
        at_most: whether the loss is above all that was logged, so that `share` is only a bound.
    """

    share: float
    at_most: bool


def load_log(path: Path) -> LossLog:
    """Read a loss log: CSV with a heading, or JSON lines.

    The first of `PROGRESS` and of `LOSSES` that the file has are taken; rows without them are left out.

    Raises:
        ValueError: naming the file and what is missing.
    """
    rows = _rows(path)
    columns = {  # with a number anywhere; None: what goes beyond the heading
        name for row in rows for name, value in row.items() if isinstance(name, str) and _number(value) is not None
    }
    unit, name = (next((key for key in known if key in columns), None) for known in (PROGRESS, LOSSES))
    if unit is None or name is None:
        raise ValueError(
            f"--pretrain_log {path}: needs a column of {', '.join(PROGRESS)} and one of {', '.join(LOSSES)}; "
            f"it has {', '.join(sorted(columns)) or 'none'}"
        )
    pairs = [(_number(row.get(unit)), _number(row.get(name))) for row in rows]
    points = sorted((at, loss) for at, loss in pairs if at is not None and loss is not None)
    if len(points) < 2:
        raise ValueError(f"--pretrain_log {path}: {len(points)} rows have {unit} and {name}; 2 are needed")
    progress, losses = zip(*points, strict=True)
    if not progress[losses.index(min(losses))] > 0:
        raise ValueError(
            f"--pretrain_log {path}: its lowest {name} is at {unit} {progress[0]:g}, so it tells of no pretraining; "
            "give the log of the run that made the base"
        )
    return LossLog(list(progress), list(losses), unit, name)


def retained(log: LossLog, forgetting: float) -> Retained:
    """The share of pretraining that first reached the loss after fine-tuning; see the module.

    Args:
        log: of the base.
        forgetting: rise of the loss over the base, in nats per token.
    """
    best = min(log.losses)
    end = log.progress[log.losses.index(best)]
    target = best + forgetting
    if forgetting <= 0:
        return Retained(1.0, False)
    if target >= log.losses[0]:
        return Retained(log.progress[0] / end, True)
    before_at, before = log.progress[0], log.losses[0]
    for at, loss in zip(log.progress, log.losses, strict=True):
        if loss <= target:  # the first time, so `before` is the running minimum above it
            part = (before - target) / (before - loss)
            return Retained((before_at + part * (at - before_at)) / end, False)
        if loss < before:
            before = loss
        before_at = at
    return Retained(0.0, True)  # forgetting is not a number


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--pretrain_log {path}: {error}") from error
    if not text.lstrip().startswith("{"):
        return list(csv.DictReader(io.StringIO(text)))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)) if line.strip() else {})
        except (ValueError, TypeError) as error:
            raise ValueError(f"--pretrain_log {path}:{number}: not a JSON object ({error})") from error
    return rows


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
