"""Whole training steps on a GPU: what the host waits for, and the same bits every time."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.host_syncs import count_host_syncs
from megatron_coe.distributed.seeds import use_deterministic_kernels
from megatron_coe.model.moe import dispatcher, router
from tests.builders import build_layer, tiny_config, weigh_balance_losses
from tests.gpu.test_gpu import ONE_KERNEL, TOLERANCE, error
from tests.unit.training.planted import everything, same
from tests.unit.training.runs import make_settings, make_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not ONE_KERNEL, reason="grouped_mm is not one kernel on this GPU"),
]
BF16 = {"precision": "bf16", "micro_batch_size": 4}


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
def test_a_step_waits_for_one_copy_alone(single_rank, distributed: bool) -> None:
    """PyTorch reports none: the one wait is for an event, which it does not count."""
    parallel = {"use_distributed_optimizer": distributed}
    trainer = make_trainer(make_settings(train=BF16, parallel=parallel), single_rank)
    trainer.step()
    assert not count_host_syncs(trainer.step, single_rank)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcome.skipped is None


@pytest.mark.parametrize("pre_softmax", [True, False])
def test_kernels_are_the_plain_layer(single_rank, monkeypatch, pre_softmax: bool) -> None:
    """Between the experts' products, in bf16: output and every gradient."""
    options = {"params_dtype": torch.bfloat16, "bf16": True, "coe_iterations": 2}
    config = tiny_config(**options, moe_router_pre_softmax=pre_softmax)
    layer = build_layer(config).to(single_rank).train()
    generator = torch.Generator().manual_seed(1)
    x, y_grad = (torch.randn(16, 4, 32, generator=generator).bfloat16() for _ in range(2))

    def run() -> dict[str, torch.Tensor]:
        layer.zero_grad()
        leaf = x.to(single_rank).requires_grad_()
        weigh_balance_losses(1.0)
        y, _ = layer(leaf)
        y.backward(y_grad.to(single_rank))
        return {"output": y.detach(), "input gradient": leaf.grad} | {
            name: weight.grad.clone() for name, weight in layer.named_parameters()
        }

    ours = run()
    for module in (dispatcher, router):
        monkeypatch.setattr(module, "uses_kernels", lambda *_: False)
    for name, oracle in run().items():
        assert error(ours[name], oracle) < TOLERANCE[torch.bfloat16], name


def test_deterministic_steps_are_the_same_bits(single_rank) -> None:
    """And no operation of them is one that PyTorch warns of."""
    use_deterministic_kernels()
    try:
        found = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*deterministic.*")
            for _ in range(2):
                trainer = make_trainer(make_settings(train=BF16), single_rank)
                for _ in range(3):
                    trainer.step()
                found.append(everything(trainer))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*found)
