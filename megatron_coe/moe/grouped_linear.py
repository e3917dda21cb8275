"""One linear layer per expert over tokens sorted by expert, as two interchangeable kernels.

y[rows of e] = x[rows of e] @ weight[e]^T. Each expert's matrix is [out, in] like `nn.Linear`'s, so
checkpoints need no transposition, and both kernels read it as it lies, forward and backward.

Which kernel `grouping` chooses:

- CUDA, 16-bit or fp32, rows of whole 16 bytes: PyTorch's `grouped_mm`, one launch for all experts,
  with the group sizes kept on the device.
- otherwise a loop of plain matrix products. On a CPU neither is faster at every shape (see
  `docs/results.md`), and the loop takes fp64 too. It also adds weight gradients straight into
  Megatron's gradient buffer, instead of writing a gradient tensor that is then added to it.

Axis letters: T tokens, E experts, I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Grouping = list[int] | Tensor
"""Rows per expert (the loop) or the int32 ends of the groups, on the device (`grouped_mm`)."""

_GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GROUPED_MM_ALIGNMENT = 16  # bytes


def grouping(x_TI: Tensor, tokens_per_expert_E: Tensor, widths: tuple[int, ...]) -> Grouping:
    """Choose the kernel and bring the group sizes into its form.

    Args:
        tokens_per_expert_E: integer, on the host or the device; sums to T. The loop needs the
            numbers, so sizes on a GPU cost it a synchronisation; `grouped_mm` needs none.
        widths: every I and O that the grouping will be used with.
    """
    aligned = all(w * x_TI.element_size() % _GROUPED_MM_ALIGNMENT == 0 for w in widths)
    supported = x_TI.is_cuda and x_TI.dtype in _GROUPED_MM_DTYPES and aligned
    if not supported or x_TI.shape[0] == 0:
        empty = x_TI.shape[0] == 0  # known without asking the device
        return [0] * len(tokens_per_expert_E) if empty else tokens_per_expert_E.tolist()
    ends = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    return ends.to(x_TI.device, non_blocking=True)


def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
    """y_TO with y[rows of e] = x[rows of e] @ weight[e]^T; dtype and device of the inputs.

    An expert without rows gets a gradient of zeros.
    """
    if isinstance(groups, list):
        return _Loop.apply(x_TI, weight_EOI, groups)
    return _GroupedMM.apply(x_TI, weight_EOI, groups)


class _GroupedMM(torch.autograd.Function):
    """`grouped_mm`, whose own backward refuses gradients of stride zero (those of a sum)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        dy = dy.contiguous()
        wants_dx, wants_dw, _ = ctx.needs_input_grad
        dx = F.grouped_mm(dy, weight, offs=ends) if wants_dx else None
        dw = F.grouped_mm(dy.t(), x, offs=ends) if wants_dw else None
        return dx, dw, None


class _Loop(torch.autograd.Function):
    """One matrix product per expert, each writing its part of one output in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, rows: list[int]) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[1])
        for x_e, w_e, y_e in zip(x.split(rows), weight, y.split(rows), strict=True):
            torch.mm(x_e, w_e.t(), out=y_e)
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_dx, wants_dw, _ = ctx.needs_input_grad
        dy_by_expert = dy.split(ctx.rows)
        dx = dw = None
        if wants_dx:
            dx = torch.empty_like(x)
            for dy_e, w_e, dx_e in zip(dy_by_expert, weight, dx.split(ctx.rows), strict=True):
                torch.mm(dy_e, w_e, out=dx_e)
        if wants_dw:
            dw = _weight_gradient(dy_by_expert, x.split(ctx.rows), weight)
        return dx, dw, None


def _weight_gradient(
    dy_by_expert: tuple[Tensor, ...], x_by_expert: tuple[Tensor, ...], weight: Tensor
) -> Tensor | None:
    """dW [E, O, I]; on a CPU, where Megatron keeps a `main_grad` of the same dtype, added to that.

    Then Megatron's convention holds (tensor_parallel/layers.py): `grad_added_to_main_grad` is set
    and what autograd gets is an uninitialised stand-in, which nobody reads. The mark is for the
    whole step, so it must not be set where another kernel may serve the next call: on a GPU.
    """
    main_grad = getattr(weight, "main_grad", None)
    if weight.is_cuda or main_grad is None or main_grad.dtype != weight.dtype:
        dw = torch.empty_like(weight)
        for dy_e, x_e, dw_e in zip(dy_by_expert, x_by_expert, dw, strict=True):
            torch.mm(dy_e.t(), x_e, out=dw_e)
        return dw
    for dy_e, x_e, main_e in zip(dy_by_expert, x_by_expert, main_grad, strict=True):
        if len(x_e):
            main_e.addmm_(dy_e.t(), x_e)
    weight.grad_added_to_main_grad = True
    # One stand-in per backward pass is enough to say "there is a gradient"; autograd would add up
    # those of the other iterations, a pass over the whole tensor each.
    task = torch._C._current_graph_task_id()
    if getattr(weight, "_stand_in_given_for", None) == task:
        return None
    weight._stand_in_given_for = task
    return torch.empty_like(weight)
