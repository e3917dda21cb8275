"""`TrainState`: a rank's model, optimizer and schedule, wired as Megatron's schedules expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from torch.nn import Parameter

from megatron_coe.config.run_config import ParallelSettings, TrainSettings
from megatron_coe.distributed.lr_schedule import LRSchedule
from megatron_coe.distributed.muon import Muon, get_muon_optimizer
from megatron_coe.distributed.weight_average import WeightAverage
from megatron_coe.megatron_compat.patches import complete_adam_state
from megatron_coe.megatron_compat.recompute import prepare_recompute
from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.model.freezing import freeze
from megatron_coe.model.learning_rates import lr_factors
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.model.weight_init import initialize_weights, undrawn_weights


@dataclass(frozen=True)
class TrainState:
    """The model, optimizer and schedule that a step updates."""

    provider: CoEModelProvider
    chunks: list[DistributedDataParallel]
    """This pipeline stage's part of the model: one chunk, or several under interleaving."""
    optimizer: MegatronOptimizer | None
    """None, as the schedule, where the model is only evaluated."""
    schedule: LRSchedule | None
    average: WeightAverage | None = None
    """The moving average of the weights, where `train.ema_decay` asks for one."""


def build_train_state(
    provider: CoEModelProvider,
    parallel: ParallelSettings,
    train: TrainSettings,
    device: torch.device,
    trains: bool = True,
) -> TrainState:
    """Build model, optimizer and schedule, wired to one another as Megatron's schedules expect.

    Args:
        trains: False: the model alone, to be evaluated.
    """
    chunks = build_model(provider, parallel, device, train.seed, train.freeze)
    average = None if train.ema_decay is None else WeightAverage(chunks, train.ema_decay)
    if not trains:
        return TrainState(provider, chunks, None, None, average)
    optimizer = build_optimizer(provider, chunks, parallel, train)
    connect_schedule(provider, parallel, chunks)
    return TrainState(provider, chunks, optimizer, LRSchedule(optimizer, train), average)


def connect_schedule(
    provider: CoEModelProvider, parallel: ParallelSettings, chunks: list[DistributedDataParallel]
) -> None:
    """Set in the config how Megatron's forward-backward functions reduce gradients."""
    provider.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        provider.no_sync_func = no_sync[0] if len(chunks) == 1 else no_sync


def build_model(
    provider: CoEModelProvider,
    parallel: ParallelSettings,
    device: torch.device,
    seed: int,
    frozen: Sequence[str] = (),
) -> list[DistributedDataParallel]:
    """Build this rank's model chunks on the device, in the run's precision, wrapped for DDP.

    Args:
        seed: of the initial weights, which are the same in every layout.
        frozen: patterns of the parameters that are not trained (`model.freezing`).
    """
    clear_aux_losses()  # of a model before this one
    prepare_recompute(provider)
    stages = parallel.virtual_pipeline_model_parallel_size
    with undrawn_weights(provider):
        modules = [provider.provide(vp_stage=vp) for vp in (range(stages) if stages else [None])]
    modules = [module.to(device) for module in modules]
    for module in modules:
        initialize_weights(module, seed)
        look_up_embeddings(module)
        freeze(module, frozen)
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


def look_up_embeddings(model: torch.nn.Module) -> None:
    """Let Megatron's embedding use `F.embedding` in deterministic mode, too.

    Its gradient sorts the tokens and sums in a fixed order, without atomics. Megatron takes it for
    one that is not deterministic, and indexes the weight: the gradient of that adds up all rows of
    a token one after the other, and half of a batch may be padding.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.deterministic_mode = False


def build_optimizer(
    provider: CoEModelProvider,
    chunks: list[DistributedDataParallel],
    parallel: ParallelSettings,
    train: TrainSettings,
) -> MegatronOptimizer:
    """Build AdamW over fp32 main weights, with `train.optimizer=muon` Muon beside it."""
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
    # The standard leaves one-dimensional parameters and biases without decay.
    standard: dict[ParamKey, Any] = get_standard_config_overrides(config)
    overrides = ({} if train.decay_all_parameters else standard) | lr_overrides(chunks, train)
    if train.optimizer == "muon":
        optimizer = get_muon_optimizer(config, chunks, overrides, train)
    else:
        optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    fuse_update(optimizer)
    complete_state(optimizer)
    return optimizer


def lr_overrides(
    chunks: list[DistributedDataParallel], train: TrainSettings
) -> dict[ParamKey, Any]:
    """Return Megatron's overrides for the weights that `train.lr_mult` multiplies the rate of.

    Their whole schedule is scaled, and with it the decoupled weight decay.
    """
    factors = {
        parameter: factor
        for model in unwrap_model(chunks)
        for parameter, factor in lr_factors(model, train.lr_mult).items()
    }
    return {
        ParamKey(
            predicate=ParamPredicate(f"lr_mult {factor}", partial(_has_factor, factors, factor))
        ): {"lr_mult": factor, "max_lr": train.lr * factor, "min_lr": train.min_lr * factor}
        for factor in sorted({*train.lr_mult.values()} - {1.0})
    }


def _has_factor(factors: dict[Parameter, float], factor: float, parameter: Parameter) -> bool:
    return factors[parameter] == factor


def fuse_update(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW update in one pass over memory instead of ten.

    Megatron takes it where there is neither Transformer Engine nor Apex.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for options in (part.optimizer.defaults, *part.optimizer.param_groups):
                options["fused"] = True


def complete_state(optimizer: MegatronOptimizer) -> None:
    """Complete the state of Muon, and of torch's AdamW with a step count for each parameter.

    Torch makes the state at the first step, before which Megatron's optimizers can be neither saved
    nor loaded (`megatron_compat.patches` has more). Transformer Engine's needs nothing.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, Muon):
            part.optimizer.complete_state()
        complete_adam_state(part.optimizer)
