"""A ranking of layouts as tables, as JSON, and as the YAML that asks for a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from megatron_coe.planning.activations import iteration_activations
from megatron_coe.planning.build import Built
from megatron_coe.planning.communication import Collective, collectives
from megatron_coe.planning.hardware import Cluster
from megatron_coe.planning.layout_search import (
    CONFIGURED,
    RECOMPUTE,
    Estimate,
    Ranking,
    usable_memory,
)
from megatron_coe.planning.memory import GIB, peak_memory_stage
from megatron_coe.planning.plan import Plan
from megatron_coe.utils.tables import aligned_table

_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}


def headline(plan: Plan, cluster: Cluster) -> str:
    """Name the model, the machine and the batch in a line."""
    model = plan.model
    return (
        f"{model.num_params():,} parameters, {model.num_active_params():,} active; "
        f"{plan.world_size} x {cluster.gpu.name}, {cluster.gpus_per_node} to a node; "
        f"{plan.global_batch_size:,} sequences of {model.seq_length:,} tokens to a step"
    )


def ranking_table(ranking: Ranking, cluster: Cluster, top: int) -> str:
    """Tabulate the fastest layouts that fit."""
    limit = usable_memory(cluster) / GIB
    title = f"the layout as configured; {limit:.0f} GiB of each GPU can be used"
    if [found.recompute for found in ranking.fitting] != [CONFIGURED]:
        fit = len(ranking.fitting)
        title = f"{ranking.legal} legal layouts, of which {fit} fit in {limit:.0f} GiB of each GPU"
    columns = (*_SIZES, "DP", "micro-batch", "recompute", "GiB", "weights", "gradients")
    columns += ("optimizer", "activations", "ms", "exposed", "bubble", "MFU")
    return f"{title}:\n{aligned_table(columns, map(_row, ranking.fitting[:top]))}"


def nothing_fits(ranking: Ranking, cluster: Cluster) -> str:
    """Explain why there is no layout to recommend."""
    assert ranking.smallest is not None
    plan = ranking.smallest.plan
    return (
        f"none of the {ranking.legal} legal layouts on {plan.world_size} GPUs fits in "
        f"{usable_memory(cluster) / GIB:.0f} GiB: the smallest ({_named(plan)}, micro-batch "
        f"{plan.micro_batch_size}, recompute {ranking.smallest.recompute}) needs "
        f"{ranking.smallest.memory.total / GIB:.0f} GiB. Take more GPUs, or larger ones"
    )


def details(estimate: Estimate, cluster: Cluster) -> str:
    """List memory, activations by iteration and collectives of the peak-memory stage."""
    plan, memory, time = estimate.plan, estimate.memory, estimate.time
    stage = peak_memory_stage(plan)
    lines = [f"{_named(plan)}: a rank of pipeline stage {stage}, the peak-memory stage"]
    parts = [(name, f"{value / GIB:9.2f} GiB") for name, value in asdict(memory).items()]
    lines += [f"  {name:<14}{value}" for name, value in parts]
    for t in range(plan.model.coe_iterations):
        of_iteration = iteration_activations(plan, t)
        saved, recomputed = of_iteration.saved / GIB, of_iteration.recomputed / GIB
        lines.append(
            f"  of each CoE layer and micro-batch, iteration {t + 1}: {saved:.3f} GiB saved"
        )
        lines[-1] += f", {recomputed:.3f} GiB recomputed" if of_iteration.recomputed else ""
    lines += ["", "collectives of that rank"]
    header = ("", "over", "in each", "times a step", "calls", "MB sent", "ms")
    rows = (
        (c.name, c.group, c.place, f"{c.times:,}", str(c.calls), f"{c.sent / 1e6:,.1f}",
         f"{c.seconds * 1e3:.3f}")
        for c in collectives(plan, stage, cluster)
    )  # fmt: skip
    lines += [aligned_table(header, rows), ""]
    lines.append(
        f"step {time.total * 1e3:.1f} ms: compute {time.compute * 1e3:.1f}, exposed communication "
        f"{time.exposed * 1e3:.1f}, pipeline bubble {time.bubble * 1e3:.1f}, optimizer "
        f"{time.optimizer * 1e3:.1f}; MFU {time.mfu:.1%}"
    )
    return "\n".join(lines)


def as_yaml(estimate: Estimate) -> str:
    """Return the settings that make a run of this plan."""
    plan, model = estimate.plan, estimate.plan.model
    sections: dict[str, dict[str, Any]] = {"model": {}}
    if estimate.recompute not in ("none", CONFIGURED):
        sections["model"] |= RECOMPUTE[estimate.recompute]
    if model.moe_shared_expert_overlap:
        sections["model"]["moe_shared_expert_overlap"] = True
    sections["parallel"] = {
        **{name: getattr(model, name) for name in _SIZES.values()},
        "use_distributed_optimizer": plan.use_distributed_optimizer,
        "overlap_grad_reduce": plan.overlap_grad_reduce,
        "overlap_param_gather": plan.overlap_param_gather,
    }
    sections["train"] = {
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
    }
    filled = {name: section for name, section in sections.items() if section}
    return yaml.safe_dump(filled, sort_keys=False).rstrip()


def as_dict(estimate: Estimate, cluster: Cluster) -> dict[str, Any]:
    """Return everything about an estimate, for JSON; bytes and seconds."""
    plan = estimate.plan
    traffic: list[Collective] = collectives(plan, peak_memory_stage(plan), cluster)
    iterations = [asdict(iteration_activations(plan, t)) for t in range(plan.model.coe_iterations)]
    return {
        "settings": yaml.safe_load(as_yaml(estimate)),
        "memory": {**asdict(estimate.memory), "total": estimate.memory.total},
        "activations_of_iterations": iterations,
        "collectives": [asdict(collective) for collective in traffic],
        "time": {**asdict(estimate.time), "total": estimate.time.total},
    }


def built_table(ranks: Sequence[Built]) -> str:
    """Tabulate built and predicted parameters."""
    header = ("rank", "stage", "built", "of them in experts", "predicted", "")
    rows = []
    for built in ranks:
        total, predicted = built.dense + built.expert, sum(built.predicted)
        agrees = "equal" if built.agrees else "DIFFERENT"
        rows.append(
            (str(built.rank), str(built.stage), f"{total:,}", f"{built.expert:,}",
             f"{predicted:,}", agrees)
        )  # fmt: skip
    return "parameters of ranks, built on the meta device\n" + aligned_table(header, rows)


def _named(plan: Plan) -> str:
    sizes = {name: getattr(plan.model, field) for name, field in _SIZES.items()}
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size and size > 1) or "DP"


def _row(estimate: Estimate) -> tuple[str, ...]:
    plan, memory, time = estimate.plan, estimate.memory, estimate.time
    sizes = [str(getattr(plan.model, field) or "-") for field in _SIZES.values()]
    parts = (memory.total, memory.weights, memory.gradients, memory.optimizer, memory.activations)
    seconds = (time.total, time.exposed, time.bubble)
    return (
        *sizes,
        str(plan.data_parallel),
        str(plan.micro_batch_size),
        estimate.recompute,
        *(f"{part / GIB:.1f}" for part in parts),
        *(f"{second * 1e3:.1f}" for second in seconds),
        f"{time.mfu:.1%}",
    )
