"""Norms of groups of gradients, against the gradients themselves."""

from __future__ import annotations

import math

import pytest

from megatron_coe.training.grad_norms import GROUPS, GradientNorms, group_of
from tests.unit.training.runs import make_settings, make_trainer

LAYER = "module.decoder.layers.3."
NAMES = {
    "module.module.embedding.word_embeddings.weight": "embedding",
    "module.output_layer.weight": "head",
    f"{LAYER}input_layernorm.weight": "norms",
    f"{LAYER}pre_mlp_layernorm.bias": "norms",
    f"{LAYER}self_attention.kv_layernorm.weight": "norms",
    f"{LAYER}self_attention.linear_qkv.layer_norm_weight": "norms",  # Transformer Engine's
    f"{LAYER}mlp.linear_fc1.layer_norm_weight": "norms",
    "module.decoder.final_layernorm.weight": "norms",
    "module.mtp.layers.0.enorm.weight": "norms",
    f"{LAYER}self_attention.linear_kv_up_proj.weight": "attention",
    f"{LAYER}self_attention.linear_qkv.bias": "attention",
    f"{LAYER}mlp.router.1.weight": "routers",
    f"{LAYER}mlp.router.weight": "routers",
    f"{LAYER}mlp.experts.linear_fc1.weight": "routed_experts",
    f"{LAYER}mlp.experts.linear_fc2.weight7": "routed_experts",
    f"{LAYER}mlp.experts.local_experts.2.linear_fc1.weight": "routed_experts",
    f"{LAYER}mlp.shared_experts.linear_fc2.weight": "shared_experts",
    f"{LAYER}mlp.shared_experts.gate_weight": "shared_experts",
    f"{LAYER}mlp.coe_weights.1": "gates",
    f"{LAYER}mlp.linear_fc1.weight": "dense",
    "module.mtp.layers.0.eh_proj.weight": "mtp",
    "module.mtp.layers.0.transformer_layer.mlp.router.0.weight": "routers",
    "module.something_new.weight": "other",
}
MODELS = {
    "CoE layers": {},
    "dense layer, plain attention": {"moe_layer_freq": [0, 1], "multi_latent_attention": False},
    "tied": {"share_embeddings_and_output_weights": True},
    "upcycled": {"coe_residual": "outer", "coe_upcycled": True},
    "multi-token prediction": {"mtp_num_layers": 1, "moe_shared_expert_gate": True},
}


@pytest.mark.parametrize("name", NAMES)
def test_groups_by_name(name: str) -> None:
    assert group_of(name) == NAMES[name]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
def test_norms_are_those_of_the_gradients(single_rank, model: str, distributed: bool) -> None:
    settings = make_settings(
        model=MODELS[model], parallel={"use_distributed_optimizer": distributed}
    )
    trainer = make_trainer(settings, single_rank)
    trainer.train_step.compute_gradients(trainer.source.training(0, 4))
    (chunk,) = trainer.train_state.chunks
    squares = dict.fromkeys(GROUPS, 0.0)
    for name, parameter in chunk.named_parameters():
        squares[group_of(name)] += parameter.main_grad.double().square().sum().item()
    optimizer = trainer.train_state.optimizer
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    norms = GradientNorms(optimizer, trainer.train_state.chunks)
    measured = norms.named(norms.squares().tolist())
    expected = {group: square**0.5 for group, square in squares.items() if square}
    assert measured == pytest.approx(expected, rel=1e-5)
    assert math.hypot(*measured.values()) == pytest.approx(norm, rel=1e-6)
    assert "other" not in measured and len(measured) >= 5
