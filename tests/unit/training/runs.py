"""Small runs in one process, on sequences made up on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import Subset

from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.state import Progress
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.distributed.train_state import build_train_state
from megatron_coe.fault_tolerance.heartbeat import Heartbeat
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.metrics_logger import NullLogger
from megatron_coe.training.optimizer_step import OneSyncOptimizerStep
from megatron_coe.training.profiling import StepProfiler
from megatron_coe.training.trainer import Trainer, last_step
from megatron_coe.training.validation import HeldOutSet, Validator
from tests.builders import BALANCE_COEFF, TINY

SEQ_LENGTH = 12
MODEL = {
    **TINY,
    "seq_length": SEQ_LENGTH,
    "coe_iterations": 2,
    "multi_latent_attention": True,
    "moe_aux_loss_coeff": BALANCE_COEFF,
}


class Sequences:
    """Endless random sequences, each a function of its number, padded to different lengths."""

    def __init__(self, seed: int, empty: frozenset[int] = frozenset()) -> None:
        self.seed = seed
        self.empty = empty

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        ids = torch.randint(MODEL["vocab_size"], (SEQ_LENGTH + 1,), generator=generator)
        valid = int(torch.randint(1, SEQ_LENGTH + 1, (), generator=generator))
        mask = (torch.arange(SEQ_LENGTH) < (0 if number in self.empty else valid)).float()
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(SEQ_LENGTH),
        }


def make_settings(folder: object = None, **sections: Mapping[str, Any]) -> Settings:
    """A run of the tiny model; `train={...}` and so on set fields of a section."""
    settings = Settings(model=dict(MODEL))
    settings.train.steps, settings.train.global_batch_size = 20, 4
    settings.train.lr = 1e-2
    settings.checkpoint.save = None if folder is None else str(folder)
    settings.model |= sections.pop("model", {})
    for section, values in sections.items():
        for name, value in values.items():
            assert hasattr(getattr(settings, section), name), name
            setattr(getattr(settings, section), name, value)
    return settings


def make_trainer(
    settings: Settings,
    device: torch.device,
    sequences: object | None = None,
    held_out: int | dict[str, int] = 0,
    metrics_logger: NullLogger | None = None,
) -> Trainer:
    """A trainer at step 0, freshly initialized; `held_out`: sequences of one set, or by name."""
    seed_everything(settings.train.seed)
    train_state = build_train_state(
        build_provider(settings, device), settings.parallel, settings.train, device
    )
    micro = settings.train.micro_batch_size
    rank = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    source = BatchSource(sequences or Sequences(1), micro, rank, replicas, device)
    heartbeat, validator = Heartbeat(), None
    if held_out:
        sizes = held_out if isinstance(held_out, dict) else {"": held_out}
        subsets = [Subset(Sequences(2 + n), range(size)) for n, size in enumerate(sizes.values())]
        sets = {
            name: HeldOutSet(BatchSource(subset, micro, rank, replicas, device), len(subset))
            for name, subset in zip(sizes, subsets, strict=True)
        }
        validator = Validator(settings.train, train_state, sets, heartbeat)
    return Trainer(
        settings=settings.train,
        train_state=train_state,
        source=source,
        validator=validator,
        progress=Progress(),
        metrics_logger=metrics_logger or NullLogger(settings.log, last_step(settings.train)),
        checkpointer=Checkpointer(settings.checkpoint, settings.to_yaml()),
        profiler=StepProfiler(settings.log, enabled=False),
        heartbeat=heartbeat,
    )


def with_one_sync(trainer: Trainer) -> Trainer:
    """Give a trainer on a CPU the update that a GPU has; returns it."""
    step = trainer.train_step
    step.update = OneSyncOptimizerStep(trainer.train_state)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of every parameter, by name."""
    return {
        name: parameter.detach().clone()
        for chunk in trainer.train_state.chunks
        for name, parameter in chunk.named_parameters()
    }
