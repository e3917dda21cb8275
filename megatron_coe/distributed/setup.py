"""What a run needs before its first step: processes, seeds, model, optimizer and schedule."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from megatron_coe.config.run_config import (
    ParallelSettings,
    Settings,
    TrainSettings,
    warmup_steps,
)
from megatron_coe.megatron_compat.patches import complete_adam_state
from megatron_coe.megatron_compat.recompute import prepare_recompute
from megatron_coe.megatron_compat.versions import forget_balance_losses
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.model.weight_init import initialize_weights, undrawn_weights

MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    provider: CoEModelProvider
    chunks: list[DistributedDataParallel]
    """This pipeline stage's part of the model: one chunk, or several under interleaving."""
    optimizer: MegatronOptimizer | None
    """None, as the schedule, where the model is only evaluated."""
    schedule: OptimizerParamScheduler | None


def world_size() -> int:
    """Number of processes of this run, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rendezvous() -> dist.Store:
    """Where the ranks of this run find one another: torchrun's; one in memory without it."""
    if "WORLD_SIZE" not in os.environ:  # a single process needs no port
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    return store


@contextmanager
def lone_process() -> Iterator[None]:
    """Torch's process group of this process alone, whoever else there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def process_groups(
    parallel: ParallelSettings,
    device: torch.device,
    store: dist.Store | None = None,
    timeout: timedelta | None = None,
) -> Iterator[None]:
    """Torch's process group and Megatron's parallel groups, taken down at the end.

    Args:
        store: where the ranks meet; None: `rendezvous()`.
        timeout: of every collective; None: the defaults of torch and Megatron.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store or rendezvous(),
        rank=int(os.environ.get("RANK", "0")),
        world_size=world_size(),
        timeout=timeout,
    )
    try:
        with parallel_groups(parallel, timeout):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def parallel_groups(parallel: ParallelSettings, timeout: timedelta | None = None) -> Iterator[None]:
    """Megatron's parallel groups over the processes that there are, taken down at the end."""
    timeouts = {} if timeout is None else {"distributed_timeout_minutes": timeout / MINUTE}
    parallel_state.initialize_model_parallel(
        **timeouts,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    try:
        yield
    finally:
        # Megatron forgets most of its groups without ending them, and each keeps its threads.
        for group in parallel_state._global_process_group_list or []:
            if group is not None:  # None stands for all processes
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()


def use_deterministic_kernels() -> None:
    """On a GPU, sums of a fixed order in torch, cuBLAS and Transformer Engine (call it first)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True, warn_only=True)


def seed_everything(seed: int) -> None:
    """Seed all generators; pipeline stages differ, so that their dropout does.

    Initial weights depend on none of them: see `megatron_coe.model.weight_init`.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def build_train_state(
    provider: CoEModelProvider, settings: Settings, device: torch.device, trains: bool = True
) -> TrainState:
    """Build model, optimizer and schedule, wired to one another as Megatron's schedules expect.

    Args:
        trains: False: the model alone, to be evaluated.
    """
    chunks = build_model(provider, settings.parallel, device, settings.train.seed)
    if not trains:
        return TrainState(provider, chunks, None, None)
    optimizer = build_optimizer(provider, chunks, settings)
    connect_schedule(provider, settings.parallel, chunks)
    provider.grad_scale_func = optimizer.scale_loss
    return TrainState(provider, chunks, optimizer, build_schedule(optimizer, settings.train))


def connect_schedule(
    provider: CoEModelProvider, parallel: ParallelSettings, chunks: list[DistributedDataParallel]
) -> None:
    """Say how gradients are completed, where Megatron's forward-backward functions look for it."""
    provider.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        provider.no_sync_func = no_sync[0] if len(chunks) == 1 else no_sync


def build_model(
    provider: CoEModelProvider, parallel: ParallelSettings, device: torch.device, seed: int
) -> list[DistributedDataParallel]:
    """This rank's model chunks, on the device, in the run's precision, wrapped for DDP.

    Args:
        seed: of the initial weights, which are the same in every layout.
    """
    forget_balance_losses()  # of a model before this one
    prepare_recompute(provider)
    stages = parallel.virtual_pipeline_model_parallel_size
    with undrawn_weights(provider):
        modules = [provider.provide(vp_stage=vp) for vp in (range(stages) if stages else [None])]
    modules = [module.to(device) for module in modules]
    for module in modules:
        initialize_weights(module, seed)
    if provider.bf16:
        modules = [Float16Module(provider, module) for module in modules]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=provider.bf16,  # wider weights have gradients as wide
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    chunks = [
        DistributedDataParallel(
            config=provider,
            ddp_config=ddp_config,
            module=module,
            # Later chunks finish their backward first: only the first one's buckets can overlap.
            disable_bucketing=index > 0,
        )
        for index, module in enumerate(modules)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    return chunks


def build_optimizer(
    provider: CoEModelProvider, chunks: list[DistributedDataParallel], settings: Settings
) -> MegatronOptimizer:
    """AdamW over fp32 main weights."""
    train, parallel = settings.train, settings.parallel
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=provider.bf16,
        params_dtype=provider.params_dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # None leaves one-dimensional parameters and biases without decay; {} overrides nothing.
    overrides = {} if train.decay_all_parameters else None
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    fuse_update(optimizer)
    complete_state(optimizer)
    return optimizer


def fuse_update(optimizer: MegatronOptimizer) -> None:
    """Have torch's AdamW, which Megatron takes without Transformer Engine or Apex, update in one
    pass over memory instead of ten."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for options in (part.optimizer.defaults, *part.optimizer.param_groups):
                options["fused"] = True


def complete_state(optimizer: MegatronOptimizer) -> None:
    """Give each parameter of torch's AdamW all its state, and a step count of its own.

    Torch makes the state at the first step, before which Megatron's optimizers can be neither saved
    nor loaded (`megatron_compat.patches` has more). Transformer Engine's needs nothing.
    """
    for part in optimizer.chained_optimizers:
        complete_adam_state(part.optimizer)


def build_schedule(optimizer: MegatronOptimizer, train: TrainSettings) -> OptimizerParamScheduler:
    """Learning rate over steps: linear warm-up from 0, then constant, linear or cosine decay."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup_steps(train),
        lr_decay_steps=train.steps,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
    )
