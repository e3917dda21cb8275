"""The protocol of Megatron-Bridge's model providers; with Bridge itself where it is installed."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import fields

import pytest
import torch

from megatron_coe.model.provider import CoEModelProvider
from tests.builders import TINY, tiny_provider


def test_provide_takes_what_bridge_gives() -> None:
    inspect.signature(CoEModelProvider.provide).bind(
        None, pre_process=True, post_process=False, vp_stage=1
    )
    optional = list(inspect.signature(CoEModelProvider.provide).parameters.values())[1:]
    assert all(parameter.default is None for parameter in optional)


def test_finalize_checks_what_was_assigned() -> None:
    provider = tiny_provider()
    provider.moe_router_topk = provider.num_moe_experts + 1
    with pytest.raises(ValueError, match="moe_router_topk=8 is larger than num_moe_experts=7"):
        provider.finalize()


def test_finalize_derives_again_and_settles() -> None:
    provider = tiny_provider()
    provider.activation_func = "gelu"
    provider.finalize()
    assert provider.activation_func is torch.nn.functional.gelu
    values = {field.name: getattr(provider, field.name) for field in fields(provider)}
    provider.finalize()
    assert values == {field.name: getattr(provider, field.name) for field in fields(provider)}


@pytest.fixture
def bridge_provider(single_rank):
    pytest.importorskip("megatron.bridge.models.model_provider", reason="needs Megatron-Bridge")
    from megatron_coe.integrations.megatron_bridge import CoEBridgeProvider

    return CoEBridgeProvider(**{**TINY, "vocab_size": None, "seq_length": 20})


def test_bridge_builds_the_same_model(bridge_provider) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig

    bridge_provider.coe_iterations = 3  # an override, as recipes and command lines give it
    bridge_provider.vocab_size, bridge_provider.should_pad_vocab = 96, True  # as Bridge's setup
    bridge_provider.finalize()
    hooked = []
    bridge_provider.register_pre_wrap_hook(lambda chunks: hooked.extend(chunks) or chunks)
    (wrapped,) = bridge_provider.provide_distributed_model(DistributedDataParallelConfig())
    assert hooked == [wrapped.module]
    model = tiny_provider(coe_iterations=3).provide()
    model.load_state_dict(wrapped.module.state_dict())
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(20).expand_as(ids)
    losses = [chunk(ids, positions, None, labels=ids) for chunk in (wrapped, model)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_bridge_pads_only_what_it_filled_in(bridge_provider) -> None:
    bridge_provider.vocab_size, bridge_provider.make_vocab_size_divisible_by = 94, 16
    assert bridge_provider.padded_vocab_size == 94
    bridge_provider.should_pad_vocab = True
    assert bridge_provider.padded_vocab_size == 96


def test_what_bridge_pads_gets_no_probability(bridge_provider) -> None:
    bridge_provider.vocab_size, bridge_provider.make_vocab_size_divisible_by = 94, 16
    bridge_provider.should_pad_vocab = True
    bridge_provider.finalize()
    (model,) = bridge_provider.provide_distributed_model(wrap_with_ddp=False)
    ids = torch.randint(94, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(ids, torch.arange(20).expand_as(ids), None)
    assert logits.shape[-1] == 96
    assert not logits.softmax(dim=-1)[..., 94:].any()


def test_a_bridge_provider_is_copied_on_the_same_groups(bridge_provider) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    bridge_provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    other = deepcopy(bridge_provider)
    assert other._pg_collection is bridge_provider._pg_collection
    other.moe_layer_freq = [0, 1]
    assert bridge_provider.moe_layer_freq == 1
