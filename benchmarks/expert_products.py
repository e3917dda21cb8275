"""The six products of the routed experts, by each backend of grouped GEMMs that can be used.

One call of the experts from the tokens in their own order: the rows are gathered, and the weight
gradients added to fp32 buffers, as in training, by what each backend has for it. Forward, gradients
of the inputs (dgrad) and of the weights (wgrad) are timed apart.

Axis letters: T tokens, K choices, R = T * K rows, E experts, H hidden, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from benchmarks.layers import FORWARD, expert_flops
from benchmarks.timing import Lap, Variant
from megatron_coe.model.moe.dispatcher import Order, order_by_expert
from megatron_coe.model.moe.expert_activation import SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, Grouping, Products, grouping
from megatron_coe.model.provider import CoEModelProvider

DGRAD, WGRAD = "dgrad", "wgrad"
PARTS = (FORWARD, DGRAD, WGRAD)
DENSE = "dense matmul"


@dataclass(frozen=True)
class Call:
    """The inputs of one call, and where the weight gradients go."""

    x: Tensor
    """[T, H]; probs [T, K], and dy [R, H], the gradient of the rows' outputs."""
    probs: Tensor
    dy: Tensor
    w1: Tensor
    """[E, 2F, H]; w2 [E, H, F]."""
    w2: Tensor
    main_grads: tuple[Tensor, Tensor]
    order: Order

    def grouping(self, name: str) -> Grouping:
        """Return the rows' grouping by expert for a backend."""
        return grouping(BACKENDS[name], self.x, self.order.counts, self.order)

    def missing(self, name: str) -> str:
        """Return what a backend lacks here."""
        widths = (*self.w1.shape[1:], *self.w2.shape[1:])
        return BACKENDS[name].missing(self.x.device, self.x.dtype, widths)


def random_call(provider: CoEModelProvider, tokens: int, device: torch.device) -> Call:
    """Draw a call: uniform choices, as of a fresh router."""
    generator = torch.Generator().manual_seed(4)
    E, K, H = provider.num_moe_experts, provider.moe_router_topk, provider.hidden_size
    F = provider.moe_ffn_hidden_size

    def random(*shape: int) -> Tensor:
        scaled = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return scaled.to(device, provider.params_dtype)

    chosen_TK = torch.rand(tokens, E, generator=generator).topk(K, dim=1).indices.to(device)
    weights = random(E, 2 * F, H), random(E, H, F)
    return Call(
        x=random(tokens, H),
        probs=torch.rand(tokens, K, generator=generator).to(device),
        dy=random(tokens * K, H),
        w1=weights[0],
        w2=weights[1],
        main_grads=(_fp32_zeros(weights[0]), _fp32_zeros(weights[1])),
        order=order_by_expert(chosen_TK, E),
    )


def _fp32_zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32)


def product_variants(provider: CoEModelProvider, call: Call) -> list[Variant]:
    """Return a variant for each backend that can be used (but the loop, on a GPU), and the ceiling.

    The ceiling is the products of all rows with one matrix, without anything between them.
    """
    flops = expert_flops(provider, len(call.dy)) // 3  # of each part
    runs: dict[str, Callable[[Lap], None]] = {}
    for name in BACKENDS:
        if name == "loop" or call.missing(name):
            continue
        runs[name] = _separate(call, name)
    if "triton" in runs:
        runs["triton, not fused"] = runs["triton"]
        runs["triton"] = _fused(call)
    runs[DENSE] = _dense(call)
    return [Variant(name, run, flops=3 * flops) for name, run in runs.items()]


def _separate(call: Call, name: str) -> Callable[[Lap], None]:
    products, activation = cast(Products, BACKENDS[name]), SwiGLU()
    token, slot, row, _ = call.order
    adds = products.adds_to_main_grad

    def run(lap: Lap) -> None:
        groups = call.grouping(name)  # with the wait for counts, where there is one
        x = call.x.index_select(0, token)
        probs = call.probs.flatten().index_select(0, slot).unsqueeze(1)
        hidden = products.times_transposed(x, call.w1, groups)
        products.times_transposed(activation.forward(hidden, probs), call.w2, groups)
        lap(FORWARD)
        dactivated = products.times(call.dy, call.w2, groups)
        activated, dhidden, _ = activation.backward(hidden, probs, dactivated)
        dx = products.times(dhidden, call.w1, groups)
        torch.nn.functional.embedding_bag(row, dx, mode="sum")
        lap(DGRAD)
        inputs = (dhidden, x, call.w1), (call.dy, activated, call.w2)
        for (dy, rows, weight), main_grad in zip(inputs, call.main_grads, strict=True):
            dw = products.outer(dy, rows, groups, weight, main_grad if adds else None)
            if dw is not None:
                main_grad.add_(dw)  # as DDP's hook
        lap(WGRAD)

    return run


def _fused(call: Call) -> Callable[[Lap], None]:
    from megatron_coe.model.kernels import grouped_gemm as kernels

    tiles, slot, row = kernels.TILES, call.order.slot, call.order.row
    weights = call.w1, call.w2

    def run(lap: Lap) -> None:
        ends = call.grouping("triton").ends
        probs = call.probs
        hidden, activated = kernels.fc1_swiglu(call.x, probs, weights[0], ends, slot, tiles.fc1)
        kernels.product(activated, weights[1], ends, True, tiles.fc2)
        lap(FORWARD)
        activated, dhidden, _ = kernels.dfc2_dswiglu(
            call.dy, hidden, probs, weights[1], ends, slot, tiles.dfc2
        )
        dx = kernels.product(dhidden, weights[0], ends, False, tiles.dfc1)
        torch.nn.functional.embedding_bag(row, dx, mode="sum")
        lap(DGRAD)
        into = call.main_grads
        kernels.add_outer(dhidden, call.x, ends, slot, into[0], True, tiles.dw1)
        kernels.add_outer(call.dy, activated, ends, None, into[1], True, tiles.dw2)
        lap(WGRAD)

    return run


def _dense(call: Call) -> Callable[[Lap], None]:
    x_RH = call.x.index_select(0, call.order.token)
    w1, w2 = call.w1[0], call.w2[0]
    hidden_R2F = x_RH @ w1.t()
    activated_RF = hidden_R2F[:, : w2.shape[1]].contiguous()

    def run(lap: Lap) -> None:
        torch.mm(x_RH, w1.t())
        torch.mm(activated_RF, w2.t())
        lap(FORWARD)
        torch.mm(call.dy, w2)
        torch.mm(hidden_R2F, w1)
        lap(DGRAD)
        torch.mm(hidden_R2F.t(), x_RH)
        torch.mm(call.dy.t(), activated_RF)
        lap(WGRAD)

    return run


# --- tiles of the Triton kernels ------------------------------------------------------------------


def tile_variants(call: Call) -> dict[str, list[Variant]]:
    """Return each product of the Triton kernels -> a variant per candidate of its tile."""
    return {
        product: [
            Variant("{}x{}x{}, {} warps, {} stages".format(*tile), _at_tile(call, product, tile))
            for tile in candidates
        ]
        for product, candidates in CANDIDATES.items()
    }


ROW_TILES = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 64, 64, 8, 4))
PAIR_TILES = ((128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3))
OUTER_TILES = ((128, 128, 64, 8, 4), (128, 64, 64, 8, 4), (128, 128, 32, 8, 5), (64, 128, 64, 4, 4))
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "fc1": PAIR_TILES,
    "fc2": ROW_TILES,
    "dfc2": ((128, 64, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 4)),
    "dfc1": ROW_TILES,
    # A gathered row takes two stages.
    "dw1": ((128, 128, 64, 8, 7), (128, 128, 32, 8, 7), *OUTER_TILES),
    "dw2": OUTER_TILES,
}
"""Product -> tiles that an H100 can run without spilling registers (a test compiles them)."""


def _at_tile(call: Call, product: str, tile: tuple[int, ...]) -> Callable[[Lap], None]:
    def run(lap: Lap) -> None:
        launch(call, product, tile)
        lap(product)

    return run


def launch(call: Call, product: str, tile: tuple[int, ...]) -> None:
    """Run one product; what it reads may hold any numbers."""
    from megatron_coe.model.kernels import grouped_gemm as kernels

    R, F = len(call.dy), call.w2.shape[2]
    ends = call.order.counts.cumsum(0, dtype=torch.int32)
    hidden, activated = call.x.new_empty(R, 2 * F), call.x.new_empty(R, F)
    tokens, slot, dy = (call.x, call.probs), call.order.slot, call.dy
    chosen = kernels.Tile(*tile)
    if product == "fc1":
        kernels.fc1_swiglu(*tokens, call.w1, ends, slot, chosen)
    elif product == "fc2":
        kernels.product(activated, call.w2, ends, True, chosen)
    elif product == "dfc2":
        kernels.dfc2_dswiglu(dy, hidden, call.probs, call.w2, ends, slot, chosen)
    elif product == "dfc1":
        kernels.product(hidden, call.w1, ends, False, chosen)
    elif product == "dw1":
        kernels.add_outer(hidden, call.x, ends, slot, call.main_grads[0], True, chosen)
    else:
        kernels.add_outer(dy, activated, ends, None, call.main_grads[1], True, chosen)
