"""The order of rows by expert: a stable counting sort, in two kernels and a cumulative sum.

Where a row goes is its expert's start, plus the rows of that expert in blocks before its own, plus
those before it in its block. All are counts, so nothing depends on the order of execution.

Axis letters: R rows before they are sorted, N experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16384
"""Pairs of a row and an expert that a program holds, 64 a thread."""


def order_rows(chosen_R: Tensor, num_experts: int, topk: int) -> tuple[Tensor, ...]:
    """Sort rows by expert, those of one expert in their order.

    Args:
        chosen_R: the expert of each row, integers; row r is choice r % topk of token r // topk.

    Returns:
        int32: the token [R] and the row before sorting [R] of each sorted row, and the place [R]
        that each row gets; int64: rows per expert [N].
    """
    R = len(chosen_R)
    experts = max(triton.next_power_of_2(num_experts), 16)
    sizes = {"BLOCK": max(_TILE // experts, 16), "EXPERTS": experts, "num_warps": 8}
    blocks = triton.cdiv(R, sizes["BLOCK"])
    counts_NB = torch.empty(num_experts, blocks, dtype=torch.int32, device=chosen_R.device)
    token_R, slot_R, place_R = (torch.empty_like(chosen_R, dtype=torch.int32) for _ in range(3))
    count_rows_kernel[(blocks,)](chosen_R, counts_NB, R, num_experts, blocks, **sizes)
    ends_NB = counts_NB.flatten().cumsum(0, dtype=torch.int32)
    place_rows_kernel[(blocks,)](
        *(chosen_R, counts_NB, ends_NB, token_R, slot_R, place_R),
        *(R, num_experts, blocks, topk),
        **sizes,
    )
    return token_R, slot_R, place_R, counts_NB.sum(1)


@triton.jit
def count_rows_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
    chosen_ptr,
    counts_ptr,
    rows,
    num_experts,
    blocks,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    chosen = tl.load(chosen_ptr + row, row < rows, num_experts).to(tl.int32)
    counts = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + expert * blocks + block, counts, expert < num_experts)


@triton.jit
def place_rows_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
    chosen_ptr,
    counts_ptr,
    ends_ptr,
    token_ptr,
    slot_ptr,
    place_ptr,
    rows,
    num_experts,
    blocks,
    topk,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    chosen = tl.load(chosen_ptr + row, row < rows, num_experts).to(tl.int32)
    at = expert * blocks + block
    ends = tl.load(ends_ptr + at, expert < num_experts, 0)
    starts = ends - tl.load(counts_ptr + at, expert < num_experts, 0)
    is_chosen = (chosen[:, None] == expert[None, :]).to(tl.int32)
    places = starts[None, :] + tl.cumsum(is_chosen, 0) - 1
    place = tl.sum(places * is_chosen, 1)
    tl.store(place_ptr + row, place, row < rows)
    tl.store(token_ptr + place, (row // topk).to(tl.int32), row < rows)
    tl.store(slot_ptr + place, row.to(tl.int32), row < rows)
