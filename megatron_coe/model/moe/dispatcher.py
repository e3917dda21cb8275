"""Dispatchers of a CoE layer: rows to their experts and back.

`LocalDispatcher` serves a rank that holds every expert: no all-to-all, so none of what Megatron's
all-to-all dispatcher does around one either (a sort of chunks that are in order already, counts
brought to the host, `masked_select`, whose size the host must know). With K known, the rows are
T * K whatever is chosen: one sort of the chosen experts' numbers says where each goes, one gather
takes them there and one gather with a sum over K brings them back. Each is the other's adjoint, so
the backward pass is made of the same two kernels, without atomics: deterministic on a GPU too.

`AsyncDispatcher` is Megatron's all-to-all dispatcher with all-to-alls that can be under way while
the rank computes.

Plug into megatron/core/transformer/moe/token_dispatcher.py.

Axis letters: T tokens, H hidden, N experts, K chosen, R = T * K rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_coe.model.config import CoEConfig
from megatron_coe.model.moe.async_all_to_all import Exchange


class Order(NamedTuple):
    """Where rows stand when they are sorted by expert, tokens of one expert in their old order.

    All on the tokens' device; int32, which halves what is kept for the backward pass.
    """

    token: Tensor
    """[R]: the token that a row is a copy of."""

    slot: Tensor
    """[R]: the choice of that token which it follows, as t * K + k."""

    row: Tensor
    """[T, K]: where the copy for a token's k-th choice stands."""

    counts: Tensor
    """[N]: rows per expert, int64."""


def order_by_expert(chosen_TK: Tensor, num_experts: int) -> Order:
    """Sort T * K rows by the expert they go to; nothing is asked of the device.

    Args:
        chosen_TK: integer numbers of the experts, each below `num_experts`.
    """
    T, K = chosen_TK.shape
    experts_R = chosen_TK.flatten()
    slots = torch.arange(T * K, dtype=torch.int32, device=chosen_TK.device)
    sorted_R, slot_R = experts_R.sort(stable=True)
    row_TK = torch.empty_like(slots).scatter_(0, slot_R, slots).view(T, K)
    # Not `bincount`, which asks the device for the largest number.
    numbers_N = torch.arange(num_experts, dtype=sorted_R.dtype, device=chosen_TK.device)
    ends_N = torch.searchsorted(sorted_R, numbers_N, right=True)
    counts_N = ends_N.diff(prepend=ends_N.new_zeros(1))
    slot_R = slot_R.int()
    return Order(slot_R // K, slot_R, row_TK, counts_N)


class LocalDispatcher(MoETokenDispatcher):
    """Rows to experts of the same rank (expert and expert-tensor parallelism of 1) and back.

    Takes the router's compact answer: `probs` [T, K] and, where Megatron's dispatchers take a map
    [T, N], the chosen experts [T, K]. Every token takes K experts: none is dropped.
    """

    def __init__(self, config: CoEConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self.order: Order | None = None

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`tokens` [S, B, H], `routing_map` the chosen experts [T, K], `probs` [T, K]."""
        self.hidden_shape = tokens.shape
        self.order = order_by_expert(routing_map, self.config.num_moe_experts)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        return tokens.view(-1, tokens.shape[-1]), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens are where their experts are."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, H] sorted by expert, their counts [N] on the device, and their weights [R]."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act()
        assert self.order is not None
        rows, probs = _ToExperts.apply(hidden_states, probs, *self.order[:3])
        return rows, self.order.counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum of each token's K rows [T, H]; the experts have weighed them already."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward()
            self.shared_experts.post_forward_comm()
        order, self.order = self.order, None  # what is remembered would keep the graph alive
        assert order is not None
        return _FromExperts.apply(hidden_states, order.token, order.row)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """As `token_dispatch`."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [S, B, H], with an overlapped shared expert's output."""
        output = hidden_states.view(self.hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()


class AsyncDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's, with rows on their way to other ranks from `token_dispatch` on until
    `dispatch_postprocess` needs them. The shared expert's work fits in between.

    The rows' way back has nothing to hide under: the next iteration's router needs them.
    """

    _dispatched: Exchange | None = None

    def token_dispatch(
        self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The parent's, but what it returns has not arrived."""
        self.tokens_per_expert: Tensor = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        self._dispatched = Exchange(self.ep_group, self.output_splits, self.input_splits)
        rows, probs = self._dispatched.start(permutated_local_input_tokens, permuted_probs)
        return rows, probs

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The parent's, once the rows are there."""
        exchange, self._dispatched = self._dispatched, None
        assert exchange is not None
        return super().dispatch_postprocess(*exchange.finish(global_input_tokens, global_probs))


class _ToExperts(torch.autograd.Function):
    """x [T, H], probs [T, K] -> each row's token [R, H] and weight [R]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probs: Tensor, token: Tensor, slot: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(row)
        return x.index_select(0, token), probs.flatten().index_select(0, slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dprobs: Tensor) -> tuple[Tensor | None, ...]:
        (row,) = ctx.saved_tensors
        return _sum_rows(dx, row), dprobs.index_select(0, row.flatten()).view_as(row), *[None] * 3


class _FromExperts(torch.autograd.Function):
    """y [R, H] -> the sum of each token's K rows [T, H]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_rows(y, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return dy.index_select(0, token), None, None


def _sum_rows(y_RH: Tensor, row_TK: Tensor) -> Tensor:
    """[T, H], token t's being the sum over k of y[row[t, k]]: the gather and the sum in one kernel,
    which sums 16-bit numbers in fp32."""
    # Detached, or tables for a backward pass of its own would be made too: thrice the time.
    return F.embedding_bag(row_TK, y_RH.detach(), mode="sum")
