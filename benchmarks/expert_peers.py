"""Routed experts of other frameworks, where they are installed: of the same sizes, as variants.

torchtitan's are not among them: nobody has tried its version 0.3.0 beside this package.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.layers import (
    PassVariant,
    build_layer,
    expert_flops,
    experts_variant,
    wrap_with_ddp,
)
from megatron_coe.megatron_compat.transformer_engine import have_te
from megatron_coe.model.provider import CoEModelProvider


def peers(provider: CoEModelProvider, tokens: int, device: torch.device) -> list[PassVariant]:
    """Return what is installed and can run here."""
    found = []
    if have_te():
        te = provider.with_fields(backend="te")
        experts = build_layer(te, device).experts
        found.append(experts_variant("Megatron's TEGroupedMLP", experts, te, tokens, device))
    if _has_grouped_experts():
        found.append(_transformers_experts(provider, tokens, device))
    return found


def _has_grouped_experts() -> bool:
    return find_spec("transformers.integrations.moe") is not None


def _transformers_experts(
    provider: CoEModelProvider, tokens: int, device: torch.device
) -> PassVariant:
    """Return `deepseek_v2`'s with `grouped_mm`, from tokens to their sums: C passes."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

    config = DeepseekV2Config(
        hidden_size=provider.hidden_size,
        moe_intermediate_size=provider.moe_ffn_hidden_size,
        n_routed_experts=provider.num_moe_experts,
        num_experts_per_tok=provider.moe_router_topk,
        hidden_act="silu",
        experts_implementation="grouped_mm",
    )
    experts = DeepseekV2Experts(config).to(device, provider.params_dtype)
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, provider.params_dtype)

    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(random(*weight.shape) * provider.init_method_std)
    scores = torch.rand(tokens, config.n_routed_experts, generator=generator)
    probs_TK, chosen_TK = scores.topk(provider.moe_router_topk)
    probs_TK, chosen_TK = probs_TK.to(device, provider.params_dtype), chosen_TK.to(device)
    passes = range(provider.coe_iterations)
    xs = tuple(random(tokens, provider.hidden_size).requires_grad_() for _ in passes)
    dys = tuple(random(tokens, provider.hidden_size) for _ in passes)

    def forward(module: torch.nn.Module, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x_TH, chosen_TK, probs_TK) for x_TH in xs)

    flops = expert_flops(provider, len(xs) * chosen_TK.numel())
    module = wrap_with_ddp(experts, provider)
    return PassVariant("transformers' deepseek_v2", module, xs, dys, flops, tokens, forward)
