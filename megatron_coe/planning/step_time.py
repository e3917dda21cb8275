"""Time of a step by estimate: arithmetic, memory traffic, exposed communication, pipeline bubble.

Experimental: not compared with the time of a cluster yet.

The assumptions, each a line here and in docs/scaling.md: experts are equally loaded; matrix
products run at a fixed share of the peak, grouped ones less by their half-empty tiles; all else
costs the memory traffic of what is saved for the backward pass; collectives inside a layer are
exposed, except for those that overlap with the shared expert; with the overlap settings gradients
are reduced during the last backward pass, and weights gathered during the first forward pass.

Axis letters: H hidden, N experts, C iterations, F expert feed-forward size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_coe.model import flops
from megatron_coe.planning.activations import layer_activations
from megatron_coe.planning.communication import Collective, collectives
from megatron_coe.planning.hardware import (
    ATTENTION_EFFICIENCY,
    MATRIX_EFFICIENCY,
    TILE_ROWS,
    Cluster,
)
from megatron_coe.planning.memory import Memory, stage_memory
from megatron_coe.planning.plan import Plan

_TOUCHES = 5
"""Memory accesses per saved byte: it is written and read twice, its gradient written and read. What
is recomputed is written and read once more."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; `exposed` is communication that overlaps with nothing."""

    compute: float
    exposed: float
    bubble: float
    optimizer: float
    mfu: float = 0.0
    """Model FLOPs of the step over what the GPUs could do at their peak in its time."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.bubble + self.optimizer


def step_time(plan: Plan, cluster: Cluster) -> StepTime:
    """Estimate the step of the slowest pipeline stage."""
    times = (_stage_time(plan, stage, cluster) for stage in plan.distinct_stages)
    slowest = max(times, key=lambda time: time.total)
    model = plan.model
    tokens = plan.global_batch_size * model.seq_length
    work = model.flops_per_token(model.seq_length) * tokens
    return replace(slowest, mfu=work / (slowest.total * plan.world_size * cluster.gpu.flops))


def _stage_time(plan: Plan, stage: int, cluster: Cluster) -> StepTime:
    model, gpu, m = plan.model, cluster.gpu, plan.num_microbatches
    compute = micro_batch_seconds(plan, stage, cluster)
    traffic = collectives(plan, stage, cluster)
    inside = sum(c.times * c.seconds for c in traffic if c.place != "step") / m
    inside -= _hidden_by_shared_expert(plan, stage, traffic, cluster)
    after = _exposed_after(plan, traffic, compute)
    vp_stages = model.virtual_pipeline_model_parallel_size or 1
    bubble = (model.pipeline_model_parallel_size - 1) / vp_stages * (compute + inside)
    memory = stage_memory(plan, stage)
    optimizer = _optimizer_bytes(memory) / gpu.memory_bandwidth
    return StepTime(m * compute, m * inside + after, bubble, optimizer)


def micro_batch_seconds(plan: Plan, stage: int, cluster: Cluster) -> float:
    """Return the seconds of one micro-batch on a stage, both passes, without communication."""
    model = plan.model
    seconds = 0.0
    layers = plan.layers(stage)
    for is_moe in set(layers):
        seconds += layers.count(is_moe) * _layer_seconds(plan, is_moe, cluster)
    if stage == len(plan.chunks) - 1:
        heads = 1 + (model.mtp_num_layers or 0)
        macs = heads * model.padded_vocab_size * model.hidden_size * plan.own_tokens
        seconds += 6 * macs / (cluster.gpu.flops * MATRIX_EFFICIENCY)
        logits = heads * plan.own_tokens * model.padded_vocab_size * 4
        seconds += _TOUCHES * logits / cluster.gpu.memory_bandwidth
    return seconds


def _layer_seconds(plan: Plan, is_moe: bool, cluster: Cluster) -> float:
    model, gpu = plan.model, cluster.gpu
    routed = _routed_seconds(plan, cluster) * model.coe_iterations if is_moe else 0.0
    macs = flops.layer_work(model, is_moe).macs
    if is_moe:
        macs -= model.coe_iterations * model.moe_router_topk * _expert(plan)
    dense = 2 * macs * plan.own_tokens / (gpu.flops * MATRIX_EFFICIENCY)
    core: float = 2 * flops.attention_core_macs(model, model.seq_length) * plan.own_tokens
    core /= gpu.flops * ATTENTION_EFFICIENCY
    saved = layer_activations(plan, is_moe)
    moved = (_TOUCHES * saved.saved + (_TOUCHES + 2) * saved.recomputed) / gpu.memory_bandwidth
    passes = 3.0  # a backward pass is twice a forward pass
    routed_passes = passes
    if model.recompute_granularity == "full":
        passes = routed_passes = 4.0
    elif plan.recomputes("moe"):
        routed_passes = 4.0
    return passes * (dense + core) + routed_passes * routed + moved


def _routed_seconds(plan: Plan, cluster: Cluster) -> float:
    """Return the seconds of a forward pass through a rank's experts.

    They multiply, or their weights are read, whichever is slower.
    """
    model, gpu = plan.model, cluster.gpu
    experts = model.num_moe_experts // model.expert_model_parallel_size
    rows = plan.routed_rows + experts * TILE_ROWS / 2
    weights = _expert(plan) // plan.layout.expert_tp
    multiply = 2 * rows * weights / (gpu.flops * MATRIX_EFFICIENCY)
    return max(multiply, experts * weights * plan.element_size / gpu.memory_bandwidth)


def _expert(plan: Plan) -> int:
    return flops.ffn_params(plan.model, plan.model.moe_ffn_hidden_size)


def _hidden_by_shared_expert(
    plan: Plan, stage: int, traffic: list[Collective], cluster: Cluster
) -> float:
    """Return the seconds of dispatch and combine hidden by the shared expert."""
    model = plan.model
    if not model.moe_shared_expert_overlap or not model.moe_shared_expert_intermediate_size:
        return 0.0
    iterations = sum(plan.layers(stage)) * model.coe_iterations
    shared = flops.ffn_params(model, model.moe_shared_expert_intermediate_size)
    work = 6 * shared * plan.own_tokens * iterations
    dispatch_combine = sum(c.times * c.seconds for c in traffic if c.group == "EP")
    return min(
        work / (cluster.gpu.flops * MATRIX_EFFICIENCY), dispatch_combine / plan.num_microbatches
    )


def _exposed_after(plan: Plan, traffic: list[Collective], micro_batch: float) -> float:
    """Return the exposed seconds of the collectives that a step has once."""
    gradients = sum(c.seconds for c in traffic if c.place == "step" and "gradients" in c.name)
    weights = sum(c.seconds for c in traffic if c.place == "step" and "weights" in c.name)
    backward, forward = micro_batch * 2 / 3, micro_batch / 3
    if plan.overlap_grad_reduce:
        gradients = max(0.0, gradients - backward)
    if plan.overlap_param_gather:
        weights = max(0.0, weights - forward)
    return gradients + weights


def _optimizer_bytes(memory: Memory) -> int:
    """Count the state read and written, gradients read (norm and update) and weights written."""
    return 2 * memory.optimizer + 2 * memory.gradients + memory.weights
