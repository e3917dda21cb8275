"""Routers of a CoE layer: Megatron's `TopKRouter`, one per iteration.

Plugs into megatron/core/transformer/moe/router.py. Four things differ from the parent, each
because the parent's numbers would depart from the objective of this package
(`sum of cross-entropy / valid tokens + coefficient * mean over sequences of the aux losses`):
scores keep fp64 when asked for it, the auxiliary losses count the experts that were assigned where
groups limit the assignment, they carry the right weight also with per-token loss and whatever the
layout, and they are logged per layer and iteration.

Axis letters: S sequence, B batch, T = S * B tokens, H hidden, N routed experts, K chosen,
C iterations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    group_limited_topk,
    topk_routing_with_score_function,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_coe.megatron_compat.versions import record_aux_loss
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.moe.aux_loss import iteration_key
from megatron_coe.model.moe.capacity import drop_tokens
from megatron_coe.model.moe.fused import route_tokens, uses_kernels

NORMALIZING_EPS = 1e-20  # as Megatron's, for K scores that all underflow


class CoERouter(TopKRouter):
    """Assigns K of N experts to each token of one iteration.

    With `coe_independent_gate` each iteration owns one; otherwise one serves them all and is told
    with each call which iteration is asking.
    """

    def __init__(
        self,
        config: CoEConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **later: bool,
    ) -> None:
        """`later`: what only Megatron's later versions give and take (`is_mtp_layer`)."""
        super().__init__(config=config, pg_collection=pg_collection, **later)
        # Those number the layers of multi-token prediction from 1 again.
        self.first_layer = config.num_layers if later.get("is_mtp_layer") else 0
        self.iteration = 0
        self.as_indices = False
        self.num_tokens: int | Tensor = 0  # tokens of the latest call that count for the loss
        self.routing_counts: Tensor | None = None  # [C, N + 1], while RoutingStats counts

    @property
    def layer_index(self) -> int:
        """Return the index among all layers, those of multi-token prediction last."""
        return self.first_layer + self.layer_number - 1

    def reset_parameters(self) -> None:
        """Draw Kaiming-uniform with a = sqrt(5), torch's default, as the authors do."""
        super().reset_parameters()
        if self.config.perform_initialization:
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(
        self,
        input: Tensor,
        padding_mask: Tensor | None = None,
        iteration: int = 0,
        as_indices: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Route x(t-1) [S, B, H] of iteration t = `iteration` + 1.

        Returns:
            probs [T, N], the top-k probabilities and 0 elsewhere, in the router's dtype;
            routing_map [T, N], bool. If `as_indices` instead the top-k probabilities [T, K]
            and expert indices [T, K], int64 (for a router whose `config.dispatches_locally`).
        """
        self.iteration, self.as_indices = iteration, as_indices
        return super().forward(input, padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute scores, assignment and auxiliary losses; the parent's steps in its order.

        Args:
            logits: [S, B, N] in the router's dtype.
            padding_mask: [S, B], bool, True at padding, which is then left out of the aux losses.
        """
        S, B = logits.shape[:2]
        logits_TN = logits.view(-1, self.num_experts)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        self.num_tokens = S * B if padding_mask is None else (~padding_mask).sum()

        logits_TN = self.apply_z_loss(logits_TN, padding_mask=padding_mask)
        if self.as_indices:
            return self.route_by_index(logits_TN, S, B, padding_mask)
        probs, routing_map = self.select(logits_TN)
        chosen = routing_map  # before any is dropped for want of capacity
        if self.is_recording:
            self.count(logits_TN, routing_map, padding_mask)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = drop_tokens(probs, routing_map, self.config)
        if self.training and torch.is_grad_enabled():
            if self.is_aux_loss_enabled():
                scores = self.scores(logits_TN)
                balanced = self.balanced(scores, chosen)
                probs = self.attach_aux_losses(probs, scores, balanced, S, B, padding_mask)
            self.count_for_expert_bias(routing_map, padding_mask)
        return probs, routing_map

    def route_by_index(
        self, logits_TN: Tensor, S: int, B: int, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Do the same, but return top-k probabilities and expert indices [T, K].

        The auxiliary losses use the scores and the assignment that are there already: neither is
        computed, or saved for the backward pass, a second time.
        """
        if self.uses_kernel(logits_TN, padding_mask):
            return self.route_by_kernel(logits_TN, S, B)
        probs_TK, chosen_TK, scores_TN = self.choose(logits_TN)
        if self.is_recording:
            self.count(logits_TN, routing_map_of(chosen_TK, self.num_experts), padding_mask)
        if self.training and torch.is_grad_enabled():
            if self.is_aux_loss_enabled():
                if scores_TN is None:
                    scores_TN = self.scores(logits_TN)
                chosen = routing_map_of(chosen_TK, self.num_experts)
                balanced = self.balanced(scores_TN, chosen)
                probs_TK = self.attach_aux_losses(probs_TK, scores_TN, balanced, S, B, padding_mask)
            if self.enable_expert_bias:
                self.count_for_expert_bias(
                    routing_map_of(chosen_TK, self.num_experts), padding_mask
                )
        return probs_TK, chosen_TK

    def uses_kernel(self, logits_TN: Tensor, padding_mask: Tensor | None) -> bool:
        """Return whether one kernel does it all: without limits on groups, biases, padding."""
        return (
            uses_kernels(logits_TN, torch.float32)
            and padding_mask is None
            and self.expert_bias is None
            and self.router_replay is None
            and not self.config.moe_router_group_topk
            and not self.get_aux_loss_coeff("global_aux_loss")
        )

    def route_by_kernel(self, logits_TN: Tensor, S: int, B: int) -> tuple[Tensor, Tensor]:
        """Do as `route_by_index` does, in one pass over the logits each way."""
        config = self.config
        routed = route_tokens(
            logits_TN,
            B,
            self.topk,
            self.score_function,
            config.moe_router_pre_softmax,
            config.moe_router_topk_scaling_factor or 1.0,
        )
        probs_TK, chosen_TK, counts_BN, sums_BN, mass_B = routed
        if self.is_recording:
            self.add_counts(counts_BN.double().sum(0), mass_B.double().sum(0, keepdim=True))
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            # Megatron sums scores and assignments over all tokens, and divides by their number
            # squared. Here they are summed: one row stands for all, and has been divided already.
            sums_N, counts_N = sums_BN.sum(0, keepdim=True), counts_BN.sum(0, keepdim=True)
            probs_TK = self._apply_aux_loss(probs_TK, sums_N / (S * B) ** 2, counts_N)
            probs_TK = self._apply_seq_aux_loss(probs_TK, sums_BN / S**2, counts_BN, 1, B)
        return probs_TK, chosen_TK

    @property
    def is_recording(self) -> bool:
        """Return whether to count this pass: with recomputation, the one of two with a graph."""
        return self.routing_counts is not None and self.training and torch.is_grad_enabled()

    @torch.no_grad()
    def count(self, logits_TN: Tensor, routing_map: Tensor, padding_mask: Tensor | None) -> None:
        """Add a pass to its iteration's counts: each expert's tokens, and top-k probability mass.

        A token's mass is the share of all experts' scores (softmax or sigmoid; biases and limits on
        groups, which decide the assignment, left aside) that its K experts hold: from K / N, if all
        scores are alike, to 1. Assignments count before any is dropped by capacity.
        """
        scores_TN = self.scores(logits_TN)
        chosen_T = (scores_TN * routing_map).sum(dim=1, dtype=torch.float64)
        topk_mass_T = chosen_T / (scores_TN.sum(dim=1, dtype=torch.float64) + NORMALIZING_EPS)
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
            topk_mass_T = topk_mass_T * ~padding_mask
        counts_N = routing_map.sum(dim=0, dtype=torch.float64)
        self.add_counts(counts_N, topk_mass_T.sum(dim=0, keepdim=True))

    @torch.no_grad()
    def add_counts(self, counts_N: Tensor, topk_mass: Tensor) -> None:
        """Add to this iteration's counts: tokens of each expert and the sum of their mass [1]."""
        assert self.routing_counts is not None
        self.routing_counts[self.iteration] += torch.cat([counts_N, topk_mass])

    def count_for_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None) -> None:
        """Count the tokens of each expert, where a bias is to balance them."""
        if self.enable_expert_bias:
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += routing_map.sum(dim=0)

    def scores(self, logits_TN: Tensor) -> Tensor:
        """Return the scores of all experts [T, N] in fp32, in fp64 from fp64 logits.

        Not in bf16: scores that round to the same number would tie, and other experts be chosen.
        (Megatron-Core 0.16 rounds them, 0.19 does not; from fp64 logits both compute in fp32.)
        """
        dtype = torch.promote_types(logits_TN.dtype, torch.float32)
        if self.score_function == "softmax":
            return torch.softmax(logits_TN, dim=-1, dtype=dtype)
        return torch.sigmoid(logits_TN.to(dtype))

    def select(self, logits_TN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the top-k experts of each token: (probs [T, N], routing_map [T, N] bool).

        Follows `topk_routing_with_score_function` (megatron/core/transformer/moe/moe_utils.py).
        """
        config = self.config
        if config.moe_router_fusion:
            return topk_routing_with_score_function(
                logits_TN,
                self.topk,
                use_pre_softmax=config.moe_router_pre_softmax,
                num_groups=config.moe_router_num_groups,
                group_topk=config.moe_router_group_topk,
                scaling_factor=config.moe_router_topk_scaling_factor,
                score_function=self.score_function,
                expert_bias=self.expert_bias,
                fused=True,
            )
        probs_TK, chosen_TK, _ = self.choose(logits_TN)
        probs_TN = torch.zeros_like(logits_TN).scatter(1, chosen_TK, probs_TK)
        return probs_TN, routing_map_of(chosen_TK, self.num_experts)

    def choose(self, logits_TN: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the top-k experts of each token: probabilities and indices [T, K].

        The scores [T, N] of all experts come with them if they were needed for it.
        """
        renormalized = self.score_function == "softmax" and not self.config.moe_router_pre_softmax
        scores = logits_TN if renormalized else self.scores(logits_TN)
        biased = scores if self.expert_bias is None else scores + self.expert_bias
        chosen_TK = self.best(biased)
        probs_TK = _TakeColumns.apply(scores, chosen_TK)
        if renormalized:
            probs_TK = self.scores(probs_TK)
        elif self.score_function == "sigmoid" and self.topk > 1:
            probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + NORMALIZING_EPS)
        if self.config.moe_router_topk_scaling_factor:
            probs_TK = probs_TK * self.config.moe_router_topk_scaling_factor
        return probs_TK.type_as(logits_TN), chosen_TK, None if renormalized else scores

    def best(self, scores_TN: Tensor) -> Tensor:
        """Return the indices of the top-k experts [T, K], or those that are replayed."""
        if self.router_replay is None:
            return self.topk_by_score(scores_TN)[1]
        groups = (self.config.moe_router_num_groups, self.config.moe_router_group_topk)
        return self.router_replay.get_replay_topk(
            scores_TN, self.topk, *groups, lambda scores, *_, **__: self.topk_by_score(scores)
        )[1]

    def topk_by_score(self, scores_TN: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and indices of the top-k experts [T, K], of the best groups if limited."""
        groups = (self.config.moe_router_num_groups, self.config.moe_router_group_topk)
        if not self.config.moe_router_group_topk:
            return scores_TN.topk(self.topk, dim=1)
        if self.config.moe_router_group_score == "max":
            return group_max_topk(scores_TN, self.topk, *groups)
        return group_limited_topk(scores_TN, self.topk, *scores_TN.shape, *groups)

    # -- auxiliary losses ----------------------------------------------------------------------

    def balanced(self, scores_TN: Tensor, chosen_TN: Tensor) -> Tensor:
        """Return the experts [T, N] whose tokens the auxiliary losses count.

        They are the assigned ones, limits on groups included, as in the authors' code; Megatron's
        own losses count the top-k of all groups. A bias, which balances by itself, is left aside
        (DeepSeek-V3, arXiv 2412.19437, equation 18).
        """
        if self.expert_bias is None:
            return chosen_TN
        return routing_map_of(self.topk_by_score(scores_TN)[1], self.num_experts)

    def attach_aux_losses(
        self,
        probs: Tensor,
        scores: Tensor,
        routing_map: Tensor,
        S: int,
        B: int,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Attach the configured auxiliary losses of this iteration to `probs`' gradient.

        They are about all experts' scores [T, N] and, as `routing_map` [T, N], those of `balanced`.
        """
        if self.score_function == "sigmoid":
            scores = scores / (scores.sum(dim=-1, keepdim=True) + NORMALIZING_EPS)
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
            scores = scores * ~padding_mask[:, None]
        masked = padding_mask is not None
        probs = self._apply_aux_loss(probs, scores, routing_map, masked)
        by_sequence = self.weigh_by_length(scores, routing_map, S, B) if masked else scores
        probs = self._apply_seq_aux_loss(probs, by_sequence, routing_map, S, B, masked)
        return self._apply_global_aux_loss(probs, scores, routing_map, masked)

    def weigh_by_length(self, scores: Tensor, routing_map: Tensor, S: int, B: int) -> Tensor:
        """Return scores [T, N] times (T_mean / T_b)^2 of their sequence b, where T_b tokens count.

        The loss of a sequence is N / (K T_b^2) * sum_i count_i * sum_s score_si. With padding,
        Megatron divides those of all sequences by the square of their mean length, T_mean
        (router.py, `_apply_seq_aux_loss`): short sequences would count for less.
        """
        counts_B = routing_map.view(S, B, -1).sum(dim=(0, 2))
        lengths_B = reduce_from_tensor_model_parallel_region(counts_B, self.tp_cp_group) / self.topk
        weights_B = (lengths_B.mean() / lengths_B.clamp(min=1)).square()
        return (scores.view(S, B, -1) * weights_B[:, None].to(scores.dtype)).view_as(scores)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach ST-MoE's z-loss (arXiv 2202.08906) to the logits' gradient [T, N]."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not self.training or not torch.is_grad_enabled():
            return logits
        z_loss = z_loss_func(logits, coeff / self.tp_cp_group.size(), padding_mask=padding_mask)
        return self.attach_and_log_load_balancing_loss(
            logits, coeff, z_loss, "z_loss", self.tp_cp_group
        )

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | Tensor | None = None,
        needs_dp_avg: bool = True,  # later versions' `not reduce_group_has_dp`
    ) -> Tensor:
        """Weight this rank's share of an auxiliary loss, attach it to `activation` and log it.

        `aux_loss` is a share: the ranks of `reduce_group` together make up the whole loss. Megatron
        then divides gradients by micro-batches and data-parallel ranks, or with
        `calculate_per_token_loss` by the global batch's tokens; its own factor for the latter
        counts S tokens where a micro-batch has S * B, and only this rank's of a sequence split over
        TP and CP (router.py, lines 366, 466, 498).
        """
        weight = reduce_group.size() // self.tp_cp_group.size()  # > 1 if the share is one of DP too
        if self.calculate_per_token_loss:
            weight = weight * self.num_tokens * self.tp_cp_group.size()
        activation = MoEAuxLossAutoScaler.apply(activation, aux_loss * weight)
        if self.layer_number is None:  # a layer by itself, of no model: nowhere to log
            return activation
        for name in (aux_loss_name, iteration_key(aux_loss_name, self.iteration)):
            record_aux_loss(
                name,
                aux_loss / aux_loss_coeff,
                self.layer_index + 1,
                self.config.num_layers + (self.config.mtp_num_layers or 0),
                reduce_group,
                reduce_group_has_dp or not needs_dp_avg,
            )
        return activation


class IterationRouters(torch.nn.ModuleList):
    """One `CoERouter` per iteration, in place of a layer's single router (`MoESubmodules.router`).

    Parameters are named `router.{t}.weight`, t counting from 0 as in the authors' checkpoints.
    """

    def __init__(
        self,
        config: CoEConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **later: bool,
    ) -> None:
        super().__init__(
            CoERouter(config=config, pg_collection=pg_collection, **later)
            for _ in range(config.coe_iterations)
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Tell every router its layer, counted from 1; without it nothing would be logged."""
        for router in self.children():
            assert isinstance(router, CoERouter)
            router.set_layer_number(layer_number)

    def forward(
        self,
        input: Tensor,
        padding_mask: Tensor | None = None,
        iteration: int = 0,
        as_indices: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Route x(t-1) with its iteration's router; see `CoERouter.forward`."""
        return self[iteration](input, padding_mask, iteration, as_indices)


def routing_map_of(chosen_TK: Tensor, num_experts: int) -> Tensor:
    """Return expert indices [T, K] as a boolean map [T, N]."""
    shape = (chosen_TK.shape[0], num_experts)
    return torch.zeros(shape, dtype=torch.bool, device=chosen_TK.device).scatter(1, chosen_TK, True)


class _TakeColumns(torch.autograd.Function):
    """values [T, N], K different columns of each row [T, K] -> their values [T, K].

    As `gather`, whose own gradient is a `scatter_add`: atomics, or in deterministic mode a sort.
    """

    @staticmethod
    def forward(ctx: Any, values_TN: Tensor, columns_TK: Tensor) -> Tensor:
        ctx.save_for_backward(columns_TK)
        ctx.width = values_TN.shape[1]
        return values_TN.gather(1, columns_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtaken_TK: Tensor) -> tuple[Tensor, None]:
        (columns_TK,) = ctx.saved_tensors
        shape = (len(dtaken_TK), ctx.width)
        if not torch.are_deterministic_algorithms_enabled():
            return dtaken_TK.new_zeros(shape).scatter_(1, columns_TK, dtaken_TK), None
        numbers_N = torch.arange(ctx.width, device=columns_TK.device)
        dvalues_TN = dtaken_TK.new_zeros(shape)
        for k in range(columns_TK.shape[1]):
            is_taken_TN = columns_TK[:, k, None] == numbers_N
            dvalues_TN = torch.where(is_taken_TN, dtaken_TK[:, k, None], dvalues_TN)
        return dvalues_TN, None


def group_max_topk(
    scores_TN: Tensor, topk: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """Return the top-k experts of a token's `group_topk` best groups: scores and indices [T, K].

    A group is as good as its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2), where
    Megatron's `group_limited_topk` adds up several.
    """
    scores_TGn = scores_TN.unflatten(1, (num_groups, -1))
    kept_TG = scores_TGn.amax(dim=-1).topk(group_topk, dim=1).indices
    is_kept_TG = routing_map_of(kept_TG, num_groups)
    return scores_TGn.masked_fill(~is_kept_TG[..., None], -torch.inf).flatten(1).topk(topk, dim=1)
