"""Routing that hooks have seen, against the routers' own scores on the layers' inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from megatron_coe.analysis.collect import collect, find_models, random_model
from megatron_coe.hf import CoeForCausalLM
from tests.unit.hf.small import small_config


def sequences(lengths: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 96, length) for length in lengths]


def build(**changes: object) -> CoeForCausalLM:
    torch.manual_seed(1)
    return CoeForCausalLM(small_config(**changes)).eval()


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (1, 2)),
        ({"inner_iter": 1}, (1, 2)),
        ({"inner_iter": 3, "use_igate": False}, (1, 2)),
        ({"inner_iter": 3, "first_k_dense_replace": 1}, (2,)),
    ],
    ids=["C = 2", "C = 1", "one router for all", "dense first layer"],
)
def test_the_best_of_the_router_logits(changes, layers):
    """The model's own `router_logits`, a sequence at a time, without padding."""
    model, texts = build(**changes), sequences((9, 4, 12))
    found = collect(model, texts, "it", batch_size=2)
    C, K, N = model.config.inner_iter, model.config.num_experts_per_tok, found.experts
    assert (found.layers, N) == (layers, model.config.n_routed_experts)
    assert found.indices.shape == found.probs.shape == (len(layers), C, 25, K)
    expected = []
    for ids in texts:
        output = model(torch.from_numpy(ids)[None], output_router_logits=True)
        logits = torch.stack(output.router_logits).unflatten(0, (len(layers), C))
        expected.append(logits.softmax(dim=-1))
    scores = torch.cat(expected, dim=2)
    best = scores.topk(K, dim=-1)
    assert np.array_equal(np.sort(found.indices), best.indices.sort().values.numpy())
    mine = np.take_along_axis(found.probs, np.argsort(found.indices), -1)
    theirs = scores.gather(-1, best.indices.sort().values).detach().numpy()
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_no_hook_stays_behind():
    model = build()
    before = model(torch.arange(5)[None]).logits
    collect(model, sequences((5,)), "it")
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(torch.arange(5)[None]).logits, before)


def test_the_control_has_other_weights_of_the_same_shape():
    model = build()
    one, other = random_model(model, 3), random_model(model, 3)
    for mine, again, theirs in zip(
        one.parameters(), other.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(mine, again)
        assert mine.shape == theirs.shape
    assert not torch.equal(one.lm_head.weight, model.lm_head.weight)
    routers = [one.model.layers[0].mlp.gate[t].weight for t in range(2)]
    assert not torch.equal(*routers)
    assert routers[0].std() > 0


def test_transformers_own_deepseek_v2():
    config = transformers.DeepseekV2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, n_routed_experts=7, num_experts_per_tok=2,
        first_k_dense_replace=1, n_shared_experts=1, kv_lora_rank=16, q_lora_rank=None,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.DeepseekV2ForCausalLM(config).eval()
    try:
        found = collect(model, sequences((6, 3)), "it")
    except ValueError as error:  # transformers 4 keeps it to itself
        assert "convert the model" in str(error)
        return
    assert (found.layers, found.experts, found.indices.shape) == ((2,), 7, (1, 1, 9, 2))
    assert (np.sort(found.indices)[..., 1:] > np.sort(found.indices)[..., :-1]).all()
    assert ((found.indices >= 0) & (found.indices < 7)).all()


def test_a_model_without_routers_is_refused():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="it: a model of type llama without routers"):
        collect(transformers.LlamaForCausalLM(config), sequences((4,)), "it")


def test_models_under_a_path(tmp_path):
    run, hub = tmp_path / "run", tmp_path / "hub"
    steps = [run / "checkpoints" / f"step_{number:08d}" for number in (5, 10, 100)]
    for step in reversed(steps):
        step.mkdir(parents=True)
        (step / "metadata.json").touch()
    (run / "checkpoints" / ".partial_step_00000200").mkdir()
    hub.mkdir()
    (hub / "config.json").touch()
    assert find_models(run) == find_models(run / "checkpoints") == steps
    assert find_models(steps[1]) == [steps[1]]
    assert find_models(hub) == [hub]
    with pytest.raises(ValueError, match="neither a Hugging Face folder"):
        find_models(tmp_path)
