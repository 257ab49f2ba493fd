"""A run's `metrics.csv`, read back; apart from `records.py`, which writes it, so as not to import Lightning (5 s)."""

from __future__ import annotations

import csv
from pathlib import Path


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, each with the values that it has."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
