"""The local dispatcher: against Megatron's, against plain Python, and without asking the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_default_pg_collection,
)
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)

from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.model.moe import experts
from megatron_coe.model.moe.dispatcher import LocalDispatcher, order_by_expert
from megatron_coe.model.moe.grouped_linear import BACKENDS
from megatron_coe.model.moe.router import routing_map_of
from tests.builders import build_layer, tiny_config

S, B, H, N, K = 6, 3, 32, 7, 2


@pytest.fixture
def groups(single_rank) -> ProcessGroupCollection:
    return get_default_pg_collection()


def routing(seed: int, skewed: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [S, B, H], weights and chosen experts [T, K], in no order; skewed: of two only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    scores = torch.rand(S * B, N, generator=generator, dtype=torch.float64)
    if skewed:
        scores[:, 1] += 1
        scores[:, 4] += 1
    probs, chosen = scores.topk(K)
    shuffled = torch.rand(S * B, K, generator=generator).argsort(dim=1)
    return x, probs.gather(1, shuffled), chosen.gather(1, shuffled)


def test_rows_are_sorted_by_expert_then_token(groups) -> None:
    _, _, chosen = routing(0)
    order = order_by_expert(chosen, N)
    pairs = [(row[k], t, k) for t, row in enumerate(chosen.tolist()) for k in range(K)]
    expected = sorted(pairs)
    assert order.token.tolist() == [t for _, t, _ in expected]
    assert order.slot.tolist() == [t * K + k for _, t, k in expected]
    assert order.counts.tolist() == [sum(e == n for e, _, _ in pairs) for n in range(N)]
    for place, (_, t, k) in enumerate(expected):
        assert order.row[t, k] == place


@pytest.mark.parametrize("skewed", [False, True], ids=["all experts", "two experts"])
def test_rows_weights_and_sums_are_megatrons(groups, skewed: bool) -> None:
    """With experts that multiply each row by its weight and its expert's number."""
    config = tiny_config(moe_token_dispatcher_type="megatron_alltoall")
    theirs = MoEAlltoAllTokenDispatcher(N, list(range(N)), config, groups)
    ours = LocalDispatcher(tiny_config(), groups)
    x, probs, chosen = routing(1, skewed)
    y_grad = routing(2)[0]
    results = []
    for dispatcher in (ours, theirs):
        x_leaf, probs_leaf = x.clone().requires_grad_(), probs.clone().requires_grad_()
        routed, weights = chosen, probs_leaf
        if dispatcher is theirs:
            routed = routing_map_of(chosen, N)
            weights = torch.zeros(S * B, N, dtype=x.dtype).scatter(1, chosen, probs_leaf)
        tokens, weights = dispatcher.dispatch_preprocess(x_leaf, routed, weights)
        tokens, weights = dispatcher.token_dispatch(tokens, weights)
        rows, counts, weights = dispatcher.dispatch_postprocess(tokens, weights)
        factors = torch.arange(1, N + 1, dtype=x.dtype).repeat_interleave(counts)
        y = rows * (factors * weights)[:, None]
        y = dispatcher.token_combine(dispatcher.combine_preprocess(y))
        y = dispatcher.combine_postprocess(y)
        y.backward(y_grad)
        results.append((rows, counts, weights, y, x_leaf.grad, probs_leaf.grad))
    names = ("rows", "counts", "weights", "output", "gradient of x", "gradient of the weights")
    for name, mine, other in zip(names, *results, strict=True):
        if name in ("rows", "counts", "weights"):
            assert torch.equal(mine, other), name
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences(groups) -> None:
    dispatcher = LocalDispatcher(tiny_config(), groups)
    x, probs, chosen = routing(3)

    def through(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        rows, _, weights = dispatcher.dispatch_postprocess(
            *dispatcher.dispatch_preprocess(x, chosen, probs)
        )
        return dispatcher.combine_preprocess(rows**2 * weights[:, None])

    assert torch.autograd.gradcheck(through, (x.requires_grad_(), probs.requires_grad_()))


def test_sixteen_bit_rows_are_summed_in_fp32(groups) -> None:
    """256 + 8 * 1 in bfloat16, one at a time, stays 256."""
    config = tiny_config(num_moe_experts=9, moe_router_topk=9)
    dispatcher = LocalDispatcher(config, groups)
    chosen = torch.arange(9).expand(2, 9)
    x = torch.ones(2, 1, 32, dtype=torch.bfloat16)
    rows, _, _ = dispatcher.dispatch_postprocess(
        *dispatcher.dispatch_preprocess(x, chosen, torch.ones(2, 9))
    )
    rows[:2] = 256
    assert (dispatcher.combine_preprocess(rows) == 264).all()


def test_nothing_is_remembered_between_passes(groups) -> None:
    """What a dispatcher remembers keeps a whole graph alive, and through it the model."""
    layer = build_layer(tiny_config())
    layer(routing(4)[0].float())
    held = vars(layer.token_dispatcher).values()
    assert not any(isinstance(value, torch.Tensor | tuple) and len(value) > 3 for value in held)
    assert layer.token_dispatcher.order is None


DISPATCHERS = {
    LocalDispatcher: [{}, {"moe_router_topk": 1}, {"moe_shared_expert_overlap": True}],
    MoEAlltoAllTokenDispatcher: [
        {"moe_token_dispatcher_type": "megatron_alltoall"},
        {"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "aux_loss"},
    ],
    MoEAllGatherTokenDispatcher: [{"moe_token_dispatcher_type": "allgather"}],
}


@pytest.mark.parametrize(
    ("dispatcher", "changes"),
    [(dispatcher, changes) for dispatcher, cases in DISPATCHERS.items() for changes in cases],
)
def test_who_dispatches(groups, dispatcher: type, changes: dict) -> None:
    layer = build_layer(tiny_config(**changes))
    assert type(layer.token_dispatcher) is dispatcher
    y, _ = layer(routing(5)[0].float())
    assert y.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"moe_expert_capacity_factor": 1.0}])
def test_several_ranks_do_not_dispatch_locally(changes: dict) -> None:
    assert tiny_config().dispatches_locally
    ranks = {"num_moe_experts": 8, "expert_model_parallel_size": 2}
    assert not tiny_config(**ranks, **changes).dispatches_locally
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert not tiny_config(**tensor, expert_tensor_parallel_size=2).dispatches_locally
    # Each rank has tokens of its own and every expert whole.
    assert tiny_config(**tensor, expert_tensor_parallel_size=1).dispatches_locally


# --- the device is never asked --------------------------------------------------------------------

QUIET = [
    {},
    {"coe_independent_gate": False, "coe_residual": "addinit"},
    {"coe_residual": "outer", "coe_upcycled": True},
    {"moe_z_loss_coeff": 1e-3, "moe_router_load_balancing_type": "aux_loss"},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_router_pre_softmax": False, "moe_router_topk_scaling_factor": 2.0},
    {"moe_shared_expert_overlap": True},
    {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "shared_experts"]},
]


@pytest.fixture
def without_values(groups, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Experts as on a GPU; what Megatron keeps between steps without values too."""
    monkeypatch.setattr(experts.GroupedExperts, "backend", lambda self: BACKENDS["grouped_mm"])
    scale = torch.ones(1, device="meta")
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
    clear_aux_losses()
    yield
    clear_aux_losses()


def pass_without_values(changes: dict, padding: bool) -> None:
    """Forward and backward of a layer whose tensors have no values: asking for one raises.

    So do sizes that depend on values (`nonzero`, `masked_select`) and copies to the host.
    """
    layer = build_layer(tiny_config(params_dtype=torch.bfloat16, bf16=True, **changes))
    layer = layer.to("meta").train()
    x = torch.empty(S, B, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
    mask = torch.empty(B, S, dtype=torch.bool, device="meta") if padding else None
    y, _ = layer(x, padding_mask=mask)
    y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("padding", [False, True], ids=["no mask", "padding mask"])
@pytest.mark.parametrize("changes", QUIET)
def test_a_layer_never_waits_for_the_device(without_values, changes: dict, padding: bool) -> None:
    pass_without_values(changes, padding)


def test_megatrons_dispatcher_does_wait(without_values) -> None:
    """Or the test above would show nothing."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        pass_without_values({"moe_token_dispatcher_type": "megatron_alltoall"}, padding=False)
