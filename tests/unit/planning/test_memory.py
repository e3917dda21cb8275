"""Memory on paper against what a training step really takes, on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_coe.planning.memory import peak_memory_stage, rank_memory, stage_memory, stage_params
from megatron_coe.planning.plan import Plan
from tests.builders import tiny_provider
from tests.memory import CASES, assert_near, compare


@pytest.mark.parametrize("case", CASES)
def test_predicted_memory_is_what_a_step_takes(single_rank: torch.device, case: str) -> None:
    outcome = compare(CASES[case], single_rank)
    # What is recomputed is freed little by little while it is used.
    bound = 0.1 if "recompute" in case else 0.03
    frozen = "freeze" in CASES[case].get("train", {})
    assert_near(outcome.predicted, outcome.measured, bound, frozen)


def plan(**changes) -> Plan:
    """Eight tiny layers on as many processes as the layout needs, four micro-batches each."""
    fields = {"num_layers": 8, "num_moe_experts": 8, "pipeline_dtype": torch.float32, **changes}
    whole = Plan(tiny_provider(**fields), world_size=1)
    model = whole.model
    ranks = model.tensor_model_parallel_size * model.context_parallel_size
    ranks *= model.pipeline_model_parallel_size
    return replace(whole, world_size=ranks, global_batch_size=4)


def test_stages_hold_the_whole_model_between_them() -> None:
    layout = plan(pipeline_model_parallel_size=4, moe_layer_freq=[0, 1, 1, 1, 1, 0, 1, 1])
    parts = [sum(stage_params(layout, stage)) for stage in range(4)]
    assert sum(parts) == layout.model.num_params()


def test_interleaved_chunks_are_dealt_out_in_rounds() -> None:
    layout = plan(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        moe_layer_freq=[0, 0, 1, 1, 1, 0, 1, 1],
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    assert layout.chunks == [[[False] * 2, [True, False]], [[True] * 2, [True] * 2]]


def test_uneven_stages_are_megatrons() -> None:
    layout = plan(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=5)
    assert [len(stage[0]) for stage in layout.chunks] == [5, 3]
    assert sum(sum(stage_params(layout, stage)) for stage in range(2)) == layout.model.num_params()


def test_a_layout_of_the_users_own_is_followed() -> None:
    layout = plan(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et*3|t*5L")
    assert [len(stage[0]) for stage in layout.chunks] == [3, 5]


def test_the_peak_memory_stage_decides() -> None:
    layout = plan(pipeline_model_parallel_size=4, vocab_size=4096)
    totals = [stage_memory(layout, stage).total for stage in range(4)]
    assert totals.index(max(totals)) == peak_memory_stage(layout)
    assert rank_memory(layout).total == max(totals)
    # In the middle nothing but the number of micro-batches in flight differs.
    kept = [stage_memory(layout, stage).activations for stage in (1, 2)]
    assert kept[0] * 2 == kept[1] * 3
