"""One process set up for Megatron: what a script, a notebook or a test needs around a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_coe.config.run_config import ParallelSettings
from megatron_coe.distributed.process_groups import lone_process, parallel_groups
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.model.backends import prepare


@contextmanager
def single_process(seed: int = 42) -> Iterator[torch.device]:
    """Set up this process as the only rank: device, process groups and seed.

        with megatron_coe.single_process(seed=42) as device:
            model = provider.provide().to(device)

    No port is opened and no environment variable of a launcher is read, but for `LOCAL_RANK`, which
    picks the GPU. The groups are destroyed at the end.

    Yields:
        The device for the model and the data.

    Raises:
        ValueError: as `megatron_coe.model.backends.prepare`; or there is a process group already.
    """
    device = prepare()
    backend = "nccl" if device.type == "cuda" else "gloo"
    with lone_process(backend), parallel_groups(ParallelSettings()):
        seed_everything(seed)
        yield device
