"""Drawing from distributions by numbers that are made on the CPU: the same draws on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probabilities: Tensor, luck: Tensor) -> Tensor:
    """Invert the cumulative distributions.

    Args:
        probabilities: (N, V), not negative; a row need not add up to 1.
        luck: (N,) in [0, 1).

    Returns:
        (N, 1) int64, on the device of the probabilities.
    """
    up_to = running_sums(probabilities)
    heights = luck.to(up_to.device, up_to.dtype)[:, None] * up_to[:, -1:]
    return torch.searchsorted(up_to, heights, right=True).clamp_(max=up_to.shape[-1] - 1)


def running_sums(fractions: Tensor) -> Tensor:
    """(..., V), each with those before it, by deterministic algorithms, too, which torch has on a CPU only."""
    if torch.are_deterministic_algorithms_enabled():
        return fractions.cpu().cumsum(-1).to(fractions.device)
    return fractions.cumsum(-1)
