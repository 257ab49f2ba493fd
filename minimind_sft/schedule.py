"""The learning rate as a function of the step and the settings.

Not a scheduler object: its state would come back from a checkpoint and win over what the YAML says now.
"""

from __future__ import annotations

import math

HIGHEST, REFERENCE_WIDTH = 1e-3, 256  # measured at widths from 48 to 512, see docs/forgetting.md


def peak_for(width: int) -> float:
    """Peak learning rate for a model of so many channels that is pulled towards the base: 1e-3 up to 256 channels, in
    proportion to 1 / sqrt(width) beyond, which is 7.1e-4 at MiniMind's 512.

    In proportion to 1 / width, as muP has it for a model's matrices (arXiv 2203.03466), it was too low: at 512 channels
    7e-4 learned more than 5e-4 and forgot no more.
    """
    return HIGHEST * min(1.0, math.sqrt(REFERENCE_WIDTH / width))


def learning_rate_at(step: int, total: int, *, peak: float, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step number `step`, counted from 1 to `total`.

    Linear up to `peak` over the first `warmup_ratio` of the steps, then half a cosine down to `peak * min_lr_ratio`.
    With `warmup_ratio` 0 and `min_lr_ratio` 0.1 this is MiniMind's `lr * (0.1 + 0.45 * (1 + cos(pi * step / total)))`.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
