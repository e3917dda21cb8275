"""The sequences that a rank reads at a step: a function of the samples consumed, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, default_collate

from megatron_coe.training.loss import Batch

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches of one data-parallel rank, from a dataset that every one can index.

    The sequences of a step do not depend on the number of data-parallel ranks or the micro-batch
    size, only their distribution does. All tensor, context and pipeline ranks of one read the same
    sequences, so nothing is broadcast.
    """

    dataset: Dataset
    micro_batch_size: int
    rank: int
    """Data-parallel rank, of `replicas`."""
    replicas: int
    device: torch.device
    samples_per_epoch: float | None = None
    """Sequences in one epoch of the training data, where that is known."""

    def training(self, first: int, num_microbatches: int) -> list[Batch]:
        """Return this rank's share of the global batch whose first sequence is number `first`."""
        return [self._batch(numbers) for numbers in self.numbers(first, num_microbatches)]

    def numbers(self, first: int, num_microbatches: int) -> list[range]:
        """Return the numbers of the sequences in each micro-batch of `training`."""
        stride = self.micro_batch_size * self.replicas
        starts = [
            first + index * stride + self.rank * self.micro_batch_size
            for index in range(num_microbatches)
        ]
        return [range(start, start + self.micro_batch_size) for start in starts]

    def validation(self, samples: int, num_microbatches: int, begin: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of the first `samples` sequences, each read by one rank only.

        Positions past the last sequence are filled up with the first one, masked out of the loss.

        Args:
            begin: the micro-batch to begin with, counted from 0.
        """
        for index in range(begin, begin + num_microbatches):
            start = (index * self.replicas + self.rank) * self.micro_batch_size
            numbers = range(start, start + self.micro_batch_size)
            yield self._batch(numbers, samples)

    def _batch(self, numbers: range, samples: int | None = None) -> Batch:
        """Return token ids, labels and positions [B, S] (int64), and loss mask [B, S] (float32).

        Args:
            samples: how many sequences there are; None: as many as are asked for.
        """
        past = [samples is not None and number >= samples for number in numbers]
        present = [0 if out else number for number, out in zip(numbers, past, strict=True)]
        items = [self.dataset[number] for number in present]
        batch = default_collate([{name: item[name] for name in FIELDS} for item in items])
        batch["loss_mask"][past] = 0
        if self.device.type == "cuda":  # out of pinned memory, so that the host does not wait
            batch = {name: values.pin_memory() for name, values in batch.items()}
        return {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
