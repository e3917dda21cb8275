"""Training steps as variants: the `Trainer` of `coe train`, on random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import Dataset

from benchmarks.phases import GRADIENT_BUFFERS, Target, targets
from benchmarks.timing import Lap, Variant
from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.state import Progress
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.distributed.train_state import build_train_state
from megatron_coe.fault_tolerance.heartbeat import Heartbeat
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.metrics_logger import NullLogger
from megatron_coe.training.profiling import StepProfiler
from megatron_coe.training.trainer import Trainer, last_step

PARTS = GRADIENTS, OPTIMIZER = "gradients", "optimizer"
"""The two parts of a step: forward and backward; and the optimizer step with its clipping."""


class RandomTokens(Dataset):
    """Sequences of uniformly random ids, each a function of its number, without padding."""

    def __init__(self, provider: CoEModelProvider, seed: int = 0) -> None:
        self.vocab_size, self.seq_length = provider.vocab_size, provider.seq_length
        self.seed = seed

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        ids = torch.randint(self.vocab_size, (self.seq_length + 1,), generator=generator)
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


@dataclass(frozen=True)
class StepVariant:
    """A model in training, and its step as a variant."""

    name: str
    trainer: Trainer
    provider: CoEModelProvider
    tokens: int

    @property
    def model(self) -> torch.nn.Module:
        """The first model chunk, as it is wrapped for data parallelism."""
        return self.trainer.train_state.chunks[0]

    def calls(self) -> list[Target]:
        """Return the calls of a step that are phases."""
        train_state = self.trainer.train_state
        calls = list(targets(self.model))
        calls += [(self.trainer.train_step.update, "run", "optimizer")]
        calls += [(chunk, "zero_grad_buffer", GRADIENT_BUFFERS) for chunk in train_state.chunks]
        return [*calls, (self.provider, "finalize_model_grads_func", GRADIENT_BUFFERS)]

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward; the optimizer step is not counted, as is usual."""
        return self.tokens * self.provider.flops_per_token(self.provider.seq_length)

    def variant(self) -> Variant:
        """Return the step as a variant; its second part begins where the optimizer is called."""
        return Variant(self.name, self._run, flops=self.flops, tokens=self.tokens)

    def _run(self, lap: Lap) -> None:
        optimizer: Any = self.trainer.train_state.optimizer
        prepare = optimizer.prepare_grads  # Megatron's first call of every update

        def prepare_grads() -> bool:
            lap(GRADIENTS)
            return prepare()

        optimizer.prepare_grads = prepare_grads  # on this object only, while its step is timed
        try:
            self.trainer.step()
        finally:
            del optimizer.prepare_grads
        lap(OPTIMIZER)


def build_step(name: str, settings: Settings, device: torch.device) -> StepVariant:
    """Build a freshly initialized model in training; Megatron's process groups must exist."""
    seed_everything(settings.train.seed)
    provider = build_provider(settings, device)
    train_state = build_train_state(provider, settings.parallel, settings.train, device)
    source = BatchSource(
        RandomTokens(provider),
        settings.train.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        device,
    )
    trainer = Trainer(
        settings=settings.train,
        train_state=train_state,
        source=source,
        validator=None,
        progress=Progress(),
        metrics_logger=NullLogger(settings.log, last_step(settings.train)),
        checkpointer=Checkpointer(settings.checkpoint, settings.to_yaml()),
        profiler=StepProfiler(settings.log, enabled=False),
        heartbeat=Heartbeat(),
    )
    ranks = parallel_state.get_data_parallel_world_size()
    tokens = settings.train.global_batch_size * provider.seq_length // ranks
    return StepVariant(name, trainer, provider, tokens)


def share_memory(variants: Sequence[StepVariant]) -> None:
    """Let variants train the same fp32 weights with the same moments, where names and shapes agree.

    Only the gradient buffers remain each variant's own; what is learned does not matter.
    """
    first, *others = variants
    known = dict(first.model.named_parameters())
    moments = _adam_state(first)
    for variant in others:
        state = _adam_state(variant)
        for name, parameter in variant.model.named_parameters():
            same = known.get(name)
            if same is None or same.shape != parameter.shape or parameter not in state:
                continue
            parameter.data = same.data
            for moment in ("exp_avg", "exp_avg_sq"):
                state[parameter][moment] = moments[same][moment]


def _adam_state(variant: StepVariant) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the state of each parameter that the optimizer updates without an fp32 copy."""
    optimizer: Any = variant.trainer.train_state.optimizer
    parts = optimizer.chained_optimizers
    return {parameter: state for part in parts for parameter, state in part.optimizer.state.items()}
