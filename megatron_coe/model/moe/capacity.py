"""Bounded expert capacity: which of the tokens assigned to an expert are dropped.

Axis letters: T tokens, N routed experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor

from megatron_coe.model.config import CoEConfig


def drop_tokens(
    probs_TN: Tensor, routing_map_TN: Tensor, config: CoEConfig
) -> tuple[Tensor, Tensor]:
    """Drop the tokens beyond `moe_expert_capacity_factor`, as `moe_token_drop_policy` says.

    By `probs` as Megatron does. By `position` it ranks tokens that all count 1, and which ones stay
    is left to the ties of `topk` (on a CPU neither the first nor the last); here the first stay.
    """
    rank_TN, by_position = probs_TN, config.moe_token_drop_policy == "position"
    if by_position:
        tokens = len(routing_map_TN)
        place_T1 = torch.arange(tokens, device=routing_map_TN.device).unsqueeze(1)
        rank_TN = routing_map_TN * tokens - place_T1  # all different, assigned tokens first
    kept_TN, map_TN = apply_router_token_dropping(
        rank_TN,
        routing_map_TN,
        router_topk=config.moe_router_topk,
        capacity_factor=config.moe_expert_capacity_factor,
        drop_policy="probs",
        pad_to_capacity=config.moe_pad_expert_input_to_capacity,
    )
    return (probs_TN * map_TN if by_position else kept_TN), map_TN
