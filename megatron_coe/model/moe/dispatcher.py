"""Dispatchers of a CoE layer: tokens to their experts and back.

`LocalDispatcher` serves a rank that holds every expert: no all-to-all, so none of what Megatron's
all-to-all dispatcher does around one either (a sort of chunks that are in order already, counts
brought to the host, `masked_select`, whose size the host must know). With K known, the rows are
T * K whatever is chosen: one sort of the expert indices says where each goes, one gather
takes them there and one gather with a sum over K brings them back. Each is the other's adjoint, so
the backward pass is made of the same two kernels, without atomics: deterministic on a GPU too.

`AsyncDispatcher` is Megatron's all-to-all dispatcher with all-to-alls that can be under way while
the rank computes.

Plug into megatron/core/transformer/moe/token_dispatcher.py.

Axis letters: T tokens, H hidden, N experts, K chosen, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable
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
from megatron_coe.model.moe.async_all_to_all import AllToAll
from megatron_coe.model.moe.fused import KERNEL_DTYPES, uses_kernels


class Order(NamedTuple):
    """Where dispatched tokens (rows) stand, sorted by expert, those of one expert in token order.

    All on the tokens' device; int32, which halves what is saved for the backward pass.
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
    """Sort T * K rows by the expert they go to, without a host sync.

    Args:
        chosen_TK: expert indices, each below `num_experts`.
    """
    T, K = chosen_TK.shape
    if uses_kernels(chosen_TK):
        from megatron_coe.model.kernels.order import order_rows

        token_R, slot_R, row_R, counts_N = order_rows(chosen_TK.flatten(), num_experts, K)
        return Order(token_R, slot_R, row_R.view(T, K), counts_N)
    experts_R = chosen_TK.flatten()
    slots = torch.arange(T * K, dtype=torch.int32, device=chosen_TK.device)
    sorted_R, slot_R = experts_R.sort(stable=True)
    # The inverse permutation. In deterministic mode `scatter` is a sort and several kernels more.
    if torch.are_deterministic_algorithms_enabled():
        row_TK = slot_R.argsort().int().view(T, K)
    else:
        row_TK = torch.empty_like(slots).scatter_(0, slot_R, slots).view(T, K)
    # Not `bincount`, which asks the device for the largest number.
    numbers_N = torch.arange(num_experts, dtype=sorted_R.dtype, device=chosen_TK.device)
    ends_N = torch.searchsorted(sorted_R, numbers_N, right=True)
    counts_N = ends_N.diff(prepend=ends_N.new_zeros(1))
    slot_R = slot_R.int()
    return Order(slot_R // K, slot_R, row_TK, counts_N)


class LocalDispatcher(MoETokenDispatcher):
    """Dispatch to experts of the same rank and combine; for EP = ETP = 1.

    Takes the router's index-based answer: `probs` [T, K] and, where Megatron's dispatchers take a
    map [T, N], the expert indices [T, K]. Every token takes K experts: none is dropped.
    """

    def __init__(self, config: CoEConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        self.order: Order | None = None
        self.experts_gather: Callable[[Tensor], bool] | None = None
        """A function that tells whether the experts fetch the rows of these tokens themselves."""
        self.addends: tuple[Tensor, ...] = ()
        """[S, B, H] each, to be added to the next combined output: one kernel does it all."""

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take `tokens` [S, B, H], expert indices as `routing_map` [T, K], and `probs` [T, K]."""
        self.hidden_shape = tokens.shape
        self.order = order_by_expert(routing_map, self.config.num_moe_experts)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        return tokens.view(-1, tokens.shape[-1]), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments: all tokens are where their experts are."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | Order, Tensor]:
        """Return rows [R, H] sorted by expert, counts [N] on the device, and probabilities [R].

        Experts that gather their rows get the arguments, and in place of the counts the order.
        """
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act()
        assert self.order is not None
        if self.experts_gather and self.experts_gather(hidden_states):
            return hidden_states, self.order, probs
        rows, probs = _ToExperts.apply(hidden_states, probs, *self.order[:3])
        return rows, self.order.counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the sum of each token's K rows [T, H], which the experts have weighted.

        `addends` are added to it, and forgotten.
        """
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward()
            self.shared_experts.post_forward_comm()
        order, self.order = self.order, None  # a reference would keep the graph alive
        assert order is not None
        width = hidden_states.shape[-1]
        addends = [addend.reshape(-1, width) for addend in self.addends]
        self.addends = ()
        return _FromExperts.apply(hidden_states, order.token, order.row, *addends)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return the argument, as `token_dispatch` does."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return [T, H] as [S, B, H], with an overlapped shared expert's output."""
        output = hidden_states.view(self.hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()


class AsyncDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher, with the dispatch overlapped with the shared expert.

    It is under way from `token_dispatch` until `dispatch_postprocess` needs its result.

    The combine has nothing to overlap with: the next iteration's router needs its result.
    """

    _dispatched: AllToAll | None = None

    def token_dispatch(
        self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Start the parent's all-to-all; what is returned has not arrived."""
        self.tokens_per_expert: Tensor = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        self._dispatched = AllToAll(self.ep_group, self.output_splits, self.input_splits)
        rows, probs = self._dispatched.start(permutated_local_input_tokens, permuted_probs)
        return rows, probs

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for the rows, then do as the parent."""
        all_to_all, self._dispatched = self._dispatched, None
        assert all_to_all is not None
        return super().dispatch_postprocess(*all_to_all.finish(global_input_tokens, global_probs))


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
        return sum_rows(dx, row), dprobs.index_select(0, row.flatten()).view_as(row), *[None] * 3


class _FromExperts(torch.autograd.Function):
    """y [R, H] -> the sum of each token's K rows [T, H], plus addends [T, H]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, row: Tensor, *addends: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return sum_rows(y, row, *addends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        return dy.index_select(0, token), None, None, *(dy if needs else None for needs in needed)


def sum_rows(y_RH: Tensor, row_TK: Tensor, *addends_TH: Tensor) -> Tensor:
    """Return [T, H], token t's being the sum over k of y[row[t, k]], plus the addends of token t.

    One kernel gathers and sums, 16-bit numbers in fp32.
    """
    if uses_kernels(y_RH, *KERNEL_DTYPES):
        from megatron_coe.model.kernels.combine import gather_sum

        return gather_sum(y_RH, row_TK, *addends_TH)
    # Detached, or tables for a backward pass of its own would be made too: thrice the time.
    total_TH = F.embedding_bag(row_TK, y_RH.detach(), mode="sum")
    for addend_TH in addends_TH:
        total_TH = total_TH + addend_TH
    return total_TH
