"""The optimizer of a run: what is decayed, the order in which a checkpoint knows parameters, and the rate of a step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from minimind_sft.fisher import Basis, RotatedAdamW, stored_bases, turning
from minimind_sft.model import Transformer
from minimind_sft.schedule import learning_rate_at, peak_for


@dataclass(frozen=True)
class Optimization:
    """Settings of `SFTModule`, by the same names."""

    learning_rate: float | Literal["auto"]
    warmup_ratio: float
    min_lr_ratio: float
    weight_decay: float
    decay_all: bool

    def peak(self, width: int) -> float:
        """Of the schedule, for a model of so many channels."""
        return peak_for(width) if isinstance(self.learning_rate, str) else self.learning_rate

    def rate(self, step: int, total: int, width: int) -> float:
        """Learning rate of step number `step`, counted from 1 to `total`."""
        return learning_rate_at(
            step, total, peak=self.peak(width), warmup_ratio=self.warmup_ratio, min_lr_ratio=self.min_lr_ratio
        )

    @property
    def decays(self) -> tuple[float, float]:
        """Of the two groups of `groups`."""
        return self.weight_decay, self.weight_decay if self.decay_all else 0.0

    def check_decays(self, width: int, *, l2_sp: float) -> None:
        """Refuse what would take a weight past where it decays to.

        Raises:
            ValueError: a decay that is no less than 1 / learning rate.
        """
        peak = self.peak(width)
        for name, decay in (("weight_decay", self.weight_decay), ("l2_sp", l2_sp)):
            if decay * peak >= 1.0:
                raise ValueError(
                    f"model.{name} is {decay:g}, which at a learning rate of {peak:g} would take the "
                    f"whole way in one step, or more; it must stay below {1.0 / peak:g}"
                )

    def adamw(self, model: Transformer, device: torch.device, *, half: bool, scaled: bool) -> RotatedAdamW:
        """AdamW for all parameters, frozen ones included.

        Args:
            model: whose parameters are on the device.
            device: that trains.
            half: whether it multiplies in half precision.
            scaled: whether gradients are scaled, as for fp16.
        """
        # fused on a CPU too, in a third of the time of torch's own choice; with a gradient scaler, a fused optimizer
        # unscales by itself and Lightning then refuses to clip
        fused = device.type in ("cpu", "cuda") and not scaled
        weights = [[model.get_parameter(name) for name in group] for group in groups(model)]
        return RotatedAdamW(
            [{"params": group, "weight_decay": decay} for group, decay in zip(weights, self.decays, strict=True)],
            lr=self.peak(model.config.hidden_size),
            fused=fused or None,  # None: torch picks among the rest
            turning=turning(device, half=half),
        )


def groups(model: Transformer) -> tuple[list[str], list[str]]:
    """The names of matrices and of norms, always in these two groups, and frozen ones, too, whatever is decayed and
    trained: a checkpoint knows parameters by their place."""
    named = list(model.named_parameters())
    return [name for name, weight in named if weight.ndim >= 2], [name for name, weight in named if weight.ndim < 2]


def bases_in(optimizer_state: dict[str, Any], model: Transformer) -> dict[str, Basis]:
    """The bases in a checkpoint's optimizer, by parameter."""
    return stored_bases(itertools.chain(*groups(model)), optimizer_state)
