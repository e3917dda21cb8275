"""Which peak a GPU is measured against."""

from __future__ import annotations

import pytest

from megatron_coe.planning.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),  # slower, and not in the table
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_peaks_are_of_known_cards_only(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
