"""A weight that brings what it weighs to a target: what to hold on to is said in nats, not as a factor.

How strongly a KL must be weighed for a model to forget 0.02 nats differs from base to base, with the data, the steps
and the learning rate. So after every step the weight is raised where the step's KL was above the target, and lowered
where it was below:

    log w <- log w + 0.06 clip(KL / target - 1, -1, 1)

Integral control in the logarithm, as the adaptive KL penalty of arXiv 1909.08593 (section 2.2), where the target is a
distance from the base that may be used up. A step moves the weight by 6 % at most, so that it follows the mean of some
fifteen steps and not the noise of one.
"""

from __future__ import annotations

import math

GAIN = 0.06
LOWEST, HIGHEST = 0.1, 100.0


def adapted(weight: float, nats: float, target: float) -> float:
    """The weight after a step.

    Args:
        weight: before it.
        nats: what the step measured, per token.
        target: what it should be, per token; above 0.
    """
    error = min(1.0, max(-1.0, nats / target - 1.0))
    return min(HIGHEST, max(LOWEST, weight * math.exp(GAIN * error)))
