from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layers
from benchmarks.agreement import check_agreement
from tests.builders import tiny_provider

SEQUENCES = 3


@pytest.fixture
def provider(single_rank):
    return tiny_provider(coe_iterations=2, moe_router_topk=3, moe_aux_loss_coeff=0.01)


def both_layers(provider, device):
    layer = layers.build_layer(provider, device)
    stock = layers.build_stock(provider, device)
    stock.share_weights(layer)
    batch = layers.random_batch(provider, SEQUENCES, device)
    return [
        layers.layer_variant(name, module, provider, batch)
        for name, module in (("ours", layer), ("stock", stock))
    ]


def test_the_stock_chain_is_megatrons_and_computes_the_same(provider, single_rank):
    ours, stock = both_layers(provider, single_rank)
    assert type(stock.module.module.layer) is MoELayer
    found = check_agreement(("ours", "stock"), ours.result(), stock.result(), torch.float32)
    assert set(found) == {
        *("output 0", "gradient of input 0", "gradient of routers"),
        *(f"gradient of linear_fc{i}, expert {e}" for i in (1, 2) for e in (0, -1)),
    }
    assert max(found.values()) < 1e-5


def test_a_wrong_layer_is_found_out(provider, single_rank):
    ours, stock = both_layers(provider, single_rank)
    stock.module.module.iterations = 1
    with pytest.raises(ValueError, match="'ours' and 'stock' do not compute the same"):
        check_agreement(("ours", "stock"), ours.result(), stock.result(), torch.float32)


def test_a_stock_chain_of_another_mode_is_refused(provider, single_rank):
    with pytest.raises(ValueError, match="coe_residual='outer'"):
        layers.build_stock(replace(provider, coe_residual="outer"), single_rank)


def test_flops_of_a_layer_are_those_it_runs(provider, single_rank):
    stock = both_layers(provider, single_rank)[1]
    with FlopCounterMode(display=False) as counter:
        stock.work()
    # The first expert's input gradient is not saved anywhere: every product is counted thrice.
    assert counter.get_total_flops() == stock.flops


@pytest.mark.parametrize("gated", [True, False])
def test_flops_of_the_experts_and_of_their_ceiling(single_rank, gated):
    provider = tiny_provider(coe_iterations=3, moe_router_topk=2, gated_linear_unit=gated)
    stock = layers.build_stock(provider, single_rank)
    tokens = 40
    variant = layers.experts_variant("stock", stock.layer.experts, provider, tokens, single_rank)
    dense = layers.dense_variant(provider, tokens, single_rank)
    with FlopCounterMode(display=False) as counter:
        variant.work()
    assert counter.get_total_flops() == variant.flops == dense.flops
    with FlopCounterMode(display=False) as counter:
        dense.run(lambda part: None)
    assert counter.get_total_flops() == dense.flops


def test_rows_are_natural(provider):
    counts = layers.natural_counts(provider, tokens=500)
    assert counts.sum() == 500 * provider.moe_router_topk
    assert counts.min() > 0
    assert counts.max() > counts.min()
