"""What is counted of routing, against assignments recomputed from the routers' inputs."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_coe.model.moe.router import CoERouter, IterationRouters
from megatron_coe.model.moe.routing_stats import RoutingStats
from tests.builders import build_layer, randomize, tiny_config, tiny_provider

S, B, H = 6, 3, 32
CHOICES = {
    "softmax": {},
    "top-k, then softmax": {"moe_router_pre_softmax": False},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "three iterations": {"coe_iterations": 3},
    "one router for all": {"coe_iterations": 3, "coe_independent_gate": False},
    "Megatron's dispatchers": {"moe_token_dispatcher_type": "megatron_alltoall"},
    "scaled": {"moe_router_topk_scaling_factor": 2.5, "moe_router_topk": 1},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "tokens dropped": {
        "moe_expert_capacity_factor": 0.5,
        "moe_router_load_balancing_type": "aux_loss",
    },
}


def build(changes: dict, seed: int = 0):
    """A layer alone, the routing_counts of it, and the inputs that its routers get to see."""
    config = tiny_config(**{"num_layers": 1, "coe_iterations": 2, **changes})
    layer = build_layer(config).train()
    layer.set_layer_number(1)
    randomize(layer, torch.Generator().manual_seed(seed), std=0.1)  # no score underflows
    seen: list[tuple[CoERouter, torch.Tensor]] = []
    routers = layer.router if isinstance(layer.router, IterationRouters) else [layer.router]
    for router in routers:
        router.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    return layer, RoutingStats(config, [layer], torch.device("cpu")), seen


def oracle(config, seen: list, kept_T: torch.Tensor | None = None) -> torch.Tensor:
    """[C, N + 1], token by token."""
    table = torch.zeros(config.coe_iterations, config.num_moe_experts + 1, dtype=torch.float64)
    for t, (router, x_SBH) in enumerate(seen):
        logits_TN = (x_SBH.detach().double() @ router.weight.detach().double().T).flatten(0, 1)
        for token, logits_N in enumerate(logits_TN):
            if kept_T is not None and not kept_T[token]:
                continue
            sigmoid = config.moe_router_score_function == "sigmoid"
            scores_N = logits_N.sigmoid() if sigmoid else logits_N.exp()
            best = sorted(range(len(scores_N)), key=lambda i: -scores_N[i])
            chosen = best[: config.moe_router_topk]
            table[t, chosen] += 1
            table[t, -1] += scores_N[chosen].sum() / scores_N.sum()
    return table


def random_input(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S, B, H, generator=generator, requires_grad=True)


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_are_counted_once_by_layer_and_iteration(single_rank, choice: str) -> None:
    layer, routing_counts, seen = build(CHOICES[choice])
    config = layer.config
    with routing_counts.counting():
        layer(random_input(1))[0].sum().backward()
    # Where it is recomputed, each router has seen its tokens twice.
    expected = oracle(config, seen[: config.coe_iterations])
    (counted,) = routing_counts.collect()
    assert torch.equal(counted[:, :-1], expected[:, :-1])
    assert (counted[:, :-1].sum(dim=1) == S * B * config.moe_router_topk).all()
    torch.testing.assert_close(counted[:, -1], expected[:, -1], rtol=1e-5, atol=0)


def test_passes_add_up_and_a_new_count_starts_from_nothing(single_rank) -> None:
    layer, routing_counts, seen = build({})
    for _ in range(2):
        seen.clear()
        with routing_counts.counting():
            layer(random_input(2))
            layer(random_input(3))
        expected = oracle(layer.config, seen[:2]) + oracle(layer.config, seen[2:])
        assert torch.equal(routing_counts.collect()[0, :, :-1], expected[:, :-1])
    layer(random_input(4))  # not asked to be counted
    assert torch.equal(routing_counts.collect()[0, :, :-1], expected[:, :-1])


def test_only_training_counts(single_rank) -> None:
    layer, routing_counts, _ = build({})
    with routing_counts.counting():
        with torch.no_grad():
            layer(random_input(2))
        layer.eval()(random_input(2))
    assert not routing_counts.collect().any()


@pytest.mark.parametrize("dispatcher", ["alltoall", "megatron_alltoall"])
def test_padding_that_is_told_is_left_out(single_rank, dispatcher: str) -> None:
    layer, routing_counts, seen = build({"moe_token_dispatcher_type": dispatcher})
    mask_BS = torch.arange(S)[None] >= torch.tensor([[S], [2], [4]])
    with routing_counts.counting():
        layer(random_input(5), padding_mask=mask_BS)
    expected = oracle(layer.config, seen, kept_T=~mask_BS.T.reshape(-1))
    (counted,) = routing_counts.collect()
    assert torch.equal(counted[:, :-1], expected[:, :-1])
    torch.testing.assert_close(counted[:, -1], expected[:, -1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("as_indices", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_counting_never_waits_for_the_device(single_rank, as_indices: bool, padding: bool) -> None:
    """Tensors without values: asking for one raises."""
    config = tiny_config(coe_iterations=2, moe_router_load_balancing_type="none")
    router = CoERouter(config, get_default_pg_collection()).to("meta").train()
    router.routing_counts = torch.zeros(
        2, config.num_moe_experts + 1, dtype=torch.float64, device="meta"
    )
    x = torch.empty(S, B, H, device="meta", requires_grad=True)
    mask = torch.empty(S, B, dtype=torch.bool, device="meta") if padding else None
    router(x, mask, iteration=1, as_indices=as_indices)


def test_biases_decide_the_choice_but_not_the_confidence(single_rank) -> None:
    config = tiny_config(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
    )
    router = CoERouter(config, get_default_pg_collection()).train()
    randomize(router, torch.Generator().manual_seed(0))
    router.expert_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0]))
    router.routing_counts = torch.zeros(config.coe_iterations, 8, dtype=torch.float64)
    x = random_input(6)
    router(x)
    scores_TN = (x.double() @ router.weight.double().T).sigmoid().flatten(0, 1)
    expected = (scores_TN[:, :2].sum(dim=1) / scores_TN.sum(dim=1)).sum()
    assert router.routing_counts[0].tolist()[:-1] == [S * B] * 2 + [0] * 5
    assert router.routing_counts[0, -1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_of_every_kind_have_a_row_of_their_own(single_rank) -> None:
    """A dense layer first, and two of multi-token prediction behind the decoder's."""
    provider = tiny_provider(
        num_layers=3,
        coe_iterations=2,
        moe_layer_freq=[0, 1, 1],
        mtp_num_layers=2,
        moe_router_load_balancing_type="none",
    )
    model = provider.provide().train()
    routing_counts = RoutingStats(provider, [model], torch.device("cpu"))
    ids = torch.arange(2 * S).reshape(2, S)
    with routing_counts.counting():
        model(ids, ids % S, None, labels=ids)
    tokens_LC = routing_counts.collect()[..., :-1].sum(dim=-1) / provider.moe_router_topk
    assert tokens_LC.tolist() == [[0, 0]] + [[2 * S] * 2] * 4
