"""Matrix products of rows sorted by expert with one matrix per expert, by two kernels.

Each expert's matrix is [out, in] like `nn.Linear`'s, all in one tensor, so checkpoints need no
transposition; both kernels read it as it lies, forward and backward. No autograd here: see
`megatron_coe.model.moe.grouped_mlp`.

Which kernel `grouping` chooses:

- CUDA of compute capability 9.0 or 10.0, bf16, rows of whole 16 bytes: PyTorch's `grouped_mm`, one
  launch for all experts, with the group sizes kept on the device. (Anywhere else `grouped_mm` is
  itself a loop, which asks the device for the sizes in every product.)
- otherwise a loop over the experts. On a CPU neither wins at every shape (`docs/results.md`); the
  loop takes fp64 too, does the activation while an expert's rows are in the cache, and adds weight
  gradients into Megatron's gradient buffer as it goes.

Axis letters: T rows, E experts, I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grouping = list[int] | Tensor
"""Rows per expert (the loop) or the int32 ends of the groups, on the device (`grouped_mm`)."""

_GROUPED_MM_CAPABILITIES = ((9, 0), (10, 0))
_GROUPED_MM_ALIGNMENT = 16  # bytes


def grouping(x_TI: Tensor, tokens_per_expert_E: Tensor, widths: tuple[int, ...]) -> Grouping:
    """Choose the kernel and bring the group sizes into its form.

    Args:
        tokens_per_expert_E: integer, on the host or the device; sums to T. The loop needs the
            numbers, so sizes on a GPU cost it a synchronization; `grouped_mm` needs none.
        widths: every I and O that the grouping will be used with.
    """
    aligned = all(w * x_TI.element_size() % _GROUPED_MM_ALIGNMENT == 0 for w in widths)
    if not (aligned and _is_one_launch(x_TI)) or x_TI.shape[0] == 0:
        empty = x_TI.shape[0] == 0  # known without asking the device
        return [0] * len(tokens_per_expert_E) if empty else tokens_per_expert_E.tolist()
    ends = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    return ends.to(x_TI.device, non_blocking=True)


def _is_one_launch(x: Tensor) -> bool:
    """Whether `grouped_mm` is one kernel for such rows (ATen/native/cuda/GroupedBlas.cpp)."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) in _GROUPED_MM_CAPABILITIES


def times_transposed(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Return y [T, O] with y[rows of e] = x[rows of e] @ weight[e]^T, by `grouped_mm`."""
    return F.grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=ends_E)


def times(dy_TO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Return dx [T, I] with dx[rows of e] = dy[rows of e] @ weight[e], by `grouped_mm`."""
    return F.grouped_mm(dy_TO, weight_EOI, offs=ends_E)


def outer(dy_TO: Tensor, x_TI: Tensor, ends_E: Tensor) -> Tensor:
    """Return dW [E, O, I] with dW[e] = dy[rows of e]^T @ x[rows of e], by `grouped_mm`.

    It is zero where an expert has no rows.
    """
    return F.grouped_mm(dy_TO.t(), x_TI, offs=ends_E)
