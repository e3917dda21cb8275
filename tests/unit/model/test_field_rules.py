"""Fields of Megatron's that a re-entered layer cannot have are refused; the others are known."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_coe.megatron_compat.transformer_engine import is_installed
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
from megatron_coe.model.field_rules import _FILLED_IN, NEEDS_TE, UNSUPPORTED
from tests.builders import build_layer, randomize, tiny_config

HERE = {field.name: field for field in fields(MLATransformerConfig)}
INTERLEAVED = {
    "num_layers": 4,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "pipeline_dtype": torch.float32,
}

AS_IN_MEGATRON = {
    # Set by a training loop, not by a user.
    "moe_grad_scale_func",
    "mtp_grad_scale_func",
    "experimental_attention_variant_loss_scale_func",
    # Of features that are refused, or that Megatron itself refuses without their switch.
    *("dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", "dsa_kernel_backend"),
    *("dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation"),
    *("dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32"),
    *("mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult"),
    *("mup_base_head_dim", "mup_attn_scale_power"),
    *("moe_paged_stash_page_size", "moe_paged_stash_buffer_size_factor_cuda"),
    "moe_paged_stash_buffer_size_factor_cpu",
    *("moe_hybridep_pad_uneven_dispatch_inputs", "moe_flex_dispatcher_num_sms"),
    *("moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute"),
    *("moe_hybridep_num_sms_preprocessing", "moe_ncclep_static_shape", "moe_ncclep_zero_copy"),
    # Megatron's inference engines; CoE models are served from Hugging Face folders.
    *("moe_pad_experts_for_cuda_graph_inference", "inference_cuda_graph_scope"),
    *("nccl_all_reduce_for_prefill", "inference_disable_triton_nvls_kernels"),
    *("inference_grouped_gemm_backend", "inference_moe_disable_fused_quant_kernels"),
    *("inference_moe_token_dispatcher_type", "mamba_training_ssm_states_dtype"),
    # Outside MoE layers, or of Transformer Engine's kernels and offloading.
    *("mtp_detach_heads", "flash_attention_version", "high_priority_a2a_comm_stream"),
    *("mlp_chunks_for_training", "cuda_graph_modules", "cpu_offloading_retain_pinned_cpu_buffers"),
    *("delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks"),
    *("activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads"),
}
"""Fields that the 0.19 line added and that mean for a CoE model what they mean for any other."""


def a_value_for(name: str) -> object:
    kind = str(HERE[name].type)
    if "bool" in kind:
        return True
    return 2 if "int" in kind or "float" in kind else "dsa"


@pytest.mark.parametrize("name", sorted(UNSUPPORTED.keys() & HERE.keys()))
def test_unsupported_fields_are_refused_by_name_and_reason(name: str) -> None:
    value = a_value_for(name)
    with pytest.raises(ValueError) as error:
        tiny_config(**{name: value})
    assert f"{name}={value!r}" in str(error.value) and UNSUPPORTED[name] in str(error.value)


@pytest.mark.skipif(not PARTS_ARE_PARTIALS, reason="about fields that 0.16.1 does not have")
@pytest.mark.parametrize("name", sorted(_FILLED_IN))
def test_what_megatrons_arguments_fill_in_is_accepted(name: str) -> None:
    layout = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    layout["sequence_parallel"] = True
    tiny_config(**layout, **{name: 2})
    with pytest.raises(ValueError, match=f"{name}=4 is not supported"):
        tiny_config(**layout, **{name: 4})


@pytest.mark.skipif(is_installed(), reason="Transformer Engine is installed")
@pytest.mark.parametrize("name", sorted(HERE.keys() & set(NEEDS_TE)))
def test_fields_of_transformer_engine_are_refused_without_it(name: str) -> None:
    value = "hybrid" if name in ("fp8", "fp4") else True
    with pytest.raises(ValueError, match=f"{name}={value!r} needs Transformer Engine"):
        tiny_config(**{name: value})


@pytest.mark.skipif(not PARTS_ARE_PARTIALS, reason="about fields that 0.16.1 does not have")
def test_every_new_field_is_known() -> None:
    """A field that a later Megatron-Core brings is decided upon, not passed on unseen."""
    before = Path(__file__).with_name("fields_0.16.1.txt").read_text().split()
    new = HERE.keys() - set(before)
    assert new - UNSUPPORTED.keys() - set(NEEDS_TE) == AS_IN_MEGATRON


@pytest.mark.parametrize("kind", ["flex", "allreduce"])
def test_other_dispatchers_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"moe_token_dispatcher_type='{kind}'.*alltoall"):
        tiny_config(moe_token_dispatcher_type=kind)


@pytest.mark.parametrize("kind", ["sinkhorn", "quantile_balancing", ["aux_loss", "sinkhorn"]])
def test_other_kinds_of_balancing_are_refused(kind: str | list[str]) -> None:
    coefficients = {"moe_aux_loss_coeff": [0.1, 0.1]} if isinstance(kind, list) else {}
    with pytest.raises(ValueError, match=r"moe_router_load_balancing_type=.*: must be one"):
        tiny_config(moe_router_load_balancing_type=kind, **coefficients)


def test_interleaving_with_megatrons_default_flags_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overlap_p2p_comm=True|overlap_p2p_comm=true"):
        tiny_config(**INTERLEAVED)
    config = tiny_config(**INTERLEAVED, overlap_p2p_comm=True, batch_p2p_comm=False)
    assert config.virtual_pipeline_model_parallel_size == 2


def test_one_router_for_all_iterations_cannot_replay() -> None:
    with pytest.raises(ValueError, match="coe_independent_gate=False"):
        tiny_config(moe_enable_routing_replay=True, coe_independent_gate=False)
    one = tiny_config(moe_enable_routing_replay=True, coe_independent_gate=False, coe_iterations=1)
    assert one.moe_enable_routing_replay


@pytest.mark.parametrize("dispatcher", ["alltoall", "megatron_alltoall"])
def test_each_iteration_replays_its_own_choice(single_rank, dispatcher: str) -> None:
    """Recorded with some weights, replayed with others: the experts are those recorded."""
    RouterReplay.global_router_replay_instances.clear()
    config = tiny_config(
        coe_iterations=3, moe_enable_routing_replay=True, moe_token_dispatcher_type=dispatcher
    )
    layer = build_layer(config).train()
    recorders = RouterReplay.global_router_replay_instances
    assert len(recorders) == config.coe_iterations
    x = torch.randn(5, 2, config.hidden_size, generator=torch.Generator().manual_seed(0))
    randomize(layer, torch.Generator().manual_seed(1))
    chosen: list[torch.Tensor] = []
    for router in layer.router:
        router.register_forward_hook(lambda _, __, output: chosen.append(experts_of(output)))
    try:
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        layer(x)
        recorded = [recorder.get_recorded_indices() for recorder in recorders]
        randomize(layer, torch.Generator().manual_seed(2))
        RouterReplay.clear_global_router_replay_action()
        layer(x)
        RouterReplay.set_replay_data(recorded)
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        layer(x)
    finally:
        RouterReplay.clear_global_router_replay_action()
        RouterReplay.global_router_replay_instances.clear()
    first, other, replayed = chosen[:3], chosen[3:6], chosen[6:]
    assert not any(map(torch.equal, first, other)), "the second weights choose alike"
    assert all(map(torch.equal, first, replayed))


def experts_of(output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A router's expert indices, sorted [T, K], from either form of its answer."""
    _, chosen = output
    if chosen.dtype == torch.bool:
        return chosen.nonzero()[:, 1].view(len(chosen), -1)
    return chosen.sort(dim=1).values
