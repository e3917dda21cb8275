"""Run the experts' Triton kernels in Triton's interpreter; print each result's error as JSON.

A process of its own: Triton reads `TRITON_INTERPRET` when it is imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_coe import single_process
from megatron_coe.model.kernels import grouped_gemm
from megatron_coe.model.kernels.grouped_gemm import Tile, Tiles
from megatron_coe.model.moe.dispatcher import Order, order_by_expert
from megatron_coe.model.moe.expert_activation import ByAutograd, ExpertActivation, SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, Grouping, Triton
from megatron_coe.model.moe.grouped_mlp import SharedWeights, expert_mlp
from tests.builders import build_layer, randomize, tiny_config, weigh_balance_losses

T, K, E, H, WIDTH = 24, 2, 5, 40, 24
"""No width is a multiple of a tile of 16."""

COUNTS = {
    "uneven": [19, 0, 17, 11, 1],
    "one takes all": [0, 0, 48, 0, 0],
    "whole tiles": [16, 0, 32, 0, 0],
}
Leaves = tuple[Tensor, ...]


def swiglu(hidden: Tensor, probs: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs).to(hidden.dtype)


def random_leaves(dtype: torch.dtype, seed: int) -> Leaves:
    """x [T, H], probs [T, K] in fp32, and the weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, H), (T, K), (E, 2 * WIDTH, H), (E, H, WIDTH)
    x, probs, w1, w2 = (torch.randn(shape, generator=generator) / 2 for shape in shapes)
    leaves = x.to(dtype), probs, w1.to(dtype), w2.to(dtype)
    return tuple(leaf.requires_grad_() for leaf in leaves)


def random_order(counts: list[int], seed: int) -> Order:
    """An order in which experts have these counts (a token may choose one twice)."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    return order_by_expert(experts[torch.randperm(T * K, generator=generator)].view(T, K), E)


def definition(leaves: Leaves, order: Order, counts: list[int]) -> Tensor:
    """y [R, H] in fp64, a loop over the experts."""
    x, probs, w1, w2 = leaves
    rows, probs_R1 = x[order.token.long()], probs.flatten()[order.slot.long()].unsqueeze(1)
    parts = zip(rows.split(counts), probs_R1.split(counts), w1, w2, strict=True)
    return torch.cat([swiglu(a @ u.T, p) @ v.T for a, p, u, v in parts])


def computed(leaves: Leaves, order: Order, gather: bool, activation: ExpertActivation) -> Tensor:
    """The same by the autograd function, over rows that are gathered by the kernel or before."""
    x, probs, w1, w2 = leaves
    ends = order.counts.cumsum(0, dtype=torch.int32)
    backend = BACKENDS["triton"]
    shared = SharedWeights(w1, w2, backend)
    if gather:
        groups = Grouping(backend, ends=ends, order=order)
        return expert_mlp(x, probs, shared, groups, activation)
    rows, probs_R1 = x[order.token.long()], probs.flatten()[order.slot.long()].unsqueeze(1)
    return expert_mlp(rows, probs_R1, shared, Grouping(backend, ends=ends), activation)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.abs().max()).item()


def errors(
    counts: list[int], dtype: torch.dtype, gather: bool, activation: ExpertActivation
) -> dict[str, float]:
    """Of the output and all gradients: of autograd, then once more added to fp32 buffers."""
    leaves, order = random_leaves(dtype, 1), random_order(counts, 2)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    want = definition(exact, order, counts)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    wanted = torch.autograd.grad(want, exact, upstream.double())

    got = computed(leaves, order, gather, activation)
    found = {"y": error(got, want)}
    grads = torch.autograd.grad(got, leaves, upstream)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    names = ("x", "probs", "w1", "w2")
    found |= {f"d{n}": error(g, w) for n, g, w in zip(names, grads, wanted, strict=True)}

    for weight in leaves[2:]:
        weight.main_grad = torch.full(weight.shape, 0.5)
        weight.grad_added_to_main_grad = False
    computed(leaves, order, gather, activation).backward(upstream)
    for name, weight, expected in zip(names[2:], leaves[2:], wanted[2:], strict=True):
        assert weight.grad_added_to_main_grad
        found[f"main_grad of {name}"] = error(weight.main_grad - 0.5, expected)
    return found


def layer_errors() -> dict[str, float]:
    """Of a whole layer with these kernels, beside the same one with the loop."""
    layers = []
    for backend in ("loop", "triton"):
        layer = build_layer(tiny_config(coe_iterations=2, moe_grouped_gemm_backend=backend))
        randomize(layer, torch.Generator().manual_seed(4), std=0.15)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(4, 4, 32, generator=generator).requires_grad_()
        weigh_balance_losses(1.0)
        y, _ = layer(x)
        y.backward(torch.randn(y.shape, generator=generator))
        routers = {f"router {t}": router.weight.grad for t, router in enumerate(layer.router)}
        experts = {"w1": layer.experts.linear_fc1.weight, "w2": layer.experts.linear_fc2.weight}
        gradients = {name: weight.grad for name, weight in experts.items()}
        layers.append({"y": y.detach(), "dx": x.grad, **routers, **gradients})
    loop, ours = layers
    return {name: error(ours[name], loop[name]) for name in loop}


def main() -> None:
    tile = Tile(16, 16, 16, num_warps=4, num_stages=1)
    grouped_gemm.TILES = Tiles(*[tile] * len(Tiles._fields))
    found = {}
    for name, counts in COUNTS.items():
        for dtype in (torch.float32, torch.float16):
            key = f"{name}, {dtype}"
            found[f"{key}, gathered"] = errors(counts, dtype, True, SwiGLU())
    found["uneven, torch.float32, rows"] = errors(COUNTS["uneven"], torch.float32, False, SwiGLU())
    unfused = ByAutograd(swiglu)
    found["uneven, torch.float32, unfused"] = errors(
        COUNTS["uneven"], torch.float32, False, unfused
    )
    # All that it lacks here is the GPU.
    Triton.missing = lambda *_: ""  # type: ignore[method-assign]
    with single_process(seed=1):
        found["layer"] = layer_errors()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
