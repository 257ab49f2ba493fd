"""How sure a difference between two models is: bootstrap intervals for losses, McNemar's exact test for facts.

Documents are not independent: the pieces of one book rise and fall together. So whole *parents* are drawn, within
their *source*, with replacement, and both models are read on the same draws (paired). A source with n parents gives
n - 1 draws that count n / (n - 1) each (Rao and Wu 1988): plain draws of n would make the interval of a source with two
parents 30 % too short. Sources with one parent cannot say how their parents differ and are drawn together.

The work is one matrix product per source. 2,000 resamples of 1,000 documents take 0.1 s.

Shapes: D documents, C clusters of a stratum, K columns of figures, R resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 2_000, 0.95
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)  # 1.96
_DRAWN_TOGETHER = 1 << 22  # counts held at once


class Interval(NamedTuple):
    """Where the figure would lie in `LEVEL` of all such measurements."""

    low: float
    high: float


class Resampling:
    """Seeded draws of parents within sources, the same for every figure.

    Args:
        parents: (D,) which parent each document was cut from.
        sources: (D,) which source it is from; a parent belongs to the pair of both.
        seed: of the draws.
        resamples: R.

    Attributes:
        clusters: how many parents there are.
    """

    def __init__(
        self, parents: Sequence[Hashable], sources: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
    ) -> None:
        self.seed, self.resamples = seed, resamples
        numbers: dict[tuple[Hashable, Hashable], int] = {}
        pairs = zip(sources, parents, strict=True)
        self._cluster = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int64)  # (D,)
        self.clusters = len(numbers)
        self.strata = _strata([source for source, _ in numbers])

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval | None:
        """The interval of sum(numerator) / sum(denominator), both (D,); None where a single parent is all there is."""
        if self.clusters < 2:
            return None
        totals = self._totals(np.stack([numerator, denominator], 1))
        tail = (1 - LEVEL) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
            centre = numerator.sum() / denominator.sum()
        stretch = student(self.clusters - len(self.strata)) / NORMAL
        return Interval(float(centre + stretch * (low - centre)), float(centre + stretch * (high - centre)))

    def _totals(self, columns: np.ndarray) -> np.ndarray:
        """Sums of the columns (D, K) in every resample, (R, K)."""
        sums = np.zeros((self.clusters, columns.shape[1]))
        np.add.at(sums, self._cluster, columns)
        random = np.random.default_rng(self.seed)
        totals = np.zeros((self.resamples, columns.shape[1]))
        for members in self.strata:
            count = len(members)
            step = max(1, _DRAWN_TOGETHER // count)
            for start in range(0, self.resamples, step):
                rows = min(step, self.resamples - start)
                drawn = random.multinomial(count - 1, np.full(count, 1 / count), size=rows)  # (rows, C)
                totals[start : start + rows] += drawn @ sums[members] * (count / (count - 1))
        return totals


def student(freedom: int) -> float:
    """How far from its centre Student's t reaches in `LEVEL` of all cases, for 1 or more degrees of freedom.

    Exact for 1 and 2, else Fisher and Cornish's expansion (1960), which is 0.7 % short at 3 and better above.
    """
    if freedom == 1:
        return math.tan(math.pi * LEVEL / 2)
    if freedom == 2:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    z, n = NORMAL, freedom
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return sum(terms)


def _strata(sources: list[Hashable]) -> list[np.ndarray]:
    """Clusters that are drawn together: those of one source; sources with a single cluster share one stratum."""
    by_source: dict[Hashable, list[int]] = defaultdict(list)
    for cluster, source in enumerate(sources):
        by_source[source].append(cluster)
    strata = [members for members in by_source.values() if len(members) > 1]
    single = [members[0] for members in by_source.values() if len(members) == 1]
    if len(single) == 1 and strata:
        max(strata, key=len).extend(single)
    elif single:
        strata.append(single)
    return [np.array(members) for members in strata]


def mcnemar(lost: int, gained: int) -> float:
    """Probability that equally good models differ at least this unevenly: McNemar's exact two-sided test.

    Facts that both models know, or neither, say nothing; each of the others is lost or gained by the toss of a coin
    (McNemar 1947; the exact form is the sign test on the discordant pairs).
    """
    tosses = lost + gained
    tail = sum(math.comb(tosses, heads) for heads in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**tosses)
