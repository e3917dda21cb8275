"""Planned sizes of an experiment's models, and an estimate of the machine's speed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from megatron_coe.analysis.run_jobs import server
from megatron_coe.config.run_config import Settings

_EFFICIENCY = 1 / 3
"""Rate of training as a share of a large matrix product's: for estimates of time alone."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model in training, on one rank."""

    params: int
    active_params: int
    flops_per_token: int
    tokens: int
    """Of all steps."""
    state: int
    """Bytes of weights, gradients and optimizer state."""
    memory: int
    """Bytes with activations and workspace, as planned; tests/unit/planning/test_memory.py compares
    them with measured ones."""

    @property
    def flops(self) -> int:
        """FLOPs of the run."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Machine:
    """The capacity of the machine that runs are trained on."""

    jobs: int
    """Runs at a time: one on a GPU, one on each core otherwise."""
    speed: float
    """FLOP/s to expect of a run, roughly."""


def sizes_of(settings: dict[str, Settings], vocab_size: int) -> tuple[dict[str, Sizes], Machine]:
    """Compute the sizes of each variant, and measure the machine.

    Args:
        settings: of each variant.
        vocab_size: of the tokenizer, which need not exist yet.

    Raises:
        ValueError: a model is invalid, or has a smaller vocabulary.
    """
    with ProcessPoolExecutor(1, mp_context=server()) as pool:  # it has Megatron imported
        machine = pool.submit(_machine)
        sizes = {name: pool.submit(_sizes_of, own, vocab_size) for name, own in settings.items()}
        return {name: future.result() for name, future in sizes.items()}, machine.result()


def _sizes_of(settings: Settings, vocab_size: int) -> Sizes:
    import torch

    from megatron_coe.config.model_section import build_provider
    from megatron_coe.config.validation import check_layout
    from megatron_coe.planning.memory import rank_memory
    from megatron_coe.planning.run_summary import plan_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_layout(settings, world_size=1)
    provider = build_provider(settings, device, vocab_size)
    train = settings.train
    memory = rank_memory(
        plan_of(provider, settings.parallel, settings.train, 1, device.type == "cuda")
    )
    return Sizes(
        provider.num_params(),
        provider.num_active_params(),
        provider.flops_per_token(provider.seq_length),
        train.steps * train.global_batch_size * provider.seq_length,
        memory.weights + memory.gradients + memory.optimizer,
        memory.total,
    )


def _machine(size: int = 1024, rounds: int = 8) -> Machine:
    """Measure the machine by a large matrix product, on one thread or a GPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    size *= 8 if on_gpu else 1
    kind = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float32}
    a = torch.ones(size, size, **kind)
    times_s = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        times_s.append(time.perf_counter() - began_s)
    flops = 2 * size**3 / min(times_s)  # the round that other work has disturbed least
    return Machine(1 if on_gpu else len(os.sched_getaffinity(0)), _EFFICIENCY * flops)
