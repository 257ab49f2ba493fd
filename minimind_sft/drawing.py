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
    exact = torch.are_deterministic_algorithms_enabled()  # on a GPU, torch then refuses to sum up fractions
    up_to = (probabilities.cpu() if exact else probabilities).cumsum(-1)
    heights = luck.to(up_to.device, up_to.dtype)[:, None] * up_to[:, -1:]
    found = torch.searchsorted(up_to, heights, right=True).clamp_(max=probabilities.shape[-1] - 1)
    return found.to(probabilities.device)
