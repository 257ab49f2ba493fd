"""The plan's micro-batches as PyTorch's DataLoader wants them; a resumed run starts in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from minimind_sft.batching import MicroBatch
from minimind_sft.windows import Plan


def loader(
    dataset: Dataset[MicroBatch], device: torch.device, sampler: Sampler[Any] | None = None
) -> DataLoader[MicroBatch]:
    """Without worker processes: laying a micro-batch out takes a millisecond or two."""
    return DataLoader(dataset, batch_size=None, sampler=sampler, pin_memory=device.type == "cuda")


class MicroBatches(Dataset[MicroBatch]):
    """The plan's micro-batches of one rank, by (epoch, position)."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank

    def __len__(self) -> int:
        return self.plan.windows * self.plan.accumulate

    def __getitem__(self, index: tuple[int, int]) -> MicroBatch:
        epoch, position = index
        return self.plan.micro_batch(epoch, position, self.rank)


class Positions(Sampler[tuple[int, int]]):
    """(epoch, position) of every micro-batch from an optimizer step on; Lightning calls `set_epoch`, and counts on the
    length of a whole epoch."""

    def __init__(self, plan: Plan, start_step: int) -> None:
        self.epoch, window = divmod(start_step, plan.windows)
        self.start = self.epoch, window * plan.accumulate
        self.len_epoch = plan.windows * plan.accumulate

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.len_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.start[1] if self.epoch == self.start[0] else 0
        for position in range(first, self.len_epoch):
            yield self.epoch, position
