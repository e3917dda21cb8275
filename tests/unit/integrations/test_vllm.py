"""What of the vLLM plugin needs no vLLM: where its model keeps each weight. tests/serve runs it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.initialization import no_init_weights

from megatron_coe.hf import CoeConfig, CoeForCausalLM
from megatron_coe.integrations.vllm.weights import PACKED_MODULES, Target, targets

SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "moe_intermediate_size": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
MODELS = {
    "paper": {"inner_iter": 3},
    "latent queries": {
        "q_lora_rank": 4,
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "first_k_dense_replace": 1,
    },
    "plain": {
        "attention_type": "mha",
        "num_key_value_heads": 1,
        "qkv_bias": True,
        "use_qk_norm": True,
        "use_igate": False,
        "n_shared_experts": None,
        "tie_word_embeddings": True,
    },
    "upcycled": {"residual": "outer", "coe_upcycled": True, "inner_iter": 3},
    "multi-token prediction, which is left out": {"num_nextn_predict_layers": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_weights_has_one_place(name):
    """Held to the parameters of the model for transformers."""
    config = CoeConfig(**SMALL, **MODELS[name])
    with torch.device("meta"), no_init_weights():
        model = CoeForCausalLM(config)
    modules = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    if config.tie_word_embeddings:
        modules.discard("lm_head")
    found = targets(config)
    assert found.keys() == modules
    assert max(Counter(found.values()).values()) == 1


@pytest.mark.parametrize(
    ("name", "module", "target", "parameter"),
    [
        (
            "paper",
            "model.layers.1.mlp.experts.3.up_proj",
            Target("model.layers.1.mlp.experts.routed_experts", "w3", 3),
            "model.layers.1.mlp.experts.routed_experts.w13_weight",
        ),
        (
            "paper",
            "model.layers.1.mlp.experts.2.down_proj",
            Target("model.layers.1.mlp.experts.routed_experts", "w2", 2),
            "model.layers.1.mlp.experts.routed_experts.w2_weight",
        ),
        (
            "paper",
            "model.layers.2.self_attn.kv_a_proj_with_mqa",
            Target("model.layers.2.self_attn.kv_a_proj_with_mqa"),
            "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
        ),
        (
            "latent queries",
            "model.layers.2.self_attn.kv_a_proj_with_mqa",
            Target("model.layers.2.self_attn.fused_qkv_a_proj", 1),
            "model.layers.2.self_attn.fused_qkv_a_proj.weight",
        ),
        (
            "latent queries",
            "model.layers.0.mlp.gate_proj",
            Target("model.layers.0.mlp.gate_up_proj", 0),
            "model.layers.0.mlp.gate_up_proj.weight",
        ),
        (
            "plain",
            "model.layers.0.self_attn.k_proj",
            Target("model.layers.0.self_attn.qkv_proj", "k"),
            "model.layers.0.self_attn.qkv_proj.weight",
        ),
    ],
)
def test_parts_of_fused_modules_are_shards(name, module, target, parameter):
    found = targets(CoeConfig(**SMALL, **MODELS[name]))[module]
    assert found == target and found.parameter("weight") == parameter


def test_quantization_is_told_the_parts_of_every_fused_module():
    fused = {}
    for changes in MODELS.values():
        for module, target in targets(CoeConfig(**SMALL, **changes)).items():
            if target.shard is not None and target.expert is None:
                leaves = (name.rpartition(".")[2] for name in (target.module, module))
                fused.setdefault(next(leaves), set()).add(next(leaves))
    assert fused == {holder: set(parts) for holder, parts in PACKED_MODULES.items()}
