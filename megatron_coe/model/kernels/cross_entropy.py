"""Cross-entropy of a chunk of logits, whose gradient takes the logits' place.

A row is read from memory once and written once: its second reading finds it in the cache. One
program computes a row, in one order, so the same inputs give the same bits.

Axis letters: T tokens of the chunk, V this rank's rows of the vocabulary, padding included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


def softmax_statistics(logits_TV: Tensor, targets_T: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return log sum exp of each row's first `columns` logits, and its target's logit; fp32 [T].

    A target of -1 (another rank's) counts 0; without any column the former is -inf.
    """
    lse_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    target_T = torch.empty_like(lse_T)
    _launch(logits_TV, targets_T, None, lse_T, target_T, columns, statistics=True)
    return lse_T, target_T


def write_gradient(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, lse_T: Tensor, columns: int
) -> None:
    """Write weight * (softmax - [column is the target]) over the logits; 0 over padding."""
    _launch(logits_TV, targets_T, weights_T, lse_T, lse_T, columns, statistics=False)


def statistics_and_gradient(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """Do both in one kernel, where this rank has the whole vocabulary."""
    lse_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    target_T = torch.empty_like(lse_T)
    _launch(logits_TV, targets_T, weights_T, lse_T, target_T, columns, statistics=True)
    return lse_T, target_T


def _launch(
    logits_TV: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None,
    lse_T: Tensor,
    target_T: Tensor,
    columns: int,
    statistics: bool,
) -> None:
    rows, width = logits_TV.shape
    block = min(triton.next_power_of_2(width), _BLOCK)
    cross_entropy_kernel[(rows,)](
        logits_TV,
        targets_T.contiguous(),
        # Of a sum the gradient has strides of zero. (Unread without a gradient.)
        lse_T if weights_T is None else weights_T.contiguous(),
        lse_T,
        target_T,
        logits_TV.stride(0),
        columns,
        width,
        STATISTICS=statistics,
        GRADIENT=weights_T is not None,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )


@triton.jit
def cross_entropy_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
    logits_ptr,
    targets_ptr,
    weights_ptr,
    lse_ptr,
    target_ptr,
    stride,
    columns,
    width,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row; the functions above say what."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    if STATISTICS:
        largest = -float("inf")
        total = 0.0
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < columns, other=-float("inf"))
            x = x.to(tl.float32)
            new = tl.maximum(largest, tl.max(x))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new))
            largest = new
        lse = tl.log(total) + largest
        tl.store(lse_ptr + row, lse)
        picked = tl.load(logits_ptr + target, mask=target >= 0, other=0.0)
        tl.store(target_ptr + row, picked.to(tl.float32))
    else:
        lse = tl.load(lse_ptr + row)
    if GRADIENT:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        tl.debug_barrier()  # every thread has read the target's logit
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < columns, other=-float("inf"))
            gradient = tl.exp(x.to(tl.float32) - lse) - tl.where(column == target, 1.0, 0.0)
            # Not a product alone: what stands at a token that does not count must not matter.
            gradient = tl.where(weight == 0.0, 0.0, gradient * weight)
            tl.store(logits_ptr + column, gradient, mask=column < width)
