"""The processes of a run: where they meet, torch's process group and Megatron's parallel groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_coe.config.run_config import ParallelSettings
from megatron_coe.config.validation import world_size

MINUTE = timedelta(minutes=1)


def rendezvous() -> dist.Store:
    """Return the store where the ranks meet: torchrun's, or one in memory without it."""
    if "WORLD_SIZE" not in os.environ:  # a single process needs no port
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    return store


@contextmanager
def lone_process(backend: str = "gloo") -> Iterator[None]:
    """Enter a process group of torch that has this process as its only rank."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
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
    """Enter torch's process group and Megatron's parallel groups; they are destroyed at the end.

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
    """Enter Megatron's parallel groups over all processes; they are destroyed at the end."""
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
