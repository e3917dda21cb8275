"""The benchmark's clocks and counters on a GPU; variants agree there too."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.command import ALL
from benchmarks.host_syncs import count_host_syncs
from benchmarks.memory import footprint
from benchmarks.phases import measure_phases
from benchmarks.timing import Stopwatch
from tests.functional.test_benchmark import benchmark

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZE = 8192


def product(device: torch.device) -> torch.Tensor:
    return torch.ones(SIZE, SIZE, device=device) @ torch.ones(SIZE, SIZE, device=device)


def test_the_stream_is_timed_not_its_filling(device):
    product(device)
    watch = Stopwatch(device)
    watch.start()
    for _ in range(5):
        product(device)
    watch.lap("products")
    began = time.perf_counter()
    torch.cuda.synchronize()
    waited = time.perf_counter() - began  # what the host had not seen of the work
    time.sleep(waited + 0.3)  # the host's time after the last mark
    seconds = watch.stop()["products"]
    assert seconds < waited + 0.3
    assert 5 * 2 * SIZE**3 / seconds < 3e15  # no GPU is as fast


def test_memory_and_synchronizations(device):
    held = torch.zeros(2**20, device=device)

    def run(lap) -> None:
        torch.zeros(2**22, device=device).sum()
        lap("sum")

    found = footprint([held], run, device)
    assert found.held == 2**22
    assert 2**24 <= found.passing["sum"] < 2**24 + 2**21
    assert count_host_syncs(lambda: product(device), device).total() == 0
    counts = count_host_syncs(lambda: held.sum().item(), device)
    assert counts.total() == 1
    assert "test_benchmark.py" in next(iter(counts))


def test_phases_are_the_kernels_time(device):
    class Model:
        def work(self) -> torch.Tensor:
            return product(device)

    model = Model()
    model.work()
    # Looked up when it is called: what is marked is the object's method of that moment.
    found = measure_phases(lambda: model.work(), [(model, "work", "product")], device)
    assert found["product"][0] > 2 * SIZE**3 / 3e15


def test_every_benchmark(tmp_path):
    sizes = ("--scale", "tiny", "--rounds", 2, "--profiles", 1, "--steps", 2)
    result = benchmark(*sizes, "--what", *ALL, "long")
    assert result.returncode == 0, result.stderr
