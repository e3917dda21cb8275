"""Where Triton kernels take the place of plain torch between the experts' products, and why.

They do on a CUDA device with triton. Each is equal to its plain definition, which serves everything
else, and passes over memory fewer times. Bytes, counted, of T tokens of H 16-bit channels with K
choices of N experts (T = 32,768, H = 1,024, K = 4, N = 63: MB in parentheses) and launches:

| | plain | kernel |
|---|---|---|
| combine, + shared expert, + residual stream | 2 T H (K + 7) (738), 3 | 2 T H (K + 3) (470), 1 |
| scores, top-k, sums for auxiliary losses | T (19 N + 24 K) (42), 11 | T (4 N + 12 K) (10), 2 |
| the same: backward | 32 T N (66), 9 | 8 T N (17), 1 |
| order of rows | sorts 64-bit keys: 8 passes, 11 | 3 passes over 8-byte indices, 4 |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_coe.model.linear_cross_entropy import has_triton

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of rows that a kernel sums in fp32."""


def uses_kernels(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether kernels serve a tensor: on a CUDA device, of one of these dtypes if given."""
    return tensor.is_cuda and has_triton() and (not dtypes or tensor.dtype in dtypes)


class Routed(NamedTuple):
    """What a router finds for T = S * B tokens in one pass over their logits."""

    probs: Tensor
    """[T, K]: top-k probabilities, fp32."""
    chosen: Tensor
    """[T, K]: expert indices, int64."""
    counts: Tensor
    """[B, N]: tokens of each sequence that chose each expert, fp32."""
    score_sums: Tensor
    """[B, N]: sums of each sequence's scores; those of sigmoid as shares of a token's sum."""
    topk_mass: Tensor
    """[B]: sums of the share of its scores that a token's K experts hold."""


def route_tokens(
    logits_TN: Tensor, batch: int, topk: int, score_function: str, pre_softmax: bool, scaling: float
) -> Routed:
    """Choose K experts for each token by a kernel; `probs` and `score_sums` are differentiable.

    Args:
        logits_TN: fp32 on a CUDA device, of token s * batch + b in row s * batch + b.
    """
    from megatron_coe.model.kernels import route

    kind = route.SIGMOID
    if score_function == "softmax":
        kind = route.SOFTMAX if pre_softmax else route.SOFTMAX_OF_CHOSEN
    return Routed(*_Route.apply(logits_TN.contiguous(), batch, topk, kind, scaling))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, batch: int, topk: int, kind: int, scaling: float
    ) -> tuple[Tensor, ...]:
        from megatron_coe.model.kernels import route

        probs, chosen, *sums = route.route_tokens(logits, batch, topk, kind, scaling)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen, sums[0], sums[2])
        ctx.save_for_backward(logits, chosen)
        ctx.kind, ctx.scaling = kind, scaling
        return probs, chosen, *sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dprobs: Tensor | None, _chosen: None, _counts: None, dsums: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        from megatron_coe.model.kernels import route

        logits, chosen = ctx.saved_tensors
        if dprobs is None:
            dprobs = logits.new_zeros(chosen.shape)
        if dsums is not None:
            dsums = dsums.contiguous()
        dlogits = route.route_tokens_backward(
            logits, chosen, dprobs.contiguous(), dsums, ctx.kind, ctx.scaling
        )
        return dlogits, None, None, None, None
