"""Routers: what they choose, and what their losses weigh, against plain torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    reset_model_temporary_tensors,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    get_default_pg_collection,
)
from megatron.core.transformer.moe.router import TopKRouter

from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.model.moe.aux_loss import collect_aux_losses
from megatron_coe.model.moe.router import CoERouter, IterationRouters
from megatron_coe.model.reference import ReferenceCoE
from tests.builders import build_layer, randomize, tiny_config, weigh_balance_losses

S, B, H, N = 6, 4, 32, 7


@pytest.fixture
def groups(single_rank) -> ProcessGroupCollection:
    return get_default_pg_collection()


def random_input(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S, B, H, generator=generator, dtype=torch.float64).to(dtype)


def balance_oracle(router: CoERouter) -> ReferenceCoE:
    """Only its scores and auxiliary loss are asked of it: it has no experts."""
    nothing = torch.empty(0)
    return ReferenceCoE([router.weight], nothing, nothing, None, topk=router.topk)


SCORES = {
    "softmax, then top-k": {},
    "top-k, then softmax": {"moe_router_pre_softmax": False},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid with bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
    },
    "scaled": {"moe_router_topk_scaling_factor": 2.5},
    "one expert": {"moe_router_topk": 1},
    "capacity": {
        "moe_expert_capacity_factor": 1.0,
        "moe_router_load_balancing_type": "aux_loss",
    },
    "limited groups": {
        "num_moe_experts": 8,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_load_balancing_type": "none",  # of all groups in Megatron, see below
    },
    "z-loss": {"moe_z_loss_coeff": 1e-2},
    "sequence loss": {"moe_aux_loss_coeff": 0.1},
}


@pytest.mark.parametrize("biased", [False, True])
def test_groups_can_go_by_their_best_expert(groups, biased: bool) -> None:
    """DeepSeek-V2's size: 160 experts in 8 groups, 3 kept, top-6. The oracle is plain Python."""
    kind = SCORES["sigmoid with bias"] if biased else {}
    config = tiny_config(
        num_moe_experts=160,
        moe_router_topk=6,
        moe_router_num_groups=8,
        moe_router_group_topk=3,
        moe_router_group_score="max",
        **kind,
    )
    router = CoERouter(config, groups)
    randomize(router, torch.Generator().manual_seed(5), std=0.3)
    if biased:
        router.expert_bias.copy_(torch.linspace(0.2, -0.2, 160))
    x = random_input(6)
    probs, routing_map = router(x)
    logits = (x.flatten(0, 1) @ router.weight.T).detach()
    scores = logits.sigmoid() if biased else logits.softmax(-1)
    for token, score in enumerate(scores.tolist()):
        ranked = score
        if biased:
            ranked = [s + b for s, b in zip(score, router.expert_bias.tolist(), strict=True)]
        kept = sorted(range(8), key=lambda g: max(ranked[20 * g : 20 * g + 20]))[-3:]
        allowed = [expert for expert in range(160) if expert // 20 in kept]
        chosen = sorted(allowed, key=lambda expert: ranked[expert])[-6:]
        assert routing_map[token].nonzero().flatten().tolist() == sorted(chosen)
        total = sum(score[expert] for expert in chosen) if biased else 1.0
        for expert in chosen:
            assert probs[token, expert].item() == pytest.approx(score[expert] / total, rel=1e-5)


@pytest.mark.parametrize("kind", SCORES)
def test_one_router_is_megatrons_bit_for_bit(groups, kind: str) -> None:
    config = tiny_config(coe_iterations=1, **SCORES[kind])
    ours, theirs = CoERouter(config, groups), TopKRouter(config, groups)
    randomize(ours, torch.Generator().manual_seed(0), std=0.2)
    theirs.weight.data.copy_(ours.weight)
    if config.moe_router_enable_expert_bias:
        bias = torch.linspace(-0.3, 0.3, config.num_moe_experts)
        ours.expert_bias.copy_(bias)
        theirs.expert_bias.copy_(bias)
    results = []
    weigh_balance_losses(1.0)
    for router in (ours.train(), theirs.train()):
        router.set_layer_number(1)
        x = random_input(1).requires_grad_()
        probs, routing_map = router(x)
        (probs * torch.arange(1, probs.numel() + 1).view_as(probs)).sum().backward()
        counted = router.local_tokens_per_expert
        results.append((probs, routing_map, x.grad, router.weight.grad, counted))
    for mine, other in zip(*results, strict=True):
        assert mine is other is None or torch.equal(mine, other)


@pytest.mark.parametrize("pads", [False, True])
def test_the_first_tokens_stay_where_position_decides(groups, pads: bool) -> None:
    """64 tokens that most experts have too many of; the oracle goes through them in order."""
    config = tiny_config(
        moe_expert_capacity_factor=1.0,
        moe_token_drop_policy="position",
        moe_pad_expert_input_to_capacity=pads,
        moe_router_load_balancing_type="none",
    )
    free = tiny_config(moe_router_load_balancing_type="none")
    router, unbounded = CoERouter(config, groups), CoERouter(free, groups)
    randomize(router, torch.Generator().manual_seed(3), std=0.5)
    unbounded.weight.data.copy_(router.weight)
    x = torch.randn(32, 2, H, generator=torch.Generator().manual_seed(4)) + 0.5
    (probs, routing_map), (all_probs, chosen) = router(x), unbounded(x)
    capacity = math.ceil(64 * config.moe_router_topk / config.num_moe_experts)
    assert chosen.sum(dim=0).max() > capacity > chosen.sum(dim=0).min()
    for expert in range(config.num_moe_experts):
        column = chosen[:, expert].tolist()
        order = [t for t in range(64) if column[t]] + [t for t in range(64) if not column[t]]
        kept = order[:capacity] if pads else [t for t in order[:capacity] if column[t]]
        assert routing_map[:, expert].nonzero().flatten().tolist() == sorted(kept)
    assert torch.equal(probs, all_probs * routing_map)


def test_fp64_scores_are_not_rounded_to_fp32(groups) -> None:
    """Megatron's softmax is in fp32 whatever it is given."""
    config = tiny_config(moe_router_dtype="fp64", params_dtype=torch.float64)
    router = CoERouter(config, groups)
    x = random_input(2, torch.float64)
    probs, routing_map = router(x)
    expected = torch.softmax(x.view(-1, H) @ router.weight.T, dim=-1)
    torch.testing.assert_close(probs[routing_map], expected[routing_map], rtol=1e-14, atol=0)


def test_each_iteration_has_a_router_and_says_which(groups) -> None:
    routers = IterationRouters(tiny_config(coe_iterations=3), groups)
    routers.set_layer_number(2)
    assert [name for name, _ in routers.named_parameters()] == [f"{t}.weight" for t in range(3)]
    assert [router.layer_number for router in routers] == [2, 2, 2]
    x = random_input(3)
    for t, router in enumerate(routers):
        expected = torch.softmax(x.view(-1, H) @ router.weight.T, dim=-1)
        probs, routing_map = routers(x, None, t)
        torch.testing.assert_close(probs[routing_map], expected[routing_map])


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss", ["seq_aux_loss", "aux_loss", "z_loss"])
def test_loss_weight_does_not_depend_on_the_micro_batch(
    groups, loss: str, per_token: bool, micro_batch: int
) -> None:
    """Router gradient of coefficient * mean over sequences, after Megatron's own divisions.

    Without per-token loss, Megatron divides by micro-batches (here as its schedule does, through
    the scaler); with it, by the tokens of the global batch. `aux_loss` is defined per micro-batch.
    """
    coeff = 0.1
    kind = {"moe_router_load_balancing_type": loss, "moe_aux_loss_coeff": coeff}
    if loss == "z_loss":
        kind = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": coeff}
    router = CoERouter(tiny_config(calculate_per_token_loss=per_token, **kind), groups).train()
    randomize(router, torch.Generator().manual_seed(4), std=0.2)
    micro_batches = [x.contiguous() for x in random_input(5).split(micro_batch, dim=1)]

    weigh_balance_losses(1 if per_token else 1 / len(micro_batches))
    for x in micro_batches:
        probs, _ = router(x)
        (probs * 0).sum().backward()
    gradient = router.weight.grad / (S * B if per_token else 1)

    oracle = balance_oracle(router)
    terms = []
    for x in micro_batches:
        scores = oracle.scores(x, router.weight)
        if loss == "seq_aux_loss":
            terms.append(oracle.aux_loss(scores))
        elif loss == "aux_loss":  # the micro-batch as one long sequence
            terms.append(oracle.aux_loss(scores.reshape(-1, 1, N)))
        else:
            terms.append((x @ router.weight.T).logsumexp(dim=-1).square().mean())
    (expected,) = torch.autograd.grad(coeff * torch.stack(terms).mean(), router.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "kind",
    [
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_pre_softmax": True},
    ],
    ids=["sigmoid", "sigmoid with bias", "softmax"],
)
def test_bf16_logits_choose_the_largest(groups, kind: dict) -> None:
    """Scores keep the logits' order: in bf16 many large ones would be the same number."""
    router = CoERouter(tiny_config(num_moe_experts=64, moe_router_topk=6, **kind), groups)
    logits_TN = torch.randn(512, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    probs_TK, chosen_TK, _ = router.choose(logits_TN)
    assert probs_TK.dtype == torch.bfloat16
    chosen = logits_TN.gather(1, chosen_TK).sort(descending=True).values
    assert torch.equal(chosen, logits_TN.topk(6).values)
    probs_TN, routing_map = router.select(logits_TN)
    assert probs_TN.dtype == torch.bfloat16 and (routing_map.sum(1) == 6).all()


SCORES_OF_GROUPS = {
    "max": {"moe_router_group_score": "max"},
    "sum": {"moe_router_group_score": "sum"},
    "renormalized": {"moe_router_group_score": "max", "moe_router_pre_softmax": False},
    "sigmoid": {"moe_router_group_score": "max", "moe_router_score_function": "sigmoid"},
    "sigmoid with bias": {
        "moe_router_group_score": "sum",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}


@pytest.mark.parametrize("as_indices", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("loss", ["seq_aux_loss", "aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("kind", SCORES_OF_GROUPS)
def test_aux_losses_count_the_experts_of_the_groups_kept(
    groups, kind: str, loss: str, padded: bool, as_indices: bool
) -> None:
    """The authors' definition by plain loops: 12 experts in 4 groups, 2 kept, top-4."""
    coeff, lengths = 0.5, [S, S // 2, 1, 2] if padded else [S] * B
    config = tiny_config(
        num_moe_experts=12,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_load_balancing_type=loss,
        moe_aux_loss_coeff=coeff,
        moe_router_dtype="fp64",
        params_dtype=torch.float64,
        **SCORES_OF_GROUPS[kind],
    )
    router = CoERouter(config, groups).train()
    randomize(router, torch.Generator().manual_seed(20), std=0.3)
    if config.moe_router_enable_expert_bias:
        router.expert_bias.copy_(torch.linspace(3, -3, 12))  # the choice is that of the bias
    x = random_input(21, torch.float64)
    padding_SB = torch.arange(S)[:, None] >= torch.tensor(lengths)
    weigh_balance_losses(1)
    probs, _ = router(x, padding_SB if padded else None, as_indices=as_indices)
    (probs * 0).sum().backward()

    logits_SBN = x @ router.weight.T
    sigmoid = config.moe_router_score_function == "sigmoid"
    scores_SBN = logits_SBN.sigmoid() if sigmoid else logits_SBN.softmax(dim=-1)
    share_SBN = scores_SBN / scores_SBN.sum(dim=-1, keepdim=True)
    best = 1 if config.moe_router_group_score == "max" else 2  # 4 experts over 2 groups

    def chosen(scores: list[float], limited: bool) -> list[int]:
        worth = [sum(sorted(scores[g : g + 3])[-best:]) for g in range(0, 12, 3)]
        kept = sorted(range(4), key=worth.__getitem__)[-2:] if limited else range(4)
        allowed = [expert for expert in range(12) if expert // 3 in kept]
        return sorted(allowed, key=scores.__getitem__)[-4:]

    def gradient(limited: bool) -> torch.Tensor:
        parts = [(b, range(length)) for b, length in enumerate(lengths)]
        batches = [[part] for part in parts] if loss == "seq_aux_loss" else [parts]
        terms = []
        for batch in batches:
            places = [(s, b) for b, tokens in batch for s in tokens]
            count = torch.zeros(12, dtype=torch.float64)
            for place in places:
                count[chosen(scores_SBN[place].tolist(), limited)] += 1
            mean = torch.stack([share_SBN[place] for place in places]).mean(dim=0)
            terms.append((count / (len(places) * 4 / 12) * mean).sum())
        value = coeff * torch.stack(terms).mean()
        return torch.autograd.grad(value, router.weight, retain_graph=True)[0]

    torch.testing.assert_close(router.weight.grad, gradient(limited=True), rtol=1e-7, atol=1e-10)
    assert (gradient(limited=True) - gradient(limited=False)).abs().max() > 1e-3


def test_losses_are_logged_by_layer_and_iteration(groups) -> None:
    config = tiny_config(num_layers=3, coe_iterations=2, moe_z_loss_coeff=1e-3)
    clear_aux_losses()  # what other tests logged
    layers = {1: IterationRouters(config, groups), 3: IterationRouters(config, groups)}
    expected = torch.zeros(2, 2, 3)
    for seed, ((number, routers), t) in enumerate(itertools.product(layers.items(), range(2))):
        randomize(routers[t], torch.Generator().manual_seed(seed), std=0.2)
        routers.set_layer_number(number)
        x = random_input(seed)
        for micro_batch in x.split(2, dim=1):
            routers.train()(micro_batch.contiguous(), None, t)
        oracle = balance_oracle(routers[t])
        expected[0, t, number - 1] = oracle.aux_loss(oracle.scores(x, routers[t].weight))
        expected[1, t, number - 1] = (x @ routers[t].weight.T).logsumexp(-1).square().mean()
    logged = collect_aux_losses(config, num_microbatches=2, device=torch.device("cpu"))
    assert list(logged) == ["seq_aux_loss", "z_loss"]
    torch.testing.assert_close(logged["seq_aux_loss"], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged["z_loss"], expected[1], rtol=1e-5, atol=1e-6)
    again = collect_aux_losses(config, num_microbatches=2, device=torch.device("cpu"))
    assert all(not values.any() for values in again.values()), "collecting must forget"


@pytest.mark.parametrize("independent", [True, False])
def test_expert_bias_is_updated_for_each_router(single_rank, independent: bool) -> None:
    """DeepSeek-V3's rule: up by a fixed rate where an expert got fewer tokens than the mean."""
    rate = 0.01
    config = tiny_config(
        coe_iterations=3,
        coe_independent_gate=independent,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=rate,
        moe_router_load_balancing_type="none",
    )
    layer = build_layer(config).train()
    randomize(layer, torch.Generator().manual_seed(10), std=0.3)
    seen = []
    for router in layer.router if independent else [layer.router]:
        router.register_forward_hook(lambda _, __, out: seen.append(out[1].flatten().bincount()))
    layer(random_input(11))
    assert len(seen) == 3
    routers = list(layer.router) if independent else [layer.router]
    counts = seen if independent else [sum(seen)]
    for router, count in zip(routers, counts, strict=True):
        torch.testing.assert_close(router.local_tokens_per_expert, count.float())
    _update_router_expert_bias([layer], config)
    reset_model_temporary_tensors(config, [layer])
    for router, count in zip(routers, counts, strict=True):
        expected = rate * torch.sign(count.float().mean() - count)
        torch.testing.assert_close(router.expert_bias, expected)
        assert not router.local_tokens_per_expert.any()


def test_padding_may_be_left_out_of_bias_and_aux_losses(groups) -> None:
    """Megatron crashes on a padding mask with expert bias."""
    config = tiny_config(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="aux_loss",
    )
    router = CoERouter(config, groups).train()
    randomize(router, torch.Generator().manual_seed(12), std=0.3)
    padding = torch.zeros(S, B, dtype=torch.bool)
    padding[-2:] = True
    _, routing_map = router(random_input(13), padding)
    expected = routing_map.view(S, B, N)[:-2].sum(dim=(0, 1))
    torch.testing.assert_close(router.local_tokens_per_expert, expected.float())


@pytest.mark.parametrize("loss", ["seq_aux_loss", "aux_loss", "z_loss"])
def test_padding_is_left_out_of_each_loss(groups, loss: str) -> None:
    """Sequences of several lengths, one of them empty: each is divided by its own length."""
    coeff, lengths = 0.1, [S, S // 2, 1, 0][:B]
    kind = {"moe_router_load_balancing_type": loss, "moe_aux_loss_coeff": coeff}
    if loss == "z_loss":
        kind = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": coeff}
    router = CoERouter(tiny_config(**kind), groups).train()
    randomize(router, torch.Generator().manual_seed(15), std=0.2)
    x = random_input(16)
    padding_SB = torch.arange(S)[:, None] >= torch.tensor(lengths)
    weigh_balance_losses(1)
    probs, _ = router(x, padding_SB)
    (probs * 0).sum().backward()

    oracle = balance_oracle(router)
    sequences = [x[:length, b : b + 1] for b, length in enumerate(lengths)]
    if loss == "seq_aux_loss":
        terms = [oracle.aux_loss(oracle.scores(s, router.weight)) for s in sequences if len(s)]
        value = torch.stack(terms).sum() / B  # an empty sequence has nothing to balance
    else:
        valid_T1H = torch.cat([s.flatten(0, 1) for s in sequences])[:, None]
        value = oracle.aux_loss(oracle.scores(valid_T1H, router.weight))
        if loss == "z_loss":
            value = (valid_T1H @ router.weight.T).logsumexp(dim=-1).square().mean()
    (expected,) = torch.autograd.grad(coeff * value, router.weight)
    torch.testing.assert_close(router.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_counts_nothing(groups) -> None:
    config = tiny_config(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
    )
    router = CoERouter(config, groups).eval()
    router(random_input(14))
    assert not router.local_tokens_per_expert.any()
