"""The sequences that a rank reads at a step: a function of the samples consumed, nothing else.

Worker processes can prepare micro-batches ahead, in the order in which they are read: the number of
workers changes no sequence of any step, nor any state of a generator.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megatron_coe.fault_tolerance.exceptions import DataWorkerError
from megatron_coe.fault_tolerance.signals import STOP_SIGNALS
from megatron_coe.training.loss import Batch

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
"""What a step uses of a sequence."""

_PACKED_FIELDS = (*FIELDS, "cu_seqlens")
"""The same where documents are packed with their masks."""


@dataclass
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
    num_workers: int = 0
    """Processes that prepare training batches ahead; 0: they are read when they are needed."""
    _workers: BatchWorkers | None = field(default=None, init=False, repr=False)

    def num_microbatches(self, batch_size: int) -> int:
        """Return the micro-batches of each rank in a global batch of so many sequences."""
        return batch_size // (self.micro_batch_size * self.replicas)

    def sequences_of(self, num_microbatches: int) -> int:
        """Return the sequences of a global batch of so many micro-batches of each rank."""
        return num_microbatches * self.micro_batch_size * self.replicas

    def training(self, first: int, num_microbatches: int) -> list[Batch]:
        """Return this rank's share of the global batch whose first sequence is number `first`."""
        wanted = self.numbers(first, num_microbatches)
        if self.num_workers == 0:
            return [self._batch(numbers) for numbers in wanted]
        if self._workers is None:
            stride = self.micro_batch_size * self.replicas
            is_pinned = self.device.type == "cuda"
            self._workers = BatchWorkers(self.dataset, stride, self.num_workers, is_pinned)
        return [self._to_device(batch) for batch in self._workers.take(wanted)]

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

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
        batch = _read(self.dataset, present)
        batch["loss_mask"][past] = 0
        if self.device.type == "cuda":  # out of pinned memory, so that the host does not wait
            batch = {name: values.pin_memory() for name, values in batch.items()}
        return self._to_device(batch)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}


def _read(dataset: Dataset, numbers: Sequence[int]) -> Batch:
    """Read sequences into one batch, on the host."""
    items = [dataset[number] for number in numbers]
    return default_collate(
        [{name: item[name] for name in _PACKED_FIELDS if name in item} for item in items]
    )


class BatchWorkers:
    """Processes that read micro-batches ahead of a rank's steps, by torch's `DataLoader`.

    A rank's micro-batches begin `stride` sequences apart, within steps and between them, so what
    comes next is known. They are read again from another place if the rank goes there.

    Args:
        is_pinned: the batches come in pinned memory.
    """

    def __init__(self, dataset: Dataset, stride: int, num_workers: int, is_pinned: bool) -> None:
        self._upcoming = _Upcoming(len(dataset) if isinstance(dataset, Sized) else None, stride)
        self._loader: DataLoader | None = DataLoader(
            _MicroBatches(dataset),
            batch_size=None,  # each item is a micro-batch
            sampler=self._upcoming,
            num_workers=num_workers,
            pin_memory=is_pinned,
            prefetch_factor=2,
            persistent_workers=True,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # or the run's own would be asked for a seed
        )
        self._batches: Iterator[Batch | Exception] | None = None
        self._next: range | None = None
        self._processes: set[BaseProcess] = set()
        # Before multiprocessing's own: it waits for all processes, and they ignore its signal.
        atexit.register(self.close)

    def take(self, wanted: Sequence[range]) -> Iterator[Batch]:
        """Yield the micro-batches of these sequences. Raises: what reading them has raised."""
        for numbers in wanted:
            if self._batches is None or numbers != self._next:
                assert self._loader is not None
                self._upcoming.first = numbers
                others = set(multiprocessing.active_children()) - self._processes
                self._batches = iter(self._loader)
                self._processes = set(multiprocessing.active_children()) - others
            batch = self._receive(self._batches)
            if isinstance(batch, Exception):
                raise batch
            stride = self._upcoming.stride
            self._next = range(numbers.start + stride, numbers.stop + stride)
            yield batch

    def _receive(self, batches: Iterator[Batch | Exception]) -> Batch | Exception:
        try:
            return next(batches)
        except (ConnectionError, EOFError) as error:
            time.sleep(1.0)  # torch's handler of SIGCHLD comes late, and says what has happened
            raise RuntimeError("a DataLoader worker has ended by itself") from error

    def close(self) -> None:
        """End the processes: those that have nothing to do by themselves, others at once."""
        atexit.unregister(self.close)
        self._batches = self._loader = None
        for process in self._processes:
            process.kill()


class _Upcoming(Sampler[range]):
    """Numbers of the sequences of all micro-batches from `first` on, as far as there are any."""

    def __init__(self, length: int | None, stride: int) -> None:
        self.length, self.stride = length, stride
        self.first = range(0)

    def __iter__(self) -> Iterator[range]:
        numbers = self.first
        while self.length is None or numbers.stop <= self.length:
            yield numbers
            numbers = range(numbers.start + self.stride, numbers.stop + self.stride)


class _MicroBatches(Dataset):
    """The micro-batch of given sequences; or an error, which `DataLoader` would reword."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, numbers: range) -> Batch | Exception:
        try:
            return _read(self._dataset, numbers)
        except Exception as error:
            return error


@contextmanager
def explained_worker_deaths(num_workers: int) -> Iterator[None]:
    """Raise DataWorkerError where torch has noticed that a worker process has died.

    It does at any moment, whatever the rank is doing, by a handler of SIGCHLD.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataWorkerError(
            f"{' '.join(str(error).split()).rstrip('.')}: one of data.num_workers={num_workers} "
            "processes that prepare batches. What takes less memory: fewer of them, or 0"
        ) from error


def _ignore_signals(worker: int) -> None:
    """Leave to the rank what signals to a whole process group mean: it ends its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
