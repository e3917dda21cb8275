"""What a CPU cannot show: the GPU's kernels, and the layer on them, against plain torch there.

`make test-gpu` runs these; everything else is tested on the CPU, also on a machine with GPUs.
"""

from __future__ import annotations

import pytest
import torch

from megatron_coe.config.run_config import ParallelSettings, TrainSettings
from megatron_coe.fault_tolerance.exceptions import DeviceMemoryError
from megatron_coe.fault_tolerance.heartbeat import STEP, Heartbeat
from megatron_coe.model.moe.expert_activation import SwiGLU
from megatron_coe.model.moe.grouped_linear import grouping
from megatron_coe.model.moe.grouped_mlp import SharedWeights, expert_mlp
from megatron_coe.training.out_of_memory import explained, memory_remedies
from tests.builders import build_layer, randomize, reference_of, tiny_config, weigh_balance_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ONE_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() in ((9, 0), (10, 0))
"""Whether `grouped_mm` is, for bf16."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest entry; TF32 is off

DISPATCHERS = {
    "local": {},
    "alltoall": {"moe_token_dispatcher_type": "megatron_alltoall"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}


def error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    return ((ours.double() - oracle.double()).abs().max() / oracle.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_grouped_mm_is_a_product_per_expert(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.tensor([5, 0, 64, 17])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        scaled = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return scaled.to(device, dtype).requires_grad_()

    leaves = x, probs, w1, w2 = random(86, 64), random(86, 1), random(4, 64, 64), random(4, 64, 32)
    chosen = grouping(x, rows.to(device), (32, 64))
    one_kernel = dtype == torch.bfloat16 and ONE_KERNEL
    assert isinstance(chosen, torch.Tensor) == one_kernel, "the sizes must stay on the device"
    groups = rows.cumsum(0, dtype=torch.int32).to(device)
    shared = SharedWeights(w1, w2)
    y = expert_mlp(x, probs, shared, groups, SwiGLU())
    y = y + expert_mlp(y, probs, shared, groups, SwiGLU())
    dy = random(86, 64).detach()
    grads = torch.autograd.grad(y, leaves, dy)

    exact = x, probs, w1, w2 = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def oracle(x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(rows.tolist()), probs.split(rows.tolist()), w1, w2, strict=True)
        return torch.cat([_swiglu(x_e @ u.t()) * p_e @ v.t() for x_e, p_e, u, v in parts])

    expected = oracle(x)
    expected = expected + oracle(expected)
    oracles = torch.autograd.grad(expected, exact, dy.double())
    for ours, want in zip((y, *grads), (expected, *oracles), strict=True):
        assert error(ours, want) < TOLERANCE[dtype]


def _swiglu(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("residual", ["inner", "outer", "addinit"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_layer_is_the_reference(single_rank, dispatcher: str, residual: str) -> None:
    config = tiny_config(coe_iterations=3, coe_residual=residual, **DISPATCHERS[dispatcher])
    layer = build_layer(config).to(single_rank)
    generator = torch.Generator().manual_seed(1)
    randomize(layer, generator, std=0.15)
    x = torch.randn(16, 4, 32, generator=generator).to(single_rank).requires_grad_()
    y_grad = torch.randn(16, 4, 32, generator=generator).to(single_rank)
    weigh_balance_losses(1.0)
    y, _ = layer(x)
    y.backward(y_grad)

    reference, pairs = reference_of(layer)
    x_ref = x.detach().clone().requires_grad_()
    expected, losses = reference.forward(x_ref)
    ((expected * y_grad).sum() + config.moe_aux_loss_coeff * losses.sum()).backward()
    assert error(y, expected) < 1e-4
    assert error(x.grad, x_ref.grad) < 1e-4
    for name, grad_of, oracle in pairs:
        assert error(grad_of(), oracle.grad) < 1e-4, name


@pytest.mark.skipif(not ONE_KERNEL, reason="grouped_mm is not one kernel on this GPU")
@pytest.mark.parametrize("padding", [False, True], ids=["no mask", "padding mask"])
@pytest.mark.parametrize("changes", [{}, {"moe_shared_expert_overlap": True}])
def test_a_layer_never_waits_for_the_device(single_rank, changes: dict, padding: bool) -> None:
    """Forward and backward, after one pass that makes what is made once."""
    config = tiny_config(params_dtype=torch.bfloat16, bf16=True, **changes)
    layer = build_layer(config).to(single_rank).train()
    weigh_balance_losses(1.0)
    x = torch.randn(16, 4, 32, dtype=torch.bfloat16, device=single_rank, requires_grad=True)
    mask = torch.zeros(4, 16, dtype=torch.bool, device=single_rank) if padding else None
    y_grad = torch.randn_like(x)
    layer(x, padding_mask=mask)[0].backward(y_grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, padding_mask=mask)[0].backward(y_grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()


def test_a_full_device_is_explained(device: torch.device) -> None:
    heartbeat = Heartbeat()
    heartbeat.enter(STEP, 3)
    remedies = memory_remedies({}, ParallelSettings(), TrainSettings(micro_batch_size=8))
    with (
        pytest.raises(DeviceMemoryError, match=r"^out of memory in step 3: CUDA out of memory"),
        explained(heartbeat, remedies),
    ):
        torch.empty(1 << 50, device=device)
