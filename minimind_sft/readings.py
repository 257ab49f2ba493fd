"""What a run measured, read back from its `metrics.csv`. No torch.

Apart from `records.py`, which writes the file, so as not to import Lightning (5 s).
"""

from __future__ import annotations

import csv
import math
from pathlib import Path


def perplexity(nats: float) -> float:
    """exp of nats per token; infinite where that overflows, not a number where they are none."""
    return math.inf if nats >= 700 else math.exp(nats)


def numbers_first(loss: float | None) -> float:
    """A loss to sort by: what is no number comes last."""
    return math.inf if loss is None or math.isnan(loss) else loss


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, each with the values that it has; a last row that was not written whole is left out.

    Raises:
        ValueError: naming file and line of what is no row.
    """
    text = path.read_text(encoding="utf-8")
    rows = []
    for number, row in enumerate(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()), 2):
        try:
            rows.append({name: float(value) for name, value in row.items() if value})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a row of metrics ({error}); remove this line") from error
    return rows
