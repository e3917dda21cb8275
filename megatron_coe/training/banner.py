"""The summary of a run that is logged before its first step, and that of a dry run's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_coe import __version__
from megatron_coe.config.run_config import (
    DataSettings,
    ParallelSettings,
    TrainSettings,
    held_out_sets,
)
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.data.datasets import describe_split
from megatron_coe.data.indexed import IndexedFile, data_summary
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.model.backends.select import TE_PARTS, te_parts_of
from megatron_coe.model.moe.experts import grouped_gemm_of
from megatron_coe.model.parallelism import layout_of
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.memory import GIB, rank_memory
from megatron_coe.planning.plan import Plan
from megatron_coe.training.preflight import training_sets

_PACKAGES = ("megatron-core", "torch", "transformer-engine", "python")


def banner(
    parallel: ParallelSettings,
    train: TrainSettings,
    plan: Plan,
    machine: Mapping[str, object],
    data: str,
    start: str,
) -> str:
    """Describe a run in a few lines.

    Args:
        plan: model, layout and batch.
        machine: what `megatron_coe.utils.environment.write_machine` has found.
        data: what is read, in words.
        start: where the run begins, in words.
    """
    versions = ", ".join(f"{name} {machine[name]}" for name in _PACKAGES if name in machine)
    rows = {
        "device": _device(plan, machine),
        "layout": _layout(parallel, plan),
        "model": _model(plan),
        "batch": _batch(plan, train),
        "data": data,
        "run": start,
    }
    title = f"megatron_coe {__version__} (commit {machine['commit']}), {versions}"
    return "\n".join([title, *(f"  {name:<8}{text}" for name, text in rows.items())])


def _device(plan: Plan, machine: Mapping[str, Any]) -> str:
    precision = "bf16" if plan.model.bf16 else "fp32"
    needed = f"about {rank_memory(plan).total / GIB:.2f} GiB per rank"
    if "gpu" in machine:
        name = f"{machine['gpu']}, CUDA {machine['cuda']}"
        needed += f" of {machine['gpu_bytes'] / GIB:.1f}"
    else:
        name = f"CPU ({machine['processor']}, {machine['cores']} cores)"
    return f"{name}; {precision}, {_modules(plan.model)}; {needed}"


def _modules(model: CoEModelProvider) -> str:
    """Say who provides the parts of the model, and who multiplies in its grouped experts."""
    parts = te_parts_of(model)
    if parts == TE_PARTS:
        return "modules of Transformer Engine"
    modules = "modules of PyTorch"
    if parts:
        modules += f", {' and '.join(parts)} of Transformer Engine"
    if "experts" not in parts and model.moe_grouped_gemm:
        modules += f", experts by {grouped_gemm_of(model)}"
    return modules


def _layout(parallel: ParallelSettings, plan: Plan) -> str:
    layout = layout_of(parallel)
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "CP": layout.context_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "VPP": layout.virtual_pipeline_model_parallel_size,
        "EP": layout.expert_model_parallel_size,
        "ETP": layout.expert_tp,
    }
    named = [f"DP {plan.data_parallel}"]
    named += [f"{name} {size}" for name, size in sizes.items() if size and size > 1]
    options = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    named += [option for option in options if getattr(parallel, option)]
    return f"{plan.world_size} rank(s): {', '.join(named)}"


def _model(plan: Plan) -> str:
    model = plan.model
    shared = " and a shared one" if model.moe_shared_expert_intermediate_size else ""
    return (
        f"{model.num_layers} layers, {model.coe_iterations} iteration(s) of "
        f"{model.moe_router_topk} of {model.num_moe_experts} experts{shared}; "
        f"{model.num_params():,} parameters, at most {model.num_active_params():,} active per token"
    )


def _batch(plan: Plan, train: TrainSettings) -> str:
    length = plan.model.seq_length
    ramp = f"; ramped up from {batch_schedule(train)}" if train.rampup_batch_size else ""
    return (
        f"{plan.global_batch_size} sequences of {length:,} tokens: {plan.data_parallel} "
        f"replica(s) x {plan.num_microbatches} micro-batch(es) of {plan.micro_batch_size}; "
        f"{plan.global_batch_size * length:,} tokens per step{ramp}"
    )


def summarize_data(
    data: DataSettings,
    train: TrainSettings,
    files: Sequence[IndexedFile],
    per_epoch: float,
    held_out: Mapping[str, int],
) -> str:
    """Describe in a line what a run reads.

    Args:
        files: the training sets.
        per_epoch: training sequences in one epoch.
        held_out: validation sequences of each set.
    """
    documents, tokens = sum(f.documents for f in files), sum(f.tokens for f in files)
    epochs = batch_schedule(train).samples_after(train.steps) / per_epoch
    split = f", split {data.split}" if data.split else ""
    of_sets = ", ".join(f"{name} {count:,}" for name, count in held_out.items() if name)
    return (
        f"{len(files)} set(s), {documents:,} documents, {tokens:,} tokens, {data.mode}{split}; "
        f"{epochs:.2f} epochs in {train.steps:,} steps; "
        + (f"{sum(held_out.values()):,} sequences held out" if held_out else "no held-out set")
        + (f" ({of_sets})" if of_sets else "")
    )


def describe_data(
    data: DataSettings, train: TrainSettings, tokenizer: Tokenizer, files: Sequence[IndexedFile]
) -> Iterator[str]:
    """Describe tokenizer and data sets of a dry run, a line or a paragraph each.

    Args:
        files: the training sets.
    """
    yield f"tokenizer {data.tokenizer}: {tokenizer.vocab_size:,} ids"
    yield f"training data\n{data_summary(training_sets(data))}"
    if data.split:
        yield describe_split(files, data.mode, data.split)
    for name, prefixes in held_out_sets(data).items():
        yield f"validation data{name and f' {name}'}\n{data_summary(prefixes)}"
    batches = batch_schedule(train)
    yield (
        f"{batches.samples_after(train.steps):,} sequences in {train.steps:,} steps of {batches}, "
        f"mode {data.mode}"
    )
