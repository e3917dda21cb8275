"""Sums of gathered rows, with further addends: how experts' outputs come back to their tokens.

One program sums one token's rows in one order, without atomics: the same inputs give the same bits.
Each number is read once and each sum written once, rounded once from fp32.

Axis letters: T tokens, H hidden, K choices of a token, R = T * K rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def gather_sum(y_RH: Tensor, row_TK: Tensor, *addends_TH: Tensor) -> Tensor:
    """Return [T, H], token t's being the sum over k of y[row[t, k]], plus the addends of token t.

    Args:
        y_RH: bf16, fp16 or fp32; summed in fp32.
        addends_TH: up to two, of y's dtype and contiguous in H.
    """
    T, K = row_TK.shape
    H = y_RH.shape[1]
    out_TH = y_RH.new_empty(T, H)
    first, second = (*addends_TH, None, None)[:2]
    block = min(triton.next_power_of_2(H), _BLOCK)
    gather_sum_kernel[(T, triton.cdiv(H, block))](
        *(y_RH.contiguous(), row_TK.contiguous(), first, second, out_TH),
        *(H, 0 if first is None else first.stride(0), 0 if second is None else second.stride(0)),
        K=K,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return out_TH


@triton.jit
def gather_sum_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
    y_ptr,
    row_ptr,
    first_ptr,
    second_ptr,
    out_ptr,
    width,
    first_stride,
    second_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token * K + k).to(tl.int64)
        total += tl.load(y_ptr + row * width + columns, inside, 0.0).to(tl.float32)
    if first_ptr is not None:
        total += tl.load(first_ptr + token * first_stride + columns, inside, 0.0).to(tl.float32)
    if second_ptr is not None:
        total += tl.load(second_ptr + token * second_stride + columns, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), inside)
