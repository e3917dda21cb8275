"""The update of the weights on a GPU: the host waits once, and no kind of optimizer takes a NaN.

That it is the update on a CPU, in every layout: `tests/distributed/test_optimizer_step.py`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.host_syncs import count_host_syncs
from megatron_coe.distributed import train_state
from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from megatron_coe.training.optimizer_step import HostCopy
from megatron_coe.training.trainer import Trainer
from tests.unit.training.planted import coe_layers, everything, nan_at, planted, same
from tests.unit.training.runs import make_settings, make_trainer, with_one_sync

ON_THE_CPU = {"grouped_linear.py", "runs.py"}
"""Where this device's loop over experts, and the test's data, read numbers."""


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_step_waits_for_the_device_once(single_rank, micro_batch_size, distributed):
    settings = make_settings(
        train={"micro_batch_size": micro_batch_size},
        parallel={"use_distributed_optimizer": distributed},
    )
    trainer = with_one_sync(make_trainer(settings, single_rank))
    trainer.step()
    counts = count_host_syncs(trainer.step, single_rank)
    waits = {place: n for place, n in counts.items() if file_of(place) not in ON_THE_CPU}
    assert list(map(file_of, waits)) == ["optimizer_step.py"]
    assert sum(waits.values()) == 1


def file_of(place: str) -> str:
    return place.rpartition(":")[0].rpartition("/")[2]


def fused(**train) -> Trainer:
    return with_one_sync(make_trainer(make_settings(train=train), torch.device("cpu")))


def unfused(**train) -> Trainer:
    """Its optimizer neither clips nor checks on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state, "fuse_update", lambda optimizer: None)
        return fused(**train)


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
def test_optimizers_that_the_host_guards_do_the_same(single_rank, clip_grad):
    options = {"clip_grad": clip_grad, "lr_warmup_fraction": 0.0}
    first, second = fused(**options), unfused(**options)
    for _ in range(3):
        ours, theirs = first.step(), second.step()
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert ours.grad_norm > 0.01
    ours, theirs = everything(first)["weights"], everything(second)["weights"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [fused, unfused])
def test_no_optimizer_takes_a_nan(single_rank, make):
    trainer = make()
    trainer.step()
    before = everything(trainer)
    experts = coe_layers(trainer)[0].experts
    with planted(experts, nan_at, lambda number: True), pytest.raises(NotFiniteError):
        trainer.step()
    assert same(everything(trainer), before)


def test_a_host_copy_keeps_the_numbers(single_rank):
    numbers = torch.arange(4, dtype=torch.float64, device=single_rank)
    assert HostCopy(numbers).values() == [0.0, 1.0, 2.0, 3.0]
