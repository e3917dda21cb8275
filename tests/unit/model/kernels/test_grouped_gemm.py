"""The experts' Triton kernels: in Triton's interpreter against the definition in fp64, gradients
included, and compiled for an H100 at the paper's sizes.

Whether functions are interpreted Triton decides when it is imported: that part of the file runs in
a process of its own. Tolerances, relative to the largest entry: fp32 1e-5, fp16 3e-3. (The
interpreter multiplies no bf16; `tests/gpu` has it.)
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch's CPU build brings no triton")

from benchmarks.expert_products import CANDIDATES, Call
from benchmarks.expert_products import launch as launch_product
from megatron_coe.model.kernels import grouped_gemm
from megatron_coe.model.kernels.grouped_gemm import Tile, Tiles
from megatron_coe.model.moe.dispatcher import Order, order_by_expert
from megatron_coe.model.moe.expert_activation import ByAutograd, ExpertActivation, SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, Grouping, Triton
from megatron_coe.model.moe.grouped_mlp import SharedWeights, expert_mlp
from tests.builders import build_layer, randomize, tiny_config, weigh_balance_losses
from tests.interpreter import compiled, interpreted, run_interpreted
from tests.sm90 import MOST_REGISTERS, MOST_SHARED, Launch, compiled_launches

TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3}


@compiled
def test_interpreted() -> None:
    run_interpreted(__file__)


# --- in the interpreter ---------------------------------------------------------------------------

T, K, E, H, F = 24, 2, 5, 40, 24
"""No width is a multiple of a tile of 16."""

COUNTS = {
    "uneven": [19, 0, 17, 11, 1],
    "one takes all": [0, 0, 48, 0, 0],
    "whole tiles": [16, 0, 32, 0, 0],
}
Leaves = tuple[Tensor, ...]


def swiglu(hidden: Tensor, probs: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * probs).to(hidden.dtype)


def random_leaves(dtype: torch.dtype, seed: int) -> Leaves:
    """x [T, H], probs [T, K] in fp32, and the weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, H), (T, K), (E, 2 * F, H), (E, H, F)
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


CASES = {
    **{f"{name}, {dtype}": (COUNTS[name], dtype, True) for name in COUNTS for dtype in TOLERANCES},
    "rows gathered before": (COUNTS["uneven"], torch.float32, False),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(*[Tile(16, 16, 16, num_warps=4, num_stages=1)] * len(Tiles._fields))
    monkeypatch.setattr(grouped_gemm, "TILES", tiles)


@interpreted
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("counts", "dtype", "gather"), CASES.values(), ids=CASES)
def test_the_definition(counts: list[int], dtype: torch.dtype, gather: bool) -> None:
    for name, found in errors(counts, dtype, gather, SwiGLU()).items():
        assert found < TOLERANCES[dtype], name


@interpreted
@pytest.mark.usefixtures("small_tiles")
def test_another_activation_stands_between_the_products() -> None:
    found = errors(COUNTS["uneven"], torch.float32, False, ByAutograd(swiglu))
    assert max(found.values()) < TOLERANCES[torch.float32], found


@interpreted
@pytest.mark.usefixtures("small_tiles")
def test_a_layer_is_that_of_the_loop(monkeypatch: pytest.MonkeyPatch, single_rank) -> None:
    """With the local dispatcher, which leaves the gathering to the kernels."""
    monkeypatch.setattr(Triton, "missing", lambda *_: "")  # all that it lacks is the GPU
    found = []
    for backend in ("loop", "triton"):
        layer = build_layer(tiny_config(coe_iterations=2, moe_grouped_gemm_backend=backend))
        randomize(layer, torch.Generator().manual_seed(4), std=0.15)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(4, 4, 32, generator=generator).requires_grad_()
        weigh_balance_losses(1.0)
        y, _ = layer(x)
        y.backward(torch.randn(y.shape, generator=generator))
        assert layer.experts.gathers_rows(x) == (backend == "triton")
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for want, got in zip(*found, strict=True):
        assert error(got, want) < TOLERANCES[torch.float32]


# --- compiled -------------------------------------------------------------------------------------


def paper_call(choices: int) -> Call:
    """The paper's layer, on tensors without values; F = 704 is no multiple of 128."""
    T, E, H, F = 32_768, 63, 1024, 704
    rows = T * choices

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    indices = [meta(*s, dtype=torch.int32) for s in ((rows,), (rows,), (T, choices), (E,))]
    shapes = (E, 2 * F, H), (E, H, F)
    return Call(
        x=meta(T, H),
        probs=meta(T, choices, dtype=torch.float32),
        dy=meta(rows, H),
        w1=meta(*shapes[0]),
        w2=meta(*shapes[1]),
        main_grads=(meta(*shapes[0], dtype=torch.float32), meta(*shapes[1], dtype=torch.float32)),
        order=Order(*indices),
    )


class Pass(NamedTuple):
    """A call forward and backward, as autograd runs it."""

    call: Call
    launches: list[Launch]
    saved: int
    """Bytes kept for the backward pass, the weights' not among them."""


@pytest.fixture(scope="module", params=[4, 8], ids=["K=4", "K=8"])
def one_pass(request: pytest.FixtureRequest) -> Pass:
    call, kept = paper_call(request.param), {}
    x, probs = call.x.requires_grad_(), call.probs.requires_grad_()
    weights = [torch.nn.Parameter(weight) for weight in (call.w1, call.w2)]
    for weight, main_grad in zip(weights, call.main_grads, strict=True):
        weight.main_grad = main_grad

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    backend = BACKENDS["triton"]
    with (
        compiled_launches() as launches,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        shared = SharedWeights(*weights, backend)
        y = expert_mlp(x, probs, shared, call.grouping("triton"), SwiGLU())
        y.backward(call.dy)
    assert x.grad.shape == x.shape and probs.grad.shape == probs.shape
    of_weights = sum(weight.untyped_storage().nbytes() for weight in weights)
    return Pass(call, launches, sum(kept.values()) - of_weights)


@pytest.fixture
def launches(one_pass: Pass) -> list[Launch]:
    return one_pass.launches


@compiled
def test_rows_are_saved_only_behind_the_first_product(one_pass: Pass) -> None:
    """Tokens, probabilities and fc1's output: no row of the input, nor its activation. (That no
    value was asked for, a host sync on a GPU, the tensors without values have shown.)"""
    call = one_pass.call
    hidden = len(call.dy) * call.w1.shape[1]
    assert one_pass.saved == call.x.nbytes + call.probs.nbytes + 2 * hidden


@compiled
def test_a_call_is_six_launches(launches: list[Launch]) -> None:
    forward, backward = ["_fc1_swiglu", "_product"], ["_dfc2_dswiglu", "_product"]
    assert [launch.name for launch in launches] == [*forward, *backward, *["_add_outer"] * 2]


@compiled
def test_an_h100_can_run_them_without_spilling(launches: list[Launch]) -> None:
    for launch in launches:
        assert launch.shared <= MOST_SHARED, launch.name
        assert launch.registers * launch.num_warps * 32 <= MOST_REGISTERS, launch.name
        assert launch.spilled == 0, launch.name


@compiled
def test_products_are_on_tensor_cores_and_loads_asynchronous(launches: list[Launch]) -> None:
    for launch in launches:
        assert "wgmma.mma_async" in launch.instructions, launch.name
        assert "cp.async.cg" in launch.instructions, launch.name  # 16 bytes at a time
        assert not re.search(r"\b(atom|red)\.", launch.instructions), launch.name


@compiled
@pytest.mark.parametrize("product", CANDIDATES)
def test_every_candidate_of_the_benchmark_fits(product: str) -> None:
    """None is timed that spills, and so would be judged by its spilling."""
    call = paper_call(4)
    with compiled_launches() as launches:
        for tile in CANDIDATES[product]:
            launch_product(call, product, tile)
    for tile, launched in zip(CANDIDATES[product], launches, strict=True):
        assert launched.shared <= MOST_SHARED and launched.spilled == 0, tile
