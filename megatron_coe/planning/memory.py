"""Memory of a rank: weights, gradients and optimizer exactly, activations kernel by kernel."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_coe.model import flops
from megatron_coe.planning.activations import loss_workspace, stage_activations
from megatron_coe.planning.plan import Plan

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass saves for the backward pass, at its peak."""
    workspace: int = 0
    """Logits on their way to the loss, and their gradient on its way back."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def stage_params(plan: Plan, stage: int) -> tuple[int, int]:
    """Count the parameters (outside the routed experts, in them) of a rank of a pipeline stage.

    Counted for the `torch` backend; Transformer Engine's keeps MLA's down projections whole on each
    tensor-parallel rank.
    """
    model = plan.model
    work = flops.layers_work(model, [layer for chunk in plan.chunks[stage] for layer in chunk])
    table = flops.MatrixWork(model.padded_vocab_size * model.hidden_size)
    first, last = stage == 0, stage == model.pipeline_model_parallel_size - 1
    if first:
        work += table
    if last:
        work += flops.mtp_work(model)
        norm = flops.norm_params(model, model.hidden_size)
        work += flops.MatrixWork(norm, replicated=norm)
        if not first and model.mtp_num_layers:
            work += table  # the embedding again, for the tokens that MTP looks ahead at
        if not model.share_embeddings_and_output_weights:
            work += table
        elif not first and not model.mtp_num_layers:
            work += table  # a copy of the tied table
    experts = work.routed // (plan.layout.expert_tp * model.expert_model_parallel_size)
    divided = (work.stored - work.routed - work.replicated) // model.tensor_model_parallel_size
    return divided + work.replicated, experts


def stage_memory(plan: Plan, stage: int) -> Memory:
    """Estimate the memory of a rank of a pipeline stage."""
    dense, expert = stage_params(plan, stage)
    # Adam's two moments in fp32, and fp32 main weights beside 16-bit ones.
    state = 8 if plan.element_size == 4 else 12
    if plan.use_distributed_optimizer:
        optimizer = (
            state * dense // plan.dense_data_parallel_size
            + state * expert // plan.expert_data_parallel_size
        )
    else:
        optimizer = state * (dense + expert)
    is_last = stage == plan.model.pipeline_model_parallel_size - 1
    return Memory(
        weights=(dense + expert) * plan.element_size,
        gradients=(dense + expert) * 4,  # reduced and summed over micro-batches in fp32
        optimizer=optimizer,
        activations=stage_activations(plan, stage),
        workspace=loss_workspace(plan) * is_last,
    )


def peak_memory_stage(plan: Plan) -> int:
    """Return the pipeline stage whose ranks need most memory."""
    return max(plan.distinct_stages, key=lambda stage: stage_memory(plan, stage).total)


def rank_memory(plan: Plan) -> Memory:
    """Estimate the memory of a rank of the peak-memory stage."""
    stages = (stage_memory(plan, stage) for stage in plan.distinct_stages)
    return max(stages, key=lambda memory: memory.total)
