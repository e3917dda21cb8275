"""Memory of a rank: weights, gradients and optimizer exactly, activations kernel by kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_coe.hf.weight_names import Weight
from megatron_coe.model import flops
from megatron_coe.model.freezing import frozen_weights
from megatron_coe.model.matrices import matrix_weights
from megatron_coe.planning.activations import loss_workspace, stage_activations
from megatron_coe.planning.plan import Plan

GIB = 1 << 30

_REPLICATED = ("norm", ".router.", ".coe_weights.")
"""Parts of the names of weights that each tensor-parallel rank holds whole."""


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


def trainable_params(plan: Plan, stage: int) -> tuple[int, int]:
    """Count those of `stage_params` that are trained: each has a gradient and optimizer state."""
    dense, expert = stage_params(plan, stage)
    frozen = _held(plan, stage, frozen_weights(plan.model, plan.freeze) if plan.freeze else [])
    return dense - frozen[0], expert - frozen[1]


def _held(plan: Plan, stage: int, chosen: Iterable[Weight]) -> tuple[int, int]:
    """Count the parameters, as `stage_params` does, that a rank holds of some weights."""
    dense = expert = 0
    model, last = plan.model, plan.model.pipeline_model_parallel_size - 1
    for weight in chosen:
        name = weight.keys[0]
        if weight.layer is not None:
            is_here = weight.layer in plan.layer_numbers[stage]
        else:
            is_here = stage == (0 if name.startswith("embedding.") else last)
        if not is_here:
            continue
        size = sum(math.prod(shape) for shape in weight.parts.values())
        if weight.padded:
            size = model.padded_vocab_size * model.hidden_size
        if weight.experts:
            expert += size // (plan.layout.expert_tp * model.expert_model_parallel_size)
        elif any(part in name for part in _REPLICATED):
            dense += size
        else:
            dense += size // model.tensor_model_parallel_size
    return dense, expert


def stage_memory(plan: Plan, stage: int) -> Memory:
    """Estimate the memory of a rank of a pipeline stage."""
    dense, expert = stage_params(plan, stage)
    trained_dense, trained_expert = trainable_params(plan, stage)
    # Adam's two moments in fp32, and fp32 main weights beside 16-bit ones.
    state = 8 if plan.element_size == 4 else 12
    if plan.use_distributed_optimizer:
        optimizer = (
            state * trained_dense // plan.dense_data_parallel_size
            + state * trained_expert // plan.expert_data_parallel_size
        )
    else:
        optimizer = state * (trained_dense + trained_expert)
    if plan.optimizer == "muon":  # one moment of matrices
        optimizer -= 4 * sum(_held(plan, stage, matrix_weights(plan.model, plan.freeze).values()))
    if plan.averages:  # in fp32, whole on each rank
        optimizer += 4 * (trained_dense + trained_expert)
    is_last = stage == plan.model.pipeline_model_parallel_size - 1
    return Memory(
        weights=(dense + expert) * plan.element_size,
        # Reduced and summed over micro-batches in fp32.
        gradients=(trained_dense + trained_expert) * 4,
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
