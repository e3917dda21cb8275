"""Where vLLM's model keeps each weight of a Hugging Face folder, from the one table of names.

vLLM fuses projections that read the same input, and stacks the experts: a target names the module
that holds a weight and the shard of it. Modules are what is named, not tensors, so that the scales
and packed weights of a quantized folder find theirs too.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

from megatron_coe.hf.configuration_coe import CoeConfig
from megatron_coe.hf.weight_names import ModelShape, weights

GATE_UP = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
QKV = {f"{letter}_proj": ("qkv_proj", letter) for letter in "qkv"}
LATENTS = {"q_a_proj": ("fused_qkv_a_proj", 0), "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1)}
EXPERT_SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

PACKED_MODULES = {
    "gate_up_proj": list(GATE_UP),
    "qkv_proj": list(QKV),
    "fused_qkv_a_proj": list(LATENTS),
}
"""The fused modules and their parts, in vLLM's form: what a quantization method asks for."""


@dataclass(frozen=True)
class Target:
    """A module of vLLM's model, and what part of its parameters a weight is."""

    module: str
    shard: str | int | None = None
    expert: int | None = None

    def parameter(self, kind: str) -> str:
        """Return the name of the parameter that holds `kind`: `weight`, `bias`, a scale …"""
        if self.expert is None:
            return f"{self.module}.{kind}"
        return f"{self.module}.{'w2' if self.shard == 'w2' else 'w13'}_{kind}"


def targets(config: CoeConfig) -> dict[str, Target]:
    """Map every module with weights in a Hugging Face folder to where vLLM's model keeps it."""
    fused: dict[str, tuple[str, str | int]] = dict(GATE_UP)
    if config.attention_type == "mha":
        fused |= QKV
    elif config.q_lora_rank is not None:
        fused |= LATENTS
    result = {}
    for weight in weights(model_shape(config)):
        for position, name in enumerate(weight.parts):
            module = name.rpartition(".")[0]
            parent, _, leaf = module.rpartition(".")
            if weight.experts:
                layer = parent.rpartition(".")[0]
                expert = position * weight.experts // len(weight.parts)
                result[module] = Target(f"{layer}.routed_experts", EXPERT_SHARDS[leaf], expert)
            elif leaf in fused:
                holder, shard = fused[leaf]
                result[module] = Target(f"{parent}.{holder}", shard)
            else:
                result[module] = Target(module)
    return result


def model_shape(config: CoeConfig) -> ModelShape:
    """Return the fields of a configuration that the table of names reads, by Megatron's names."""
    shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
    shape = SimpleNamespace(
        moe_layer_pattern=[int(config.has_experts(i)) for i in range(config.num_hidden_layers)],
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        multi_latent_attention=config.attention_type == "mla",
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_head_dim=config.qk_nope_head_dim,
        qk_pos_emb_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.use_qk_norm,
        num_moe_experts=config.n_routed_experts,
        moe_ffn_hidden_size=config.moe_intermediate_size,
        moe_shared_expert_intermediate_size=shared or None,
        moe_router_enable_expert_bias=config.use_expert_bias,
        coe_iterations=config.inner_iter,
        coe_independent_gate=config.use_igate,
        coe_upcycled=config.coe_upcycled,
        mtp_num_layers=None,  # which vLLM's model leaves out, as transformers' does
    )
    return cast(ModelShape, shape)
