"""What the fields of a model may be.

A table each holds values, what is unsupported, and what needs Transformer Engine. `check_fields`
applies them; what fields must be to one another `CoEConfig`
checks, and parallel sizes `model.parallelism`.

A field of Megatron's that is in no table here works as in any Megatron model, and a test shows it
(docs/megatron_core.md says which). Of the fields that the 0.19 line added, those that change what
is computed, how weights are laid out or who holds them are refused until a test shows otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_coe.megatron_compat import transformer_engine
from megatron_coe.utils.value_rules import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    ValueRule,
    each,
    integer,
    one_of,
)

if TYPE_CHECKING:
    from megatron_coe.model.config import CoEConfig

_WEIGHT_LAYOUT = "it lays weights out in another way, which conversion and checkpoints do not know"
_SHARDED_WEIGHTS = "weights sharded over further ranks are tested with no CoE layer"
_SCALED = "it scales activations by its own rules, which exported models do not have"
_SPARSE = "this kind of attention is not among the model's"

UNSUPPORTED: dict[str, str] = {
    # A re-entered layer
    "moe_latent_size": "its projections stand outside the iterations",
    "overlap_moe_expert_parallel_comm": "its schedule runs a single iteration of the layer",
    "delay_wgrad_compute": "it belongs to overlap_moe_expert_parallel_comm",
    "overlap_dispatch_backward_with_experts_wgrad": "it pairs one dispatch with one wgrad",
    "moe_use_legacy_grouped_gemm": "the legacy grouped GEMM is deprecated by Megatron",
    "mtp_use_repeated_layer": "its auxiliary losses would count once per predicted token",
    "moe_paged_stash": "its pages hold the activations of one pass through the experts",
    "moe_expert_rank_capacity_factor": "it belongs to moe_paged_stash",
    "moe_router_force_biased": "routers of several iterations would share one bias",
    "moe_router_quantile_balancing_ema": "its quantiles would count an iteration as a micro-batch",
    # Weights
    "moe_single_grouped_weight": _WEIGHT_LAYOUT,
    "moe_single_grouped_bias": _WEIGHT_LAYOUT,
    "moe_mlp_glu_interleave_size": _WEIGHT_LAYOUT,
    "moe_shared_expert_glu_interleave_size": _WEIGHT_LAYOUT,
    "mla_down_proj_fusion": _WEIGHT_LAYOUT,
    "mtp_hybrid_override_pattern": _WEIGHT_LAYOUT,
    # Who holds them, and which tokens
    "tensor_parallel_num_weight_shards": _SHARDED_WEIGHTS,
    "expert_tensor_parallel_num_weight_shards": _SHARDED_WEIGHTS,
    "gtp_weight_remat_size": _SHARDED_WEIGHTS,
    "expert_gtp_weight_remat_size": _SHARDED_WEIGHTS,
    "hybrid_context_parallel": "its groups change from one sequence to the next",
    "max_seqlen_per_dp_cp_rank": "it belongs to hybrid_context_parallel",
    # What is computed
    "use_mup": _SCALED,
    "experimental_attention_variant": _SPARSE,
}
"""Field -> why it is refused. Unset is None, False, an empty value, 0 or a size of 1."""

_FILLED_IN = {
    "tensor_parallel_num_weight_shards": "tensor_model_parallel_size",
    "expert_tensor_parallel_num_weight_shards": "expert_tensor_parallel_size",
}
"""Fields that Megatron's parsed arguments set to another's value where they are not given."""

NEEDS_TE = (
    "fp8",
    "fp4",
    "fp8_output_proj",
    "fused_residual_rmsnorm",
    "moe_permute_fusion",
    "moe_permute_fusion_into_hybridep",
    "moe_router_fusion",
    "use_grouped_gemm_for_dense_mlp",
    "use_grouped_gemm_for_shared_expert",
    "use_transformer_engine_op_fuser",
)
"""Fields that cannot be configured without Transformer Engine."""

RESIDUAL_MODES = ("inner", "outer", "addinit", "inner_outer", "none")
"""How iterations and layers are joined; `coe_residual` takes one of these (see `CoEConfig`)."""

GROUP_SCORES = ("sum", "max")

GROUPED_GEMM_BACKENDS = ("auto", "grouped_mm", "triton", "te", "loop")

_COUNT = integer(1)

VALUES: dict[str, ValueRule] = {
    "num_layers": integer(1, 10_000),
    "hidden_size": _COUNT,
    "ffn_hidden_size": _COUNT,
    "vocab_size": NOT_NEGATIVE,
    "make_vocab_size_divisible_by": _COUNT,
    "seq_length": integer(2),  # a token and the one after it
    "normalization": one_of("RMSNorm", "LayerNorm"),
    "layernorm_epsilon": POSITIVE,
    "init_method_std": NOT_NEGATIVE,
    "hidden_dropout": FRACTION,
    "recompute_num_layers": _COUNT,
    "mtp_num_layers": integer(0, 1_000),
    # Attention
    "num_attention_heads": _COUNT,
    "num_query_groups": _COUNT,
    "kv_channels": _COUNT,
    "kv_lora_rank": _COUNT,
    "q_lora_rank": _COUNT,
    "qk_head_dim": _COUNT,
    "qk_pos_emb_head_dim": ValueRule(
        lambda value: _COUNT.allows(value) and value % 2 == 0,
        "an even integer >= 2, as rotary embeddings turn pairs",
    ),
    "v_head_dim": _COUNT,
    "attention_dropout": FRACTION,
    "rotary_base": POSITIVE,
    "rotary_scaling_factor": POSITIVE,
    "original_max_position_embeddings": _COUNT,
    # Experts and routers
    "moe_layer_freq": ValueRule(
        lambda value: _COUNT.allows(value) if isinstance(value, int) else {0, 1}.issuperset(value),
        "1 (all layers), 2 (every second), …, or a list of 1 (CoE layer) and 0 (dense layer)",
    ),
    "num_moe_experts": _COUNT,  # routed ones
    "moe_ffn_hidden_size": _COUNT,
    "moe_shared_expert_intermediate_size": NOT_NEGATIVE,
    "moe_router_topk": _COUNT,
    "moe_router_num_groups": NOT_NEGATIVE,
    "moe_router_group_topk": NOT_NEGATIVE,
    "moe_router_group_score": one_of(*GROUP_SCORES),
    "moe_grouped_gemm_backend": one_of(*GROUPED_GEMM_BACKENDS),
    "moe_router_load_balancing_type": each(
        one_of("seq_aux_loss", "aux_loss", "global_aux_loss", "none")
    ),
    "moe_aux_loss_coeff": each(NOT_NEGATIVE),
    "moe_z_loss_coeff": NOT_NEGATIVE,
    # "flex" has the buffers of one pass through the experts.
    "moe_token_dispatcher_type": one_of("alltoall", "allgather", "megatron_alltoall"),
    # Output layer and loss
    "cross_entropy_fusion_impl": one_of("linear", "native", "te"),
    # Iterations
    "coe_iterations": integer(1, 1_000),
    "coe_residual": one_of(*RESIDUAL_MODES),
}
"""Field -> what it must be, if it is set."""

NEED_LOGITS: dict[str, str] = {
    "defer_embedding_wgrad_compute": "it computes the output layer's weight gradient by itself",
    "fp8_output_proj": "it computes the output layer in FP8",
    "config_logger_dir": "it writes the logits down",
}
"""Field -> why output layer and loss cannot be fused (`cross_entropy_fusion_impl="linear"`)."""

_MOE_GRAPHS = {"moe", "moe_router", "moe_preprocess"}


def check_fields(config: CoEConfig) -> None:
    """Raise ValueError, naming field, value and fix, for the first field that breaks a rule."""
    for name, rule in VALUES.items():
        rule.check(name, getattr(config, name, None))  # `seq_length` is the provider's
    for name, reason in UNSUPPORTED.items():
        value = getattr(config, name, None)  # one that only the other line has is unset
        filled_in = getattr(config, _FILLED_IN[name], None) if name in _FILLED_IN else 1
        if value and not (type(value) is int and value in (1, filled_in)):
            raise ValueError(
                f"{name}={value!r} is not supported by a CoE layer: {reason}. Unset it."
            )
    for name in NEEDS_TE:
        if getattr(config, name, None) and not transformer_engine.is_installed():
            raise ValueError(
                f"{name}={getattr(config, name)!r} needs Transformer Engine, which is not "
                "installed. Unset it."
            )
    if config.add_bias_linear:
        raise ValueError(
            "add_bias_linear=True: experts and routers have no biases here. Set it to false "
            "(add_qkv_bias gives the attention its own)."
        )
    _check_balancing(config)
    _check_replay(config)
    _check_interleaving(config)
    _check_partial_graphs(config)
    _check_loss_fusion(config)


def needs_logits(config: CoEConfig) -> str | None:
    """Return a field that is set and needs the output layer's logits, or None."""
    return next((name for name in NEED_LOGITS if getattr(config, name, None)), None)


def _check_loss_fusion(config: CoEConfig) -> None:
    name = needs_logits(config)
    if name and config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "linear":
        raise ValueError(
            f"cross_entropy_fusion_impl='linear' with {name}={getattr(config, name)!r}: "
            f"{NEED_LOGITS[name]}. Unset it, or leave cross_entropy_loss_fusion out."
        )


def _check_balancing(config: CoEConfig) -> None:
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    shared = not config.coe_independent_gate and config.coe_iterations > 1
    if "global_aux_loss" in kinds and shared:
        raise ValueError(
            f"moe_router_load_balancing_type={config.moe_router_load_balancing_type!r} with "
            "coe_independent_gate=False: one router counts the tokens of all iterations "
            "together. Choose 'seq_aux_loss' or 'aux_loss', or a router for each iteration."
        )


def _check_replay(config: CoEConfig) -> None:
    """Refuse to replay routing: a router keeps one recording, and replays the last it made."""
    shared = not config.coe_independent_gate and config.coe_iterations > 1
    if config.moe_enable_routing_replay and shared:
        raise ValueError(
            "moe_enable_routing_replay=True with coe_independent_gate=False: one router would "
            "replay its last iteration's choice in all of them. Set coe_independent_gate=true."
        )


def _check_interleaving(config: CoEConfig) -> None:
    """Refuse what Megatron-Core 0.16.1 and 0.19.2 accept and compute wrongly.

    At 8 micro-batches over 2 x 2 chunks the gradients' norm is 712 for 2.55, with 2 micro-batches
    it is right.
    """
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if interleaved and config.batch_p2p_comm and not config.overlap_p2p_comm:
        raise ValueError(
            "virtual_pipeline_model_parallel_size="
            f"{config.virtual_pipeline_model_parallel_size} with overlap_p2p_comm=False and "
            "batch_p2p_comm=True: Megatron's interleaved schedule then computes wrong losses and "
            "gradients. Set overlap_p2p_comm=true and batch_p2p_comm=false."
        )


def _check_partial_graphs(config: CoEConfig) -> None:
    for name in ("cuda_graph_scope", "cuda_graph_modules"):  # the current name of the former
        scopes = getattr(config, name, None) or []
        scopes = scopes.split(",") if isinstance(scopes, str) else scopes
        scopes = {getattr(scope, "name", scope) for scope in scopes}
        if config.coe_iterations > 1 and scopes & _MOE_GRAPHS:
            raise ValueError(
                f"{name}={getattr(config, name)}: a graph of part of a MoE layer would hold one "
                "iteration of several. Leave the moe scopes out."
            )
