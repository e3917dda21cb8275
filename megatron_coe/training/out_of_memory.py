"""The message of a run whose device is out of memory: where, and which settings take less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_coe.config.run_config import ParallelSettings, TrainSettings
from megatron_coe.config.validation import world_size
from megatron_coe.fault_tolerance.exceptions import DeviceMemoryError
from megatron_coe.fault_tolerance.heartbeat import Heartbeat
from megatron_coe.model.parallelism import layout_of
from megatron_coe.planning.layout_search import RECOMPUTE

_SIGNS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ADVICE = " If reserved but unallocated memory"  # torch's own, about fragmentation


@contextmanager
def explained(heartbeat: Heartbeat, remedies: Sequence[str]) -> Iterator[None]:
    """Raise DeviceMemoryError, with the remedies, for torch's error that a device is full."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        message = " ".join(str(error).partition(_ADVICE)[0].split())
        raise DeviceMemoryError(
            f"out of memory in {heartbeat}: {message.rstrip('.')}. What takes less: "
            + "; ".join(remedies)
        ) from error


def memory_remedies(
    model: Mapping[str, Any], parallel: ParallelSettings, train: TrainSettings
) -> list[str]:
    """List settings that lower the memory of a rank, if not yet set, the cheapest first."""
    found = []
    if train.micro_batch_size > 1:
        found.append(f"train.micro_batch_size={train.micro_batch_size // 2}, with the same result")
    replicas = layout_of(parallel).data_parallel_size(world_size())
    if not parallel.use_distributed_optimizer and replicas > 1:
        found.append("parallel.use_distributed_optimizer=true")
    stronger = {None: ("moe_act", "full"), "selective": ("full",)}
    for name in stronger.get(model.get("recompute_granularity"), ()):
        found.append(
            " ".join(f"model.{key}={_text(value)}" for key, value in RECOMPUTE[name].items())
        )
    found.append(
        "more ranks to a replica (coe plan ranks the layouts of a number of GPUs by memory "
        "and time)"
    )
    found.append("a shorter model.seq_length")
    return found


def _text(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
