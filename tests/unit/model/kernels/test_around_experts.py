"""The kernels between the experts' products: by Triton's interpreter equal to plain torch in fp64,
gradients included, and as part of the layer; compiled for an H100 at the paper's size.

Whether functions are interpreted Triton decides when it is imported: that half of the file runs in
a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_coe.model.linear_cross_entropy import has_triton
from megatron_coe.model.moe import dispatcher, router
from megatron_coe.model.moe.dispatcher import order_by_expert
from tests.builders import build_layer, randomize, tiny_config, weigh_balance_losses
from tests.interpreter import compiled, interpreted, run_interpreted

pytestmark = pytest.mark.skipif(not has_triton(), reason="no triton")

SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID = 0, 1, 2


@compiled
def test_interpreted() -> None:
    run_interpreted(__file__)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- compiled at the paper's size -----------------------------------------------------------------


@compiled
@pytest.mark.parametrize("K", [4, 8])
def test_they_compile_for_an_h100_and_keep_their_numbers_in_registers(K: int) -> None:
    from megatron_coe.model.kernels.combine import gather_sum
    from megatron_coe.model.kernels.order import order_rows
    from megatron_coe.model.kernels.route import route_tokens, route_tokens_backward
    from tests.sm90 import compiled_launches

    T, B, H, N = 32_768, 64, 1024, 63
    on_meta = {"device": "meta", "dtype": torch.bfloat16}
    rows, x = torch.empty(T * K, H, **on_meta), torch.empty(T, H, **on_meta)
    places = torch.empty(T, K, dtype=torch.int32, device="meta")
    logits = torch.empty(T, N, device="meta")
    with compiled_launches() as launches:
        probs, chosen, *_ = route_tokens(logits, B, K, SOFTMAX, 1.0)
        order_rows(chosen.flatten(), N, K)
        gather_sum(rows, places, x, x)
        gather_sum(rows, places)
        route_tokens_backward(logits, chosen, probs, torch.empty(B, N, device="meta"), SOFTMAX, 1.0)
    assert [launch.name for launch in launches] == [
        *("route_kernel", "count_rows_kernel", "place_rows_kernel"),
        *("gather_sum_kernel", "gather_sum_kernel", "route_backward_kernel"),
    ]
    assert {launch.name: launch.spilled for launch in launches if launch.spilled} == {}
    for launch in launches:
        assert "atom." not in launch.instructions and "red.global" not in launch.instructions
    wide = next(launch for launch in launches if launch.name == "gather_sum_kernel")
    assert "ld.global.v4.b32" in wide.instructions, "16 bytes at a time"


# --- by the interpreter ---------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("addends", [0, 1, 2])
@pytest.mark.parametrize(("K", "H"), [(1, 16), (3, 40), (2, 2100)])
def test_rows_are_gathered_and_summed(dtype, addends: int, K: int, H: int) -> None:
    from megatron_coe.model.kernels.combine import gather_sum

    T, generator = 5, seeded(H + addends)
    y = torch.randn(T * K, H, generator=generator).to(dtype)
    row = torch.randperm(T * K, generator=generator).view(T, K).int()
    more = [torch.randn(T, H, generator=generator).to(dtype) for _ in range(addends)]
    found = gather_sum(y, row, *more)
    exact = sum((addend.double() for addend in more), y.double()[row.long()].sum(1))
    # One rounding; the interpreter's to bf16 may cut where a GPU rounds.
    tolerance = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert found.dtype == dtype and ((found.double() - exact).abs() <= tolerance).all()


@interpreted
@pytest.mark.parametrize(("T", "K", "N"), [(1, 1, 1), (50, 3, 7), (200, 8, 63), (70, 2, 300)])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_order_is_a_stable_sort(T: int, K: int, N: int, skewed: bool) -> None:
    from megatron_coe.model.kernels.order import order_rows

    chosen = torch.randint(N, (T, K), generator=seeded(T))
    if skewed:
        chosen = chosen // 5 * 5
    token, slot, place, counts = order_rows(chosen.flatten(), N, K)
    plain = order_by_expert(chosen, N)
    ours = dispatcher.Order(token, slot, place.view(T, K), counts)
    for name, mine, other in zip(plain._fields, ours, plain, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other), name


def plain_route(logits: Tensor, K: int, kind: int, scaling: float) -> tuple[Tensor, ...]:
    """Probabilities, choices and every token's scores as the sums have them."""
    scores = logits.sigmoid() if kind == SIGMOID else logits.softmax(1)
    values, chosen = (logits if kind == SOFTMAX_OF_CHOSEN else scores).topk(K)
    if kind == SOFTMAX_OF_CHOSEN:
        values = values.softmax(1)
    elif kind == SIGMOID:
        scores = scores / scores.sum(1, keepdim=True)
        values = values / values.sum(1, keepdim=True) if K > 1 else values
    return values * scaling, chosen, scores


@interpreted
@pytest.mark.parametrize("kind", [SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID])
@pytest.mark.parametrize(
    ("S", "B", "N", "K"), [(70, 2, 7, 3), (5, 3, 63, 8), (3, 1, 300, 1), (1, 2, 4, 4)]
)
def test_a_router_in_one_pass(kind: int, S: int, B: int, N: int, K: int) -> None:
    from megatron_coe.model.kernels.route import route_tokens, route_tokens_backward

    logits = torch.randn(S * B, N, generator=seeded(N))
    exact = logits.double().requires_grad_()
    probs, chosen, scores = plain_route(exact, K, kind, 1.7)
    sums = scores.view(S, B, N).sum(0)
    is_chosen = torch.zeros(S * B, N).scatter(1, chosen, 1.0)
    found = route_tokens(logits, B, K, kind, 1.7)
    mass = (scores * is_chosen).sum(1).view(S, B).sum(0)
    for mine, oracle in zip(
        found, (probs, chosen, is_chosen.view(S, B, N).sum(0), sums, mass), strict=True
    ):
        torch.testing.assert_close(mine.double(), oracle.double(), rtol=1e-5, atol=1e-6)

    dprobs = torch.randn(probs.shape, generator=seeded(1))
    dsums = torch.randn(sums.shape, generator=seeded(2))
    for with_sums in (dsums, None):
        exact.grad = None
        objective = (probs * dprobs).sum() + (0 if with_sums is None else (sums * dsums).sum())
        objective.backward(retain_graph=True)
        ours = route_tokens_backward(logits, found[1], dprobs, with_sums, kind, 1.7)
        torch.testing.assert_close(ours.double(), exact.grad, rtol=1e-4, atol=1e-6)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID])
def test_values_that_are_not_finite_choose_experts_that_exist(bad: float, kind: int) -> None:
    """They are found after the step; until then nothing may be read out of bounds."""
    from megatron_coe.model.kernels.route import route_tokens

    N, K = 7, 3
    logits = torch.randn(6, N, generator=seeded(0))
    logits[1], logits[2, 4], logits[3, :5] = bad, bad, bad
    _, chosen, *_ = route_tokens(logits, 2, K, kind, 1.0)
    assert all(len(set(row)) == K and min(row) >= 0 and max(row) < N for row in chosen.tolist())


LAYERS = {
    "inner": {},
    "outer": {"coe_residual": "outer"},
    "addinit": {"coe_residual": "addinit", "coe_iterations": 3},
    "no shared expert": {"moe_shared_expert_intermediate_size": None},
    "one router": {"coe_independent_gate": False},
    "upcycled": {"coe_residual": "outer", "coe_upcycled": True},
    "of the chosen": {"moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "batch-wise loss": {"moe_router_load_balancing_type": "aux_loss"},
    "both losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2],
        "moe_z_loss_coeff": 1e-2,
    },
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


class Calls:
    """Stands for `uses_kernels` on a CPU: yes where it would be on a GPU, counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tensor: Tensor, *dtypes: torch.dtype) -> bool:
        self.count += 1
        return not dtypes or tensor.dtype in dtypes


@interpreted
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_kernels_is_the_plain_layer(single_rank, monkeypatch, kind: str) -> None:
    """Output, gradients of the input and every weight, statistics: fp32, 1e-5."""
    config = tiny_config(**{"coe_iterations": 2, **LAYERS[kind]})
    layer = build_layer(config)
    randomize(layer, seeded(3), std=0.15)
    x, y_grad = (torch.randn(6, 3, 32, generator=seeded(seed)) for seed in (4, 5))

    def run() -> dict[str, Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        counts = torch.zeros(config.coe_iterations, config.num_moe_experts + 1, dtype=torch.float64)
        routers = [m for m in layer.modules() if isinstance(m, router.CoERouter)]
        for each in routers:
            each.routing_counts = counts
        weigh_balance_losses(1.0)
        y, _ = layer(leaf)
        y.backward(y_grad)
        return {"output": y.detach(), "input gradient": leaf.grad, "statistics": counts} | {
            name: weight.grad.clone() for name, weight in layer.named_parameters()
        }

    plain, calls = run(), Calls()
    for module in (dispatcher, router):
        monkeypatch.setattr(module, "uses_kernels", calls)
    ours = run()
    # Router, order and combine going forward, and dispatched tokens' gradient: asked once each.
    passes = 2 if kind == "recomputed" else 1
    assert calls.count == config.coe_iterations * (3 * passes + 1)
    assert plain["statistics"][:, :-1].sum() == config.coe_iterations * 18 * config.moe_router_topk
    for name, oracle in plain.items():
        error = (ours[name] - oracle).abs().max() / max(1.0, oracle.abs().max())
        assert error < 1e-5, f"{name}: {error:.1e}"
