"""What a CPU cannot show: the GPU's kernels, and the layer on them, against plain torch there.

`make test-gpu` runs these; everything else is tested on the CPU, also on a machine with GPUs.
"""

from __future__ import annotations

import pytest
import torch

from megatron_coe.config.run_config import ParallelSettings, TrainSettings
from megatron_coe.fault_tolerance.exceptions import DeviceMemoryError
from megatron_coe.fault_tolerance.heartbeat import STEP, Heartbeat
from megatron_coe.model.moe.dispatcher import order_by_expert
from megatron_coe.model.moe.expert_activation import SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, Grouping, grouping
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


COUNTS = [5, 0, 300, 17]  # rows of each expert: none, fewer than a tile's, several tiles'


def usable(name: str, dtype: torch.dtype) -> bool:
    return torch.cuda.is_available() and not BACKENDS[name].missing(
        torch.device("cuda", 0), dtype, (64, 32)
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_grouped_experts_are_a_product_per_expert(
    device: torch.device, dtype: torch.dtype, name: str
) -> None:
    """Output and gradients, two calls with the same weights; the gradients of the weights also
    added to fp32 buffers, with the same bits when all is done once more."""
    if not usable(name, dtype):
        pytest.skip(f"{name} cannot be used for {dtype} here")
    backend, counts_E = BACKENDS[name], torch.tensor(COUNTS)
    rows = sum(COUNTS)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        scaled = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return scaled.to(device, dtype).requires_grad_()

    leaves = random(rows, 64), random(rows, 1), random(4, 64, 64), random(4, 64, 32)
    dy = random(rows, 64).detach()

    def ours() -> torch.Tensor:
        x, probs, w1, w2 = leaves
        groups = grouping(backend, x, counts_E.to(device))
        shared = SharedWeights(w1, w2, backend)
        y = expert_mlp(x, probs, shared, groups, SwiGLU())
        return y + expert_mlp(y, probs, shared, groups, SwiGLU())

    y = ours()
    grads = torch.autograd.grad(y, leaves, dy)

    exact = x, probs, w1, w2 = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def oracle(x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(COUNTS), probs.split(COUNTS), w1, w2, strict=True)
        return torch.cat([_swiglu(x_e @ u.t()) * p_e @ v.t() for x_e, p_e, u, v in parts])

    expected = oracle(x)
    expected = expected + oracle(expected)
    oracles = torch.autograd.grad(expected, exact, dy.double())
    for got, want in zip((y, *grads), (expected, *oracles), strict=True):
        assert error(got, want) < TOLERANCE[dtype]

    if backend.adds_to_main_grad:
        weights, found = leaves[2:], []
        for _ in range(2):
            for weight in weights:
                weight.main_grad = torch.full_like(weight, 0.5, dtype=torch.float32)
            ours().backward(dy)
            for weight, want in zip(weights, oracles[2:], strict=True):
                assert error(weight.main_grad - 0.5, want) < TOLERANCE[dtype]
            found.append([weight.main_grad for weight in weights])
        assert all(map(torch.equal, *found))


@pytest.mark.skipif(not usable("triton", torch.bfloat16), reason="the kernels cannot run here")
@pytest.mark.parametrize("choices", [4, 8])
def test_gathering_kernels_at_the_papers_widths(device: torch.device, choices: int) -> None:
    """Rows gathered by the kernel: the numbers of rows gathered before, to a rounding."""
    tokens, experts, hidden, ffn = 2048, 63, 1024, 704
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        scaled = torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
        return scaled.bfloat16().requires_grad_()

    x, w1, w2 = (
        random(tokens, hidden),
        random(experts, 2 * ffn, hidden),
        random(experts, hidden, ffn),
    )
    scores = torch.rand(tokens, experts, generator=generator, device=device)
    probs, chosen = scores.topk(choices)
    probs = probs.requires_grad_()
    order = order_by_expert(chosen, experts)
    ends = order.counts.cumsum(0, dtype=torch.int32)
    dy = random(tokens * choices, hidden).detach()
    backend = BACKENDS["triton"]

    def run(gather: bool) -> list[torch.Tensor]:
        shared = SharedWeights(w1, w2, backend)
        if gather:
            groups = Grouping(backend, ends=ends, order=order)
            y = expert_mlp(x, probs, shared, groups, SwiGLU())
        else:
            rows, slot = x[order.token.long()], order.slot.long()
            groups = Grouping(backend, ends=ends)
            y = expert_mlp(rows, probs.flatten()[slot].unsqueeze(1), shared, groups, SwiGLU())
        return [y, *torch.autograd.grad(y, (x, probs, w1, w2), dy)]

    for got, want in zip(run(gather=True), run(gather=False), strict=True):
        assert error(got, want) < TOLERANCE[torch.bfloat16]


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
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_shared_expert_overlap": True}, {"moe_grouped_gemm_backend": "triton"}],
    ids=["default", "overlap", "triton"],
)
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
