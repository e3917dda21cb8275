"""The experts' feed-forward networks by kernels that have SwiGLU and the gathering of rows in them.

Six products, and no pass over memory besides: forward neither copies rows nor reads fc1's output
again; backward makes the activation once more in the epilogue of fc2's gradient. Saving it would
write as many bytes, and hold [R, F] more of every iteration.

Axis letters: T tokens, R rows, H hidden, F expert FFN size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_coe.model.moe.dispatcher import sum_rows
from megatron_coe.model.moe.grouped_linear import Grouping

MainGrads = tuple[Tensor, Tensor] | None


def fused_forward(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, groups: Grouping
) -> tuple[Tensor, Tensor]:
    """Return y [R, H], and fc1's output [R, 2F] for the backward pass.

    Args:
        x: [R, H], or the tokens [T, H] with `groups.order`; probs likewise: [R, 1] or [T, K].
    """
    from megatron_coe.model.kernels import grouped_gemm as kernels

    slot = groups.order.slot if groups.order else None
    hidden, activated = kernels.fc1_swiglu(
        x, probs.contiguous(), fc1, groups.ends, slot, kernels.TILES.fc1
    )
    return kernels.product(activated, fc2, groups.ends, True, kernels.TILES.fc2), hidden


def fused_backward(
    x: Tensor,
    probs: Tensor,
    hidden: Tensor,
    dy: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    groups: Grouping,
    main_grads: MainGrads,
    wants_dw: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the gradients of x and probs, and of the weights unless `main_grads` take them."""
    from megatron_coe.model.kernels import grouped_gemm as kernels

    ends, tiles, order = groups.ends, kernels.TILES, groups.order
    slot = order.slot if order else None
    activated, dhidden, dprobs = kernels.dfc2_dswiglu(
        dy, hidden, probs.contiguous(), fc2, ends, slot, tiles.dfc2
    )
    dx = kernels.product(dhidden, fc1, ends, False, tiles.dfc1)
    if order:
        dx = sum_rows(dx, order.row)
    if not wants_dw:
        return dx, dprobs, None
    dw = None if main_grads else (torch.empty_like(fc1), torch.empty_like(fc2))
    into = main_grads or dw
    assert into is not None
    kernels.add_outer(dhidden, x, ends, slot, into[0], dw is None, tiles.dw1)
    kernels.add_outer(dy, activated, ends, None, into[1], dw is None, tiles.dw2)
    return dx, dprobs, dw
