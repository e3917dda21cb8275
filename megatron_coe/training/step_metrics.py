"""Metrics of a training step; `docs/metrics.md` defines every one."""

from __future__ import annotations

import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import mean, median

import torch
import torch.distributed as dist

from megatron_coe.distributed.train_state import TrainState
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.moe.aux_loss import collect_aux_losses
from megatron_coe.model.moe.load_stats import load_stats
from megatron_coe.model.moe.routing_stats import RoutingStats
from megatron_coe.planning.hardware import peak_flops
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.straggler import CollectiveTimer
from megatron_coe.utils.metrics_file import Record


@dataclass(frozen=True)
class StepMetrics:
    """The outcome of a training step."""

    loss: float
    """Per valid token of the global batch."""
    lr: float
    grad_norm: float
    grad_norms: Mapping[str, float]
    """Of each group of parameters."""
    seconds: float
    batch_size: int
    """Sequences of the global batch."""
    skipped: str | None = None
    """Why nothing was updated."""


class MetricsCollector:
    """Collects the metrics of a training step, the same on every rank.

    Construction is a collective.

    Args:
        source: the training sequences.
    """

    def __init__(self, train_state: TrainState, source: BatchSource) -> None:
        self._provider, self._source, self._device = train_state.provider, source, source.device
        self._routing_stats = RoutingStats(self._provider, train_state.chunks, self._device)
        self._is_counted = self._is_timed = False
        self._collectives = CollectiveTimer(self._device)
        self.hosts = [""] * dist.get_world_size()
        """The machine of each rank."""
        dist.all_gather_object(self.hosts, socket.gethostname())

    def timing(self, enabled: bool) -> AbstractContextManager[None]:
        """Measure the collectives of a step, from begin to end, if it is logged."""
        self._is_timed = enabled
        return self._collectives.timing() if enabled else nullcontext()

    def watching(self, enabled: bool) -> AbstractContextManager[None]:
        """Count routing within the forward and backward passes of a step, if it is logged."""
        self._is_counted = enabled
        return self._routing_stats.counting() if enabled else nullcontext()

    def read(self, step: StepMetrics) -> Record:
        """Return the record of the latest step, which has updated the weights. A collective."""
        record = {"train_loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}
        record |= {f"grad_norm/{group}": norm for group, norm in step.grad_norms.items()}
        record["global_batch_size"] = step.batch_size
        record |= self._speed(step.batch_size * self._provider.seq_length, step.seconds)
        record |= self._of_ranks(step.seconds)
        balance = collect_aux_losses(
            self._provider, self._source.num_microbatches(step.batch_size), self._device
        )
        layers = coe_layers(self._provider)
        for loss, value_CL in balance.items():
            record |= _by_layer(f"balance/{loss}", value_CL.T[layers].tolist(), layers)
        if self._is_counted:
            record |= routing_metrics(self._routing_stats.collect(), self._provider)
        return record

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return the speed of all ranks together; MFU is per device, of its peak."""
        flops = tokens * self._provider.flops_per_token(self._provider.seq_length)
        record = {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
        }
        if self._device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self._device))
            if peak is not None:
                record["mfu"] = flops / seconds / (peak * dist.get_world_size())
        return record

    def _of_ranks(self, seconds: float) -> dict[str, float]:
        """Return the metrics of the rank that has most of something. A collective."""
        work_s = seconds - self._collectives.seconds() if self._is_timed else 0.0
        rows = torch.zeros(len(self.hosts), 2, dtype=torch.float64, device=self._device)
        rows[dist.get_rank()] = torch.tensor([memory_peak(self._device), work_s])
        dist.all_reduce(rows)
        peaks, works_s = rows.T.tolist()
        record: dict[str, float] = {"memory_peak_bytes": int(max(peaks))}
        if self._is_timed:
            slowest_s = max(works_s)
            record |= {"work_seconds": slowest_s, "work_seconds_median": median(works_s)}
            record["slowest_rank"] = works_s.index(slowest_s)
        return record


def routing_metrics(table_LCN1: torch.Tensor, config: CoEConfig) -> Record:
    """Compute loads, their balance and top-k probability mass from collected `RoutingStats`."""
    layers = coe_layers(config)
    counts_LCN = table_LCN1[layers, :, :-1].numpy()
    tokens_LC = counts_LCN.sum(axis=-1) / config.moe_router_topk
    used_LC = [[load_stats(counts_N) for counts_N in counts_CN] for counts_CN in counts_LCN]
    record: Record = {
        f"load/iteration_{t}/layer_{layer + 1}": (counts / counts.sum()).round(6).tolist()
        for layer, counts_CN in zip(layers, counts_LCN, strict=True)
        for t, counts in enumerate(counts_CN, start=1)
    }
    for name, field in (
        ("load_entropy", "entropy"),
        ("load_max_over_mean", "max_over_mean"),
        ("dead_experts", "dead"),
    ):
        values_LC = [[getattr(used, field) for used in used_C] for used_C in used_LC]
        record |= _by_layer(name, values_LC, layers)
    confidence_LC = table_LCN1[layers, :, -1].numpy() / tokens_LC
    return record | _by_layer("router_confidence", confidence_LC.tolist(), layers)


def coe_layers(config: CoEConfig) -> list[int]:
    """Return the indices of the CoE layers, from 0; those of MTP follow the decoder's."""
    pattern = [*config.moe_layer_pattern]
    pattern += pattern[-1:] * (config.mtp_num_layers or 0)
    return [layer for layer, is_moe in enumerate(pattern) if is_moe]


def _by_layer(name: str, values_LC: list[list[float]], layers: list[int]) -> dict[str, float]:
    """Name a metric of each iteration: its mean over the CoE layers, then layer by layer."""
    record = {}
    for t, values_L in enumerate(zip(*values_LC, strict=True), start=1):
        record[f"{name}/iteration_{t}"] = mean(values_L)
        for layer, value in zip(layers, values_L, strict=True):
            record[f"{name}/iteration_{t}/layer_{layer + 1}"] = value
    return record


def memory_peak(device: torch.device) -> int:
    """Return the peak memory of this rank, in bytes.

    On a GPU it is what torch had allocated at most since the last call, on a CPU the most that the
    process ever held resident.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
