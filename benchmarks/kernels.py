"""Kernels for the linear layers of experts, beside one dense product over all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Lap, Variant

SHAPES = (
    # experts, inputs, outputs, rows per expert
    (64, 1024, 1408, 64),
    (64, 1024, 1408, 512),
    (64, 256, 352, 128),
    (16, 128, 256, 512),
)
Shape = tuple[int, int, int, int]


def kernel_variants(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Variant]:
    """Return variants of one linear layer per expert, its output and both gradients.

    They are a loop, `grouped_mm`, and the product of all rows with one matrix.
    """
    experts, inputs, outputs, rows = shape

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, dy = matrix(experts * rows, inputs), matrix(experts * rows, outputs)
    weight = matrix(experts, outputs, inputs)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * rows

    def loop() -> None:
        y, dx, dw = dy.new_empty(dy.shape), x.new_empty(x.shape), weight.new_empty(weight.shape)
        for e, (x_e, dy_e) in enumerate(zip(x.split(rows), dy.split(rows), strict=True)):
            at = slice(e * rows, (e + 1) * rows)
            torch.mm(x_e, weight[e].t(), out=y[at])
            torch.mm(dy_e, weight[e], out=dx[at])
            torch.mm(dy_e.t(), x_e, out=dw[e])

    def grouped() -> None:
        F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        F.grouped_mm(dy, weight, offs=ends)
        F.grouped_mm(dy.t(), x, offs=ends)

    def dense() -> None:
        torch.mm(x, weight[0].t())
        torch.mm(dy, weight[0])
        torch.mm(dy.t(), x)

    def variant(name: str, products: Callable[[], None]) -> Variant:
        def run(lap: Lap) -> None:
            products()
            lap("both")

        return Variant(name, run, flops=3 * 2 * experts * rows * inputs * outputs)

    return [variant("loop", loop), variant("grouped_mm", grouped), variant("dense", dense)]
