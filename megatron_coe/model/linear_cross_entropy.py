"""Output layer and cross-entropy in one, chunk by chunk of tokens: all logits never exist.

Logits are half of all that a training step holds at the paper's vocabulary. Here a chunk's logits
become losses and, in their own place, the gradient by the logits, which the two products for the
hidden states and for the weights consume before the next chunk begins.

The gradient needs the incoming gradient of each token's loss, which only the backward pass knows.
So there are two ways:

- **Weighted**: the caller says beforehand what each token's loss will be weighed by. The forward
  pass computes both gradients for these weights, and the backward pass multiplies them by the one
  factor that is left: three products, as many as without chunks. An incoming gradient that is not
  the weights times one factor is an error (`torch._assert_async`: without waiting for the device).
- **Recomputed**: without weights the backward pass computes each chunk's logits once more: four
  products, right for any incoming gradient.

The weights' gradient is summed over chunks in fp32 (fp64) and added to Megatron's `main_grad` in
that precision; it is the only [V, H] that exists besides.

Axis letters: T tokens (of a chunk where so said), H hidden, V this rank's rows of the vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_coe.model.vocab_padding import fill_padding

_CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Logits of a chunk at most. Each chunk reads and writes the weights' gradient once more, so few
large ones. On a CPU (1,024 tokens, H = 1,024, V = 25,600, fp32, over the products' time): 8 MiB
1.18, 32 MiB 1.09, 64 MiB 1.06, all logits 1.06. On a GPU not measured."""

_ROW_MULTIPLE = 128  # of a GPU's tiles

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary this rank's rows are.

    Args:
        first: the id of the first row.
        columns: rows that belong to ids; those after them are padding.
        group: the ranks that divide the vocabulary; None for one.
    """

    first: int
    columns: int
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, vocab_size: int, rows: int, group: ProcessGroup) -> VocabShard:
        """Return this rank's part, where each rank of `group` has as many rows."""
        first = get_pg_rank(group) * rows
        columns = min(max(vocab_size - first, 0), rows)
        return cls(first, columns, group if get_pg_size(group) > 1 else None)

    def targets(self, labels: Tensor) -> Tensor:
        """Return the column of each label; -1 where it is another rank's, or none at all."""
        columns = labels - self.first
        return columns.where((columns >= 0) & (columns < self.columns), -1)

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce values over the ranks that divide the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(values, op, self.group)


def linear_cross_entropy(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    weights_T: Tensor | None = None,
) -> Tensor:
    """Compute -log softmax(x W^T)[label] of each token.

    Args:
        x_TH: hidden states, the same on all ranks of the shard's group. Their gradient is this
            rank's part of a sum over the group, as of any column-parallel layer.
        weight_VH: this rank's rows, of x's dtype.
        labels_T: ids, int64. The loss of one outside the vocabulary means nothing; it is finite.
        shard: what the rows are.
        weights_T: what the incoming gradient will be, up to one factor; None if nobody knows.

    Returns:
        Losses [T], fp32 (fp64 for fp64).

    Raises:
        RuntimeError: in the backward pass, an incoming gradient is not a multiple of `weights_T`.
            On a GPU it is the device that asserts so.
    """
    if not (torch.is_grad_enabled() and (x_TH.requires_grad or weight_VH.requires_grad)):
        losses_T, _, _ = _by_chunks(x_TH, weight_VH, labels_T, shard, None)
        return losses_T
    if (
        weights_T is None or x_TH.dtype == torch.float16
    ):  # which needs the loss scale from the start
        return _Recomputed.apply(x_TH, weight_VH, labels_T, shard)
    w_T = weights_T.detach().to(torch.promote_types(x_TH.dtype, torch.float32))
    return _Weighted.apply(x_TH, weight_VH, labels_T, shard, w_T)


class _Weighted(torch.autograd.Function):
    """Both gradients in the forward pass, for weights that are known there."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, shard: VocabShard, w_T: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        losses_T, dx_TH, dw_VH = _by_chunks(x_TH, weight_VH, labels_T, shard, w_T, wanted)
        ctx.save_for_backward(weight_VH, dx_TH, dw_VH, w_T)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_T: Tensor) -> tuple[Tensor | None, ...]:
        weight_VH, dx_TH, dw_VH, w_T = ctx.saved_tensors
        factor = _factor(dlosses_T, w_T)
        dx_TH = None if dx_TH is None else dx_TH * factor.to(dx_TH.dtype)
        dw_VH = None if dw_VH is None else weight_gradient(weight_VH, dw_VH, factor)
        return dx_TH, dw_VH, None, None, None


class _Recomputed(torch.autograd.Function):
    """Both gradients in the backward pass, which computes the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, shard: VocabShard
    ) -> Tensor:
        ctx.shard = shard
        ctx.save_for_backward(x_TH, weight_VH, labels_T)
        losses_T, _, _ = _by_chunks(x_TH, weight_VH, labels_T, shard, None)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_T: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_VH, labels_T = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        _, dx_TH, dw_VH = _by_chunks(x_TH, weight_VH, labels_T, ctx.shard, dlosses_T, wanted)
        dw_VH = None if dw_VH is None else weight_gradient(weight_VH, dw_VH)
        return dx_TH, dw_VH, None, None


def _factor(dlosses_T: Tensor, w_T: Tensor) -> Tensor:
    """Return the factor between the incoming gradient and the weights that were said to be it."""
    largest = w_T.abs().argmax(keepdim=True)  # an index without axes would be read by the host
    weight, gradient = w_T[largest], dlosses_T[largest]
    factor = torch.where(weight == 0, gradient, gradient / weight)
    off = (dlosses_T - factor * w_T).abs().amax()
    # A loss that is not finite is not this function's to refuse.
    kept = (off <= 1e-4 * gradient.abs()) | ~off.isfinite()
    torch._assert_async(
        kept,
        "linear_cross_entropy: the gradient of the losses is not a multiple of the weights (of "
        "`loss_mask`) that the forward pass was given: give none, or set "
        "cross_entropy_loss_fusion=False",
    )
    return factor


def weight_gradient(weight: Tensor, dw: Tensor, factor: Tensor | None = None) -> Tensor:
    """Hand factor * dw over to `weight`: into Megatron's buffer, or to autograd as returned.

    Megatron's convention for the former (tensor_parallel/layers.py): autograd gets an uninitialized
    stand-in, which nobody reads. A weight that the embedding shares on this rank
    (`zero_out_wgrad`) gets its gradient through autograd, which adds the embedding's.
    """
    main: Tensor | None = getattr(weight, "main_grad", None)
    shared = getattr(weight, "zero_out_wgrad", False)
    takes = hasattr(weight, "grad_added_to_main_grad") and not shared
    if main is None or main.dtype != dw.dtype or not takes:
        return (dw if factor is None else dw * factor).to(weight.dtype)
    if factor is None:
        main.add_(dw)
    else:
        main.addcmul_(dw, factor.to(dw.dtype))
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's
    return torch.empty_like(weight)


# --- one chunk after another ----------------------------------------------------------------------


def _by_chunks(
    x_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    w_T: Tensor | None,
    wanted: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute losses [T] and, of the sum of `w_T` * losses, the gradients that are wanted.

    The gradient by the weights is in the dtype of the losses.
    """
    kind = cross_entropy_of(x_TH)
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    targets_T = shard.targets(labels_T)
    losses_T = torch.empty(len(x_TH), dtype=dtype, device=x_TH.device)
    dx_TH = torch.empty_like(x_TH) if wanted[0] else None
    dw_VH: Tensor | None = None
    rows = chunk_rows(len(x_TH), len(weight_VH), x_TH.element_size(), x_TH.is_cuda)
    for start in range(0, len(x_TH), rows):
        part = slice(start, start + rows)
        x = x_TH[part]
        weights = w_T[part] if w_T is not None else None
        losses_T[part], dlogits = kind(x @ weight_VH.t(), targets_T[part], weights, shard)
        if dlogits is None:
            continue
        if dx_TH is not None:
            torch.mm(dlogits, weight_VH, out=dx_TH[part])
        if wanted[1]:
            dw_VH = _accumulate(dw_VH, dlogits, x, dtype)
        del dlogits  # before the next chunk's logits
    return losses_T, dx_TH, dw_VH


def _accumulate(
    dw_VH: Tensor | None, dlogits_TV: Tensor, x_TH: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return dw + dlogits^T x, in place where there is a dw, summed in `dtype`."""
    if x_TH.dtype == dtype:
        if dw_VH is None:
            return dlogits_TV.t() @ x_TH
        return dw_VH.addmm_(dlogits_TV.t(), x_TH)
    if not x_TH.is_cuda:
        product = (dlogits_TV.t() @ x_TH).to(dtype)
        return product if dw_VH is None else dw_VH.add_(product)
    if dw_VH is None:
        return torch.mm(dlogits_TV.t(), x_TH, out_dtype=dtype)
    return torch.addmm(dw_VH, dlogits_TV.t(), x_TH, out_dtype=dtype, out=dw_VH)


def chunk_rows(tokens: int, width: int, element_size: int, on_gpu: bool) -> int:
    """Return the tokens of a chunk: chunks of one size as far as that goes.

    A vocabulary that is not known yet (`width` 0) counts as one id.
    """
    limit = _CHUNK_BYTES["cuda" if on_gpu else "cpu"]
    most = max(limit // (max(width, 1) * element_size), _ROW_MULTIPLE)
    chunks = max(-(-tokens // most), 1)
    rows = -(-tokens // chunks)
    return max(-(-rows // _ROW_MULTIPLE), 1) * _ROW_MULTIPLE


# --- the loss and the gradient of a chunk ---------------------------------------------------------

CrossEntropy = Callable[[Tensor, Tensor, Tensor | None, VocabShard], Result]
"""Losses [T] and, where weights [T] are given, the gradient by the logits [T, V] of their weighted
sum, from logits [T, V], which are overwritten, and targets [T]."""


def cross_entropy_of(x: Tensor) -> CrossEntropy:
    """Return what is fastest for hidden states of this device and dtype."""
    on_gpu = x.is_cuda and x.dtype != torch.float64
    return triton_cross_entropy if on_gpu and has_triton() else torch_cross_entropy


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed: with any build of torch for a GPU."""
    return importlib.util.find_spec("triton") is not None


def torch_cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor | None, shard: VocabShard
) -> Result:
    """Compute both in plain torch, in fp32 (fp64): Megatron's operations, in its order."""
    fill_padding(logits_TV, shard.columns)
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    x_TV = logits_TV.to(dtype)
    max_T = x_TV.amax(dim=-1)
    shard.all_reduce(max_T, dist.ReduceOp.MAX)
    x_TV -= max_T[:, None]
    here_T = targets_T >= 0
    picked = torch.arange(len(x_TV), device=x_TV.device), targets_T.clamp(min=0)
    target_T = x_TV[picked].where(here_T, 0.0)
    sum_T = x_TV.exp_().sum(dim=-1)
    if shard.group is not None:
        both = torch.stack([target_T, sum_T])
        shard.all_reduce(both, dist.ReduceOp.SUM)
        target_T, sum_T = both
    losses_T = sum_T.log() - target_T
    if weights_T is None:
        return losses_T, None
    x_TV /= sum_T[:, None]
    x_TV[picked] -= here_T.to(dtype)
    x_TV *= weights_T.to(dtype)[:, None]
    return losses_T, x_TV.to(logits_TV.dtype)


def triton_cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor | None, shard: VocabShard
) -> Result:
    """Compute both in one kernel, or with all-reduces between two where ranks divide the rows."""
    from megatron_coe.model.kernels import cross_entropy as kernels

    columns = shard.columns
    if shard.group is None and weights_T is not None:
        lse_T, target_T = kernels.statistics_and_gradient(logits_TV, targets_T, weights_T, columns)
        return lse_T - target_T, logits_TV
    lse_T, target_T = kernels.softmax_statistics(logits_TV, targets_T, columns)
    if shard.group is not None:
        max_T = lse_T.clone()
        shard.all_reduce(max_T, dist.ReduceOp.MAX)
        both = torch.stack([target_T, (lse_T - max_T).exp()])
        shard.all_reduce(both, dist.ReduceOp.SUM)
        target_T, lse_T = both[0], both[1].log() + max_T
    if weights_T is None:
        return lse_T - target_T, None
    kernels.write_gradient(logits_TV, targets_T, weights_T, lse_T, columns)
    return lse_T - target_T, logits_TV
