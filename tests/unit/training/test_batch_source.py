"""The sequences of a step depend on the samples consumed, not on the layout."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
import torch

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.fault_tolerance.exceptions import DataWorkerError
from megatron_coe.training.batch_source import BatchSource, explained_worker_deaths
from megatron_coe.utils.errors import DataError
from tests.unit.training.planted import everything, same
from tests.unit.training.runs import make_settings, make_trainer

CPU = torch.device("cpu")


class Numbered:
    """Sequence i holds the number i."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((3,), number)
        mask = torch.tensor([1.0, 1.0, 0.0])
        return {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": mask,
            "position_ids": torch.arange(3),
            "unused": 0,
        }


def numbers(batches) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize(("micro", "replicas"), [(1, 1), (4, 1), (1, 4), (2, 2), (3, 4)])
def test_a_step_reads_each_sequence_of_its_global_batch_once(micro, replicas):
    count = 24 // (micro * replicas)
    read = []
    for rank in range(replicas):
        source = BatchSource(Numbered(), micro, rank, replicas, CPU)
        batches = source.training(first=48, num_microbatches=count)
        assert [batch["tokens"].shape for batch in batches] == [(micro, 3)] * count
        read += numbers(batches)
    assert sorted(read) == list(range(48, 72))


@pytest.mark.parametrize(
    ("micro", "replicas", "extra"), [(1, 1, 0), (4, 1, 0), (2, 3, 0), (2, 2, 1)]
)
def test_a_validation_counts_each_held_out_sequence_once(micro, replicas, extra):
    samples = 7
    count = -(-samples // (micro * replicas)) + extra
    counted = []
    for rank in range(replicas):
        source = BatchSource(Numbered(), micro, rank, replicas, CPU)
        for batch in source.validation(samples, count):
            assert batch["tokens"].shape == (micro, 3)
            for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
                assert mask.tolist() in ([1.0, 1.0, 0.0], [0.0, 0.0, 0.0])
                counted += [int(row[0])] * bool(mask.any())
    assert sorted(counted) == list(range(samples))


class Unreadable(Numbered):
    """Sequence 5 cannot be read."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if number == 5:
            raise DataError("sequence 5 is damaged")
        return super().__getitem__(number)

    def __len__(self) -> int:
        return 32


def same_batches(ours, oracle) -> bool:
    pairs = zip(ours, oracle, strict=True)
    return all(mine.keys() == other.keys() for mine, other in pairs) and all(
        torch.equal(mine[name], other[name])
        for mine, other in zip(ours, oracle, strict=True)
        for name in other
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_give_the_same_batches_wherever_a_run_begins(workers):
    """In order, after a jump (a resumed run), and again; the run's generator is left alone."""
    plain = BatchSource(Numbered(), 2, 1, 3, CPU)
    source = BatchSource(Numbered(), 2, 1, 3, CPU, num_workers=workers)
    before = torch.get_rng_state()
    try:
        for first in (0, 12, 24, 1200, 1212, 12, 24):
            assert same_batches(source.training(first, 2), plain.training(first, 2))
    finally:
        source.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_read_nothing_past_the_end():
    source = BatchSource(Unreadable(), 4, 0, 1, CPU, num_workers=1)
    try:
        assert numbers(source.training(24, 2)) == list(range(24, 32))
    finally:
        source.close()


def test_what_a_worker_cannot_read_is_said_as_it_is():
    source = BatchSource(Unreadable(), 2, 0, 1, CPU, num_workers=2)
    try:
        source.training(0, 2)
        with pytest.raises(DataError, match=r"^sequence 5 is damaged$"):
            source.training(4, 2)
    finally:
        source.close()


def test_a_worker_that_dies_is_said_in_one_line():
    """Ctrl-C, which a terminal sends to all of a group, ends none; `kill -9` does."""
    source = BatchSource(Numbered(), 1, 0, 1, CPU, num_workers=2)
    source.training(0, 2)
    # Not what another test of this process has left, such as the server that forks commands.
    children = psutil.Process().children()
    workers = [process for process in children if process.name() == "pt_data_worker"]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    assert numbers(source.training(2, 4)) == [2, 3, 4, 5]
    with (
        pytest.raises(DataWorkerError, match=r"DataLoader worker .* data.num_workers=2 "),
        explained_worker_deaths(2),
    ):
        workers[0].kill()
        for first in range(6, 1000):
            source.training(first, 1)
            time.sleep(0.01)
    source.close()
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("workers", [1, 4])
def test_training_is_the_same_to_the_bit(single_rank, tmp_path, workers):
    """Three steps without workers, saved; two more with some, after resuming, and without."""
    states = []
    for more in (0, workers):
        folder = tmp_path / str(more)
        trainer = make_trainer(make_settings(folder, train={"micro_batch_size": 2}), single_rank)
        for _ in range(3):
            trainer.step()
        trainer.save()
        trainer.checkpointer.finish()
        resumed = make_trainer(make_settings(folder, train={"micro_batch_size": 1}), single_rank)
        resumed.progress = load_checkpoint(find_checkpoints(folder)[0], resumed.train_state)
        resumed.source.num_workers = more
        try:
            losses = [resumed.step().loss for _ in range(2)]
        finally:
            resumed.source.close()
        states.append((losses, everything(resumed)))
    assert same(*states)
