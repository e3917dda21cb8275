"""The sequences of a step depend on the samples consumed, not on the layout."""

from __future__ import annotations

import pytest
import torch

from megatron_coe.training.batch_source import BatchSource

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
