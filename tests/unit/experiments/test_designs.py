"""Designs of a chain, against the specification and against sums written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from experiments.designs import (
    DESIGNS,
    Design,
    Experts,
    ScreenedLayer,
    build_model,
    last_std,
    layers_of,
)
from megatron_coe.hf import CoeConfig
from megatron_coe.model.reference import ReferenceCoE

H, N, S, B = 8, 6, 12, 3
CONFIG = CoeConfig(
    vocab_size=32, hidden_size=H, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=4,
    q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, head_dim=None,
    moe_intermediate_size=5, n_routed_experts=N, n_shared_experts=1, num_experts_per_tok=2,
    first_k_dense_replace=0, moe_layer_freq=1, intermediate_size=16, max_position_embeddings=S,
)  # fmt: skip


def layer_of(design: Design) -> ScreenedLayer:
    torch.manual_seed(3)
    layer = ScreenedLayer(CONFIG, design, Experts(CONFIG, N, 0.3)).double().train()
    for name, parameter in layer.named_parameters():
        if not name.startswith(("routers", "scales")):
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


def reference_of(layer: ScreenedLayer, residual: str) -> ReferenceCoE:
    return ReferenceCoE(
        [router.weight for router in layer.routers],
        layer.experts.gate_up,
        layer.experts.down,
        (layer.shared_gate_up, layer.shared_down),
        layer.design.topk,
        residual,
    )


def stream() -> torch.Tensor:
    return torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)


def gradients(output: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output.square().sum(), of))


@pytest.mark.parametrize("name", ["moe", "chain"])
def test_without_options_it_is_the_reference(name):
    design = replace(DESIGNS[name], topk=2)
    layer, h = layer_of(design), stream()
    x = layer(h)
    normed = layer.norms[0](h).transpose(0, 1)
    expected, losses = reference_of(layer, "inner" if name == "chain" else "outer").forward(normed)
    expected = expected.transpose(0, 1)
    expected = expected if name == "chain" else h + expected
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.aux_loss, losses.sum(), rtol=0, atol=1e-12)
    assert layer.passes == design.iterations * 3
    of = (h, layer.experts.down, layer.experts.gate_up, *(r.weight for r in layer.routers))
    found = gradients(x + layer.aux_loss, *of)
    for mine, theirs in zip(found, gradients(expected + losses.sum(), *of), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def update(layer: ScreenedLayer, t: int, x: torch.Tensor, scores: torch.Tensor | None = None):
    """f_t(x) of the reference, with scores of its own or these."""
    reference, x = reference_of(layer, "inner"), x.transpose(0, 1)
    scores = reference.scores(x, reference.gates[t]) if scores is None else scores.transpose(0, 1)
    return reference.experts(x, scores).transpose(0, 1)


def test_a_carried_stream_is_a_stack_of_standard_layers():
    layer, h = layer_of(Design("", "", topk=2, stream=True)), stream()
    torch.nn.init.normal_(layer.norms[1].weight)
    one = h + update(layer, 0, layer.norms[0](h))
    torch.testing.assert_close(layer(h), one + update(layer, 1, layer.norms[1](one)))


def test_norms_and_scales_by_hand():
    layer, h = layer_of(Design("", "", topk=2, norms=True, scale=0.1)), stream()
    torch.nn.init.normal_(layer.scales)
    x = layer.norms[0](h)
    x = x + layer.scales[0] * update(layer, 0, x)
    x = x + layer.scales[1] * update(layer, 1, layer.norms[1](x))
    torch.testing.assert_close(layer(h), x)
    assert torch.all(ScreenedLayer(CONFIG, layer.design, layer.experts).scales == 0.1)


def test_a_shared_expert_that_runs_once():
    layer, h = layer_of(Design("", "", topk=2, shared_once=True)), stream()
    x = layer.norms[0](h)
    x = x + update(layer, 0, x)
    without = reference_of(layer, "inner")
    without.shared = None
    turned = x.transpose(0, 1)
    routed = without.experts(turned, without.scores(turned, without.gates[1]))
    torch.testing.assert_close(layer(h), x + routed.transpose(0, 1))
    assert layer.passes == 5


def test_routers_see_the_first_input():
    layer, h = layer_of(Design("", "", topk=2, sees_first=True)), stream()
    first = layer.norms[0](h)
    x = first + update(layer, 0, first)
    second = layer.routers[1]
    scores = (x @ second.weight.T + first @ second.second.T).softmax(-1)
    torch.testing.assert_close(layer(h), x + update(layer, 1, x, scores))


def test_no_expert_twice():
    layer, h = layer_of(Design("", "", topk=2, no_repeats=True, iterations=3)), stream()
    x, passed = layer.norms[0](h), torch.zeros(B, S, N, dtype=torch.bool)
    for t, router in enumerate(layer.routers):
        scores = (x @ router.weight.T).softmax(-1)
        left = scores.masked_fill(passed, 0.0)
        chosen = left.topk(2, dim=-1).indices
        passed = passed.scatter(-1, chosen, True)
        x = x + update(layer, t, x, left)
    assert passed.all()  # 3 iterations of 2 experts are all 6
    torch.testing.assert_close(layer(h), x)


def test_zero_experts_do_nothing_and_are_steered_to_their_share():
    layer = layer_of(Design("", "", topk=2, zero_share=0.4))
    h = torch.randn(B, 200, H, dtype=torch.float64)
    first, second = layer.routers
    assert (first.zeros, second.zeros) == (0, 2)
    second.zero_bias.fill_(1.0)  # all leave
    x = layer.norms[0](h)
    x = x + update(layer, 0, x)
    shared = update(layer, 1, x, torch.zeros(B, 200, N, dtype=torch.float64))
    torch.testing.assert_close(layer(h), x + shared)
    assert layer.passes == 4  # 2 + 1 of the first, the shared one of the second
    for _ in range(1200):
        layer.routers[1](x, x, None)
    layer(h)
    assert pytest.approx(layer.passes, abs=0.05) == 4 + 2 * (1 - 0.4)


def test_the_balance_of_the_whole_chain_sums_over_iterations_first():
    layer, h = layer_of(Design("", "", topk=2, chain_balance=True)), stream()
    layer(h)
    x = layer.norms[0](h)
    one, two = (router.weight for router in layer.routers)
    scores = [(x @ one.T).softmax(-1)]
    scores.append(((x + update(layer, 0, x)) @ two.T).softmax(-1))
    total = 0.0
    for b in range(B):
        counts = torch.zeros(N, dtype=torch.float64)
        for s in scores:
            counts += torch.bincount(s[b].topk(2).indices.flatten(), minlength=N)
        mean = (scores[0][b].mean(0) + scores[1][b].mean(0)) / 2
        total = total + 2 * (counts / (2 * S * 2 / N) * mean).sum() / B
    torch.testing.assert_close(layer.aux_loss, total)


def test_a_pool_has_as_many_parameters_as_separate_experts():
    separate, pooled = (build_model(CONFIG, DESIGNS[name]) for name in ("moe", "moe_pooled"))
    routers = CONFIG.num_hidden_layers * N * H  # each of the pool's routers has twice the rows
    sizes = [sum(p.numel() for p in model.parameters()) for model in (separate, pooled)]
    assert sizes[1] - sizes[0] == routers
    first, second = layers_of(pooled)
    assert first.experts is second.experts


def test_the_initialization_of_a_chain_is_scaled():
    assert last_std(CONFIG, DESIGNS["init"]) == CONFIG.initializer_range / math.sqrt(2)
    assert last_std(CONFIG, DESIGNS["chain"]) == CONFIG.initializer_range


def test_every_design_trains():
    for design in DESIGNS.values():
        torch.manual_seed(0)
        model = build_model(CONFIG, replace(design, topk=2))
        ids = torch.randint(32, (2, S))
        model(input_ids=ids).logits.logsumexp(-1).sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing, (design.name, missing)
