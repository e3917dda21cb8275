"""Search the layouts that a model and a number of GPUs allow, ranked by estimated step time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from megatron_coe.config.schedules import BatchSchedule
from megatron_coe.model.parallelism import UNEVEN_STAGES, Layout, divisors, extents_of, violation
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.hardware import USABLE_MEMORY, Cluster
from megatron_coe.planning.memory import Memory, rank_memory
from megatron_coe.planning.plan import Plan
from megatron_coe.planning.step_time import StepTime, step_time

RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {"recompute_granularity": None},
    "moe_act": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""What the search may recompute, the cheapest first, as fields of section `model`. The first that
fits is taken."""

CONFIGURED = "as configured"

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Candidate:
    """A plan with the memory of its peak-memory stage."""

    plan: Plan
    recompute: str
    """What its model recomputes, a name of RECOMPUTE."""
    memory: Memory


@dataclass(frozen=True)
class Estimate(Candidate):
    """A plan with what it costs."""

    time: StepTime


@dataclass(frozen=True)
class Ranking:
    """What a search found."""

    fitting: list[Estimate]
    """Those that fit, the fastest first."""
    legal: int
    """Number of legal layouts (micro-batch sizes and recomputation not counted)."""
    smallest: Candidate | None = None
    """Of those that do not fit, the one that needs least memory; None if all do."""


def estimate(plan: Plan, cluster: Cluster) -> Estimate:
    """Estimate what a plan costs as it is."""
    return Estimate(plan, CONFIGURED, rank_memory(plan), step_time(plan, cluster))


def usable_memory(cluster: Cluster) -> float:
    """Return the bytes of a GPU that a plan may fill."""
    return USABLE_MEMORY * cluster.gpu.memory


def rank_layouts(
    model: CoEModelProvider, world_size: int, batches: BatchSchedule, cluster: Cluster
) -> Ranking:
    """Rank the legal layouts of `model` on `world_size` GPUs, each with its best micro-batch size.

    The layout in `model` itself does not matter; its recomputation, where it asks for one, is kept.
    Costs are those of the final batch size; every one on the way up to it divides evenly.

    Raises:
        ValueError: the model sets uneven pipeline stages, or no layout is
            legal for this number of GPUs and this batch.
    """
    for name in UNEVEN_STAGES:
        if getattr(model, name):
            raise ValueError(
                f"model.{name}={getattr(model, name)!r}: the search divides layers evenly; leave "
                "it out, or keep the file's layout"
            )
    fitting: list[Estimate] = []
    others: list[Candidate] = []
    legal = 0
    for layout in legal_layouts(model, world_size, cluster.gpus_per_node):
        found = list(_candidates(model, layout, world_size, batches, cluster))
        legal += bool(found)
        timed = [
            Estimate(**vars(c), time=step_time(c.plan, cluster)) for c in found if _fits(c, cluster)
        ]
        fitting += [min(timed, key=lambda e: e.time.total)] if timed else []
        others += [candidate for candidate in found if not _fits(candidate, cluster)]
    if not legal:
        raise ValueError(
            f"no layout is legal for {world_size} GPUs with train.global_batch_size="
            f"{batches.final}, all batches multiples of {batches.unit}: each data-parallel rank "
            "needs the same number of sequences; make the batch a multiple of the number of GPUs, "
            "or change the latter"
        )
    smallest = min(others, key=lambda c: c.memory.total, default=None)
    return Ranking(sorted(fitting, key=lambda e: e.time.total), legal, smallest)


def legal_layouts(model: CoEModelProvider, world_size: int, gpus_per_node: int) -> Iterator[Layout]:
    """Yield the layouts that `megatron_coe.model.parallelism` allows, without the pointless ones.

    These are tensor parallelism beyond a node, and expert-tensor parallelism other than 1 or TP.
    """
    extents = extents_of(vars(model), world_size)
    processes = divisors(world_size)
    stages = [pp for pp in processes if pp <= model.num_layers]
    for tp, pp, cp, ep in product(processes, stages, processes, divisors(model.num_moe_experts)):
        if tp > gpus_per_node:
            continue
        for etp in sorted({1, tp}):
            plain = Layout(tp, pp, None, cp, ep, etp)
            if violation(plain, extents):
                continue
            yield plain
            for vpp in divisors(model.num_layers // pp)[1:] if pp > 1 else ():
                interleaved = replace(plain, virtual_pipeline_model_parallel_size=vpp)
                if not violation(interleaved, extents):
                    yield interleaved


def _candidates(
    model: CoEModelProvider,
    layout: Layout,
    world_size: int,
    batches: BatchSchedule,
    cluster: Cluster,
) -> Iterator[Candidate]:
    """Yield the cheapest recomputation that fits for each micro-batch size.

    The last is the first size that none makes fit.
    """
    data_parallel = world_size // layout.dense_ranks
    vpp, pp = layout.virtual_pipeline_model_parallel_size, layout.pipeline_model_parallel_size
    chosen = RECOMPUTE if model.recompute_granularity is None else {CONFIGURED: {}}
    parallelized: dict[str, CoEModelProvider] = {}
    for micro in MICRO_BATCHES:
        if batches.unit % (data_parallel * micro):
            return
        if vpp and batches.unit // (data_parallel * micro) % pp:
            return
        for name, changes in chosen.items():
            if name not in parallelized:
                parallelized[name] = parallelize(model, layout, changes)
            plan = Plan(
                model=parallelized[name],
                world_size=world_size,
                micro_batch_size=micro,
                global_batch_size=batches.final,
                use_distributed_optimizer=world_size > pp,
                overlap_grad_reduce=True,
                overlap_param_gather=world_size > pp,
            )
            candidate = Candidate(plan, name, rank_memory(plan))
            if _fits(candidate, cluster):
                break
        yield candidate
        if not _fits(candidate, cluster):
            return


def _fits(candidate: Candidate, cluster: Cluster) -> bool:
    return candidate.memory.total <= usable_memory(cluster)


def parallelize(
    model: CoEModelProvider, layout: Layout, changes: Mapping[str, object]
) -> CoEModelProvider:
    """Return the model in a layout, with the fields that go with it.

    These are sequence parallelism, point-to-point communication, and the shared expert overlapped
    with the dispatch where that crosses GPUs.
    """
    tp, vpp = layout.tensor_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    return model.with_fields(
        **vars(layout),
        **changes,
        sequence_parallel=tp > 1,
        overlap_p2p_comm=vpp is not None,
        batch_p2p_comm=vpp is None,
        moe_shared_expert_overlap=(
            layout.expert_model_parallel_size > 1
            and model.moe_shared_expert_intermediate_size is not None
        ),
    )
