"""Rankings: what is legal is all there, what is ranked fits, and times obey the obvious."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_coe.config.schedules import BatchSchedule
from megatron_coe.model.parallelism import Layout
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.hardware import GPUS, Cluster
from megatron_coe.planning.layout_search import legal_layouts, rank_layouts, usable_memory
from megatron_coe.planning.memory import rank_memory
from megatron_coe.planning.plan import Plan
from megatron_coe.planning.report import nothing_fits
from megatron_coe.planning.step_time import step_time
from tests.builders import tiny_provider
from tests.unit.model.test_flops import PAPER

H100 = Cluster(GPUS["h100"])


def model(**changes) -> CoEModelProvider:
    fields = {"num_layers": 4, "num_moe_experts": 8, "seq_length": 64, "vocab_size": 1024}
    return tiny_provider(**{**fields, "pipeline_dtype": torch.float32, **changes})


def by_hand(world_size: int) -> set[Layout]:
    """All layouts of `model` that fit together, by the rules as a person would write them."""
    found = set()
    sizes = range(1, 33)
    for tp, pp, cp, ep in product(sizes, sizes, sizes, sizes):
        for etp in {1, tp}:
            if (
                4 % tp
                or 4 % pp
                or 8 % ep
                or 16 % etp
                or 64 % (tp * cp)
                or (cp > 1 and 64 % (2 * cp))
            ):
                continue
            if world_size % (tp * pp * cp) or world_size % (etp * ep * pp):
                continue
            found.add(Layout(tp, pp, None, cp, ep, etp))
            rounds = {1: (), 2: (2,), 4: ()}[pp]
            found |= {Layout(tp, pp, vpp, cp, ep, etp) for vpp in rounds}
    return found


def test_every_legal_layout_is_found_once() -> None:
    found = list(legal_layouts(model(), 16, gpus_per_node=8))
    assert len(found) == len(set(found))
    assert set(found) == by_hand(16)


def test_what_is_ranked_fits_and_the_fastest_comes_first() -> None:
    nowhere = Cluster(replace(GPUS["h100"], memory=1))
    none = rank_layouts(model(), 8, BatchSchedule.constant(32), nowhere)
    assert not none.fitting and none.smallest is not None
    for word in (f"none of the {none.legal} legal layouts on 8 GPUs fits", "Take more GPUs"):
        assert word in nothing_fits(none, nowhere)
    limit = 1.5 * none.smallest.memory.total
    tight = Cluster(replace(GPUS["h100"], memory=limit / 0.9))
    ranking = rank_layouts(model(), 8, BatchSchedule.constant(32), tight)
    assert 0 < len(ranking.fitting) < ranking.legal
    times = [found.time.total for found in ranking.fitting]
    assert times == sorted(times)
    for found in ranking.fitting:
        assert rank_memory(found.plan) == found.memory
        assert found.memory.total <= usable_memory(tight) == pytest.approx(limit)
        assert 0 < found.time.mfu < 1
        plan = found.plan
        assert plan.num_microbatches * plan.micro_batch_size * plan.data_parallel == 32
    assert len({found.recompute for found in ranking.fitting}) > 1


def test_recomputation_that_is_asked_for_is_kept() -> None:
    asked = model(recompute_granularity="selective", recompute_modules=["moe_act"])
    ranking = rank_layouts(asked, 2, BatchSchedule.constant(8), H100)
    assert {tuple(e.plan.model.recompute_modules) for e in ranking.fitting} == {("moe_act",)}


def test_every_batch_of_a_ramp_divides_evenly() -> None:
    ranking = rank_layouts(model(), 8, BatchSchedule(4, 4, 100, 32), H100)
    assert {e.plan.global_batch_size for e in ranking.fitting} == {32}
    for plan in (found.plan for found in ranking.fitting):
        stages = plan.model.pipeline_model_parallel_size
        interleaved = plan.model.virtual_pipeline_model_parallel_size is not None
        divisor = plan.data_parallel * plan.micro_batch_size * (stages if interleaved else 1)
        assert 4 % divisor == 0
    assert any(found.plan.data_parallel == 4 for found in ranking.fitting)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size=1, .*multiple of the number of GPUs"):
        rank_layouts(model(), 7, BatchSchedule.constant(1), H100)
    uneven = model(num_layers_in_first_pipeline_stage=3, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="num_layers_in_first_pipeline_stage=3"):
        rank_layouts(uneven, 8, BatchSchedule.constant(8), H100)


def paper(**changes) -> Plan:
    fields = {"coe_iterations": 2, "params_dtype": torch.bfloat16, "bf16": True, **changes}
    fields |= {"bias_activation_fusion": True, "seq_length": 512}
    return Plan(tiny_provider(**{**PAPER, **fields}), 1, 8, 64)


@pytest.mark.parametrize(("C", "floor_ms"), [(1, 50.4), (2, 52.6)])
def test_the_papers_step_is_near_its_floor(C: int, floor_ms: float) -> None:
    """The floor: the step's operations at the 790 TFLOP/s that torch measures on an H200."""
    plan = paper(coe_iterations=C, moe_router_topk=8 // C)
    milliseconds = 1e3 * step_time(plan, Cluster(GPUS["h200"])).total
    assert floor_ms < milliseconds < 2 * floor_ms


def test_time_follows_the_hardware() -> None:
    layout = replace(model(expert_model_parallel_size=8, overlap_p2p_comm=False), num_layers=4)
    plan = Plan(layout, 16, 4, 64)
    gpu = GPUS["h100"]
    times = {
        name: step_time(plan, Cluster(replace(gpu, **{name: getattr(gpu, name) / 4})))
        for name in ("flops", "memory_bandwidth", "nvlink", "network")
    }
    base = step_time(plan, H100)
    assert times["flops"].compute > base.compute and times["flops"].exposed == base.exposed
    assert times["memory_bandwidth"].optimizer == pytest.approx(4 * base.optimizer)
    for link in ("nvlink", "network"):
        assert times[link].exposed > base.exposed and times[link].compute == base.compute


def test_the_bubble_is_what_the_schedule_leaves_idle() -> None:
    """(PP - 1) of m + PP - 1 slots; interleaving divides it by the number of rounds."""
    bubbles = {}
    for vpp in (None, 2):
        changes = {"virtual_pipeline_model_parallel_size": vpp, "overlap_p2p_comm": vpp is not None}
        changes["batch_p2p_comm"] = vpp is None
        plan = Plan(model(pipeline_model_parallel_size=2, **changes), 2, 1, 8)
        time = step_time(plan, H100)
        bubbles[vpp] = time.bubble / (time.compute + time.exposed)
    # The p2p latency is counted into the slots, the gradients' communication is not there.
    assert bubbles[None] == pytest.approx(1 / 8)
    assert bubbles[2] == pytest.approx(1 / 16)


def test_collectives_within_and_across_nodes() -> None:
    gpu = GPUS["h100"]
    assert H100.collective(1e9, 1, 1, to_each=True) == 0
    inside = H100.collective(1e9, 8, 1, to_each=True)
    assert inside == pytest.approx(1e9 / gpu.nvlink, rel=0.01)
    # 64 ranks, 8 to a node: 56 of the 63 others are away.
    exchange = H100.collective(63e9, 64, 1, to_each=True)
    assert exchange == pytest.approx(56e9 / gpu.network, rel=0.01)
    gathered = H100.collective(63e9, 64, 1, to_each=False)
    assert gathered == pytest.approx(7e9 / gpu.network, rel=0.01)
    # One rank on each node: everything crosses the network.
    assert H100.collective(3e9, 4, 8, to_each=False) == pytest.approx(3e9 / gpu.network, rel=0.01)
