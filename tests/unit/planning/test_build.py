"""Models built on the meta device under a fake process group: every rank is the predicted one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_coe.planning.build import build_rank
from megatron_coe.planning.plan import Plan
from tests.builders import tiny_provider

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
VPP, CP = "virtual_pipeline_model_parallel_size", "context_parallel_size"
SP = {"sequence_parallel": True}

CASES: dict[str, dict[str, Any]] = {
    "DP": {},
    "TP2": {TP: 2, **SP},
    "TP4 ETP1 EP2": {TP: 4, ETP: 1, EP: 2, **SP},
    "TP2 ETP2 EP4": {TP: 2, EP: 4, **SP},
    "PP4, first layer dense": {PP: 4, "moe_layer_freq": [0] + [1] * 7},
    "PP2 VPP2": {PP: 2, VPP: 2, "overlap_p2p_comm": True, "batch_p2p_comm": False},
    "PP2, tied tables": {PP: 2, "share_embeddings_and_output_weights": True},
    "PP2, multi-token prediction": {PP: 2, "mtp_num_layers": 1},
    "PP2, uneven": {PP: 2, "num_layers_in_last_pipeline_stage": 3},
    "TP2 EP2 PP2 CP1": {TP: 2, EP: 2, ETP: 1, PP: 2, **SP},
    "plain attention, biased": {
        TP: 2, "multi_latent_attention": False, "num_query_groups": 2, "add_qkv_bias": True, **SP,
    },
    "TP2, q-LoRA, gated shared expert": {
        TP: 2, "q_lora_rank": 16, "moe_shared_expert_gate": True, **SP,
    },
    "TP2, upcycled, LayerNorm": {
        TP: 2, "coe_residual": "outer", "coe_upcycled": True, "normalization": "LayerNorm", **SP,
    },
}  # fmt: skip


def plan(world_size: int, **fields: Any) -> Plan:
    shape = {"num_layers": 8, "num_moe_experts": 8, "pipeline_dtype": torch.float32}
    return Plan(tiny_provider(**{**shape, **fields}), world_size)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_is_the_predicted_one(device: torch.device, case: str) -> None:
    layout = plan(8, **CASES[case])
    built = [build_rank(layout, rank) for rank in range(8)]
    assert all(rank.agrees for rank in built), built
    stages = layout.model.pipeline_model_parallel_size
    assert [rank.stage for rank in built] == sorted(list(range(stages)) * (8 // stages))


def test_one_rank_of_a_thousand_is_built_without_memory(device: torch.device) -> None:
    """A hundred billion parameters on 1,024 ranks: the test's own process holds none of them."""
    layout = plan(
        1024,
        **{TP: 2, PP: 8, EP: 32, ETP: 1, **SP},
        hidden_size=8192,
        num_moe_experts=64,
        moe_ffn_hidden_size=8192,
    )
    assert layout.model.num_params() > 1e11
    built = build_rank(layout, 1023)
    assert built.agrees and built.stage == 7
    assert not torch.distributed.is_initialized()


def test_what_is_built_by_another_layout_is_not_agreed_to(device: torch.device) -> None:
    built = build_rank(plan(2, **{EP: 2}), 0)
    other = build_rank(plan(1), 0)
    assert built.dense == other.dense and built.expert * 2 == other.expert


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_not_there_is_refused(device: torch.device, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is none of the 2"):
        build_rank(plan(2), rank)
