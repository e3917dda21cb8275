"""Time the kernels of the routed experts against one dense product of the same size.

    python tools/benchmark.py --threads 1

One linear layer per expert, forward and backward: the loop, `grouped_mm`, and as the ceiling one
dense matrix product over all rows. The arms of a shape take turns within each round, and what is
printed is the median of their rates over the rounds with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from megatron_coe.data.command_line import run
from megatron_coe.moe.grouped_linear import grouped_linear

SHAPES = (
    # experts, inputs, outputs, rows per expert
    (64, 1024, 1408, 64),
    (64, 1024, 1408, 512),
    (64, 256, 352, 128),
    (16, 128, 256, 512),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="bf16 on a GPU, else fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    print("| experts x (inputs -> outputs), rows each | loop | grouped_mm | dense |")
    print("|---|---|---|---|")
    for shape in SHAPES:
        rates = measure(shape, device, dtype, options.rounds)
        experts, inputs, outputs, rows = shape
        cells = [f"{experts} x ({inputs} -> {outputs}), {rows}", *map(spread, rates.values())]
        print(f"| {' | '.join(cells)} |", flush=True)


def measure(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, list[float]]:
    """GFLOP/s of each arm in each round; the first round warms up and is left out."""
    experts, inputs, outputs, rows = shape
    x = torch.randn(experts * rows, inputs, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(experts * rows, outputs, device=device, dtype=dtype)
    counts = [rows] * experts
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    one_weight = weight[0].detach().clone().requires_grad_()
    arms: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "loop": (lambda: grouped_linear(x, weight, counts), weight),
        "grouped_mm": (lambda: grouped_linear(x, weight, ends), weight),
        "dense": (lambda: x @ one_weight.t(), one_weight),
    }
    flops = 3 * 2 * experts * rows * inputs * outputs
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, (arm, parameter) in arms.items():
            rates[name].append(flops / seconds(arm, dy, (x, parameter), device) / 1e9)
    return {name: values[1:] for name, values in rates.items()}


def seconds(
    arm: Callable[[], torch.Tensor],
    dy: torch.Tensor,
    leaves: tuple[torch.Tensor, ...],
    device: torch.device,
) -> float:
    """Wall time of one forward and backward pass."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    torch.autograd.grad(arm(), leaves, dy)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} … {max(values):,.0f})"


if __name__ == "__main__":
    sys.exit(run(main))
