"""GPUs and their networks, by their data sheets.

Sources: NVIDIA's data sheets "A100 Tensor Core GPU" (2021), "H100 Tensor Core GPU" (2023), "H200
Tensor Core GPU" (2024) and "DGX B200" (2024) for arithmetic without sparsity, memory and NVLink
(half of the bidirectional figure: one direction); the network of the DGX A100 (one 200 Gb/s
adapter for each GPU), DGX H100/H200 and DGX B200 (400 Gb/s each).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the links; bytes and seconds."""

    name: str
    flops: float
    """Dense bf16 operations per second."""
    memory: float
    memory_bandwidth: float
    nvlink: float
    """Bytes per second that it can send to GPUs of its node."""
    network: float
    """Bytes per second that it can send to other nodes."""


GPUS = {
    "a100": Gpu("A100 80GB SXM", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": Gpu("H100 80GB SXM", 989.4e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200 141GB SXM", 989.4e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200 180GB", 2250e12, 180e9, 8e12, 900e9, 50e9),
}

_DEVICES = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""What CUDA calls them. Cards of the same family in other forms (PCIe, NVL) are slower."""


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations per second of a GPU by CUDA's name; None if unknown."""
    known = _DEVICES.get(device_name)
    return GPUS[known].flops if known else None


USABLE_MEMORY = 0.9
"""Share of a GPU's memory that is planned with; the rest is for the CUDA context, the buffers of
NCCL and cuBLAS, single operations' scratch space and fragmentation."""

MATRIX_EFFICIENCY = 0.7
"""Share of the peak that large matrix products reach (torch's largest reach 0.8 on an H200)."""

ATTENTION_EFFICIENCY = 0.45
"""The same of the attention core, forward and backward."""

TILE_ROWS = 128
"""Rows that a grouped matrix product works on at once: the last tile of each expert is half empty
on average, so an expert with R rows costs as many as R + TILE_ROWS / 2."""

LATENCY = 10e-6
"""Seconds before a collective within a node moves anything; across nodes twice that."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes of equal size."""

    gpu: Gpu
    gpus_per_node: int = 8

    def collective(self, sent: float, size: int, stride: int, *, to_each: bool) -> float:
        """Return the seconds of one collective.

        Args:
            sent: bytes that each rank sends to others in all.
            size, stride: ranks of the group and the distance of neighbors among all ranks.
            to_each: every other rank is sent something else (all-to-all). Otherwise (gather,
                scatter, reduce) nodes first share what crosses the network among their GPUs.
        """
        if size == 1:
            return 0.0
        local = max(1, min(size, self.gpus_per_node // stride))
        if local == size:
            return LATENCY + sent / self.gpu.nvlink
        remote = sent * (size - local) / (size - 1)
        within = (sent - remote) / self.gpu.nvlink
        across = remote / (1 if to_each else local) / self.gpu.network
        return 2 * LATENCY + max(within, across)
