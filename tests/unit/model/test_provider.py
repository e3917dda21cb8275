"""`CoEModelProvider`: builds Megatron's GPTModel, and says what is missing."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_coe.model.moe.layer import CoELayer
from tests.builders import randomize, tiny_provider


def token_ids(provider, B: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(provider.vocab_size, (B, provider.seq_length), generator=generator)


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def test_provides_a_gpt_model_of_coe_layers(single_rank) -> None:
    provider = tiny_provider(coe_iterations=3, vocab_size=90, make_vocab_size_divisible_by=64)
    model = provider.provide()
    assert isinstance(model, GPTModel)
    assert [type(layer.mlp) for layer in model.decoder.layers] == [CoELayer, CoELayer]
    ids = token_ids(provider)
    assert model(ids, positions(ids), None).shape == (*ids.shape, 128)


@pytest.mark.parametrize(("pre", "post"), [(True, False), (False, True), (False, False)])
def test_provides_one_stage(single_rank, pre: bool, post: bool) -> None:
    model = tiny_provider().provide(pre_process=pre, post_process=post)
    assert hasattr(model, "embedding") == pre
    assert hasattr(model, "output_layer") == post


def test_no_warning_about_the_layer_class(single_rank, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny_provider().provide()
    assert not [record for record in caplog.records if "MLP type" in record.getMessage()]


def test_a_provider_can_be_copied_with_changes(single_rank) -> None:
    provider = tiny_provider()
    assert replace(provider, coe_iterations=4).num_params() - provider.num_params() == (
        2 * provider.num_layers * provider.num_moe_experts * provider.hidden_size
    )


def test_vocabulary_must_be_known(single_rank) -> None:
    with pytest.raises(ValueError, match="vocab_size=0"):
        tiny_provider(vocab_size=0).provide()


def test_unknown_backend_is_refused(single_rank) -> None:
    with pytest.raises(ValueError, match="backend='jax'"):
        tiny_provider(backend="jax").provide()


def test_the_model_is_causal(single_rank) -> None:
    provider = tiny_provider()
    model = provider.provide().eval()
    randomize(model, torch.Generator().manual_seed(2), std=0.2)
    ids = token_ids(provider)
    with torch.no_grad():
        before = model(ids, positions(ids), None)
        ids[:, 12:] = (ids[:, 12:] + 1) % provider.vocab_size
        after = model(ids, positions(ids), None)
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[:, 12:], before[:, 12:])


@pytest.mark.parametrize("attention", ["latent", "grouped queries"])
def test_recomputing_whole_layers_changes_nothing(single_rank, attention: str) -> None:
    plain = {"multi_latent_attention": False, "num_query_groups": 2}
    kind = plain if attention == "grouped queries" else {}
    results = []
    for recompute in (
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe_act"]},
    ):
        provider = tiny_provider(coe_iterations=3, **kind, **recompute)
        model = provider.provide().train()
        randomize(model, torch.Generator().manual_seed(3), std=0.2)
        ids = token_ids(provider)
        model(ids, positions(ids), None, labels=ids).mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for other in results[1:]:
        for name, grad in results[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-5, atol=1e-7)
