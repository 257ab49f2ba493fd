"""y = a x^b through measured points: a straight line by least squares where both axes are logarithms.

Points in; a, b and the standard error of b out, s_b = sqrt(sum of squared residuals / (n - 2) / sum (log x - mean)^2).
Three points leave one degree of freedom, so an error from few points is itself uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FEWEST = 3  # points: two are always met, and leave no error


class PowerLaw(NamedTuple):
    """y = a x^b."""

    a: float
    b: float
    b_error: float  # one standard error
    points: int

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> PowerLaw:
        """The law through (x, y); points that have no logarithm are left out.

        Raises:
            ValueError: fewer than `FEWEST` points are left, or all have one x.
        """
        logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
        if len(logs) < FEWEST:
            raise ValueError(f"it takes {FEWEST} or more points above 0, and there are {len(logs)}")
        count = len(logs)
        middle_x, middle_y = (sum(values) / count for values in zip(*logs, strict=True))
        spread = sum((x - middle_x) ** 2 for x, _ in logs)
        if spread < 1e-12:
            raise ValueError("all points are of one size")
        b = sum((x - middle_x) * (y - middle_y) for x, y in logs) / spread
        start = middle_y - b * middle_x
        residual = sum((y - start - b * x) ** 2 for x, y in logs)
        return cls(math.exp(start), b, math.sqrt(residual / (count - 2) / spread), count)

    def at(self, x: float) -> float:
        """y at x."""
        return float(self.a * x**self.b)

    def reaches(self, y: float) -> float | None:
        """The x at which the law comes up to y (> 0); None where it does not rise."""
        if self.b <= 0:
            return None
        log = (math.log(y) - math.log(self.a)) / self.b
        return math.exp(log) if log < 700 else None  # beyond a float
