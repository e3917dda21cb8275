#!/usr/bin/env bash
# Library: megatron-core 0.16.1 (torch 2.13.0, Python 3.11); 0.19.2 does the same.
# Behavior: with moe_router_topk < moe_router_group_topk (2 experts out of at most 4 of 8 groups)
#     topk_routing_with_score_function ranks the groups by the sum of their best
#     topk // group_topk = 0 scores. Every group ties at 0, so every token gets the same groups,
#     whatever its logits, and the experts of the other groups never receive a token.
# Surprise: TransformerConfig accepts the setting, and a limit of four groups cannot bind a token that
#     takes two experts: plain top-2 obeys it. The docstring refers to DeepSeek-V2 for
#     device-limited routing; its rule (rank a group by its best expert) gives exactly plain top-2.
# Seen: megatron-core 0.16.1: groups used 4 of 8; tokens with other experts than top-2: 76.1%;
#     tokens without their best expert: 49.8%
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q megatron-core==0.16.1 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore - << 'EOF'
from importlib.metadata import version

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.transformer_config import TransformerConfig

TOKENS, EXPERTS, GROUPS, GROUP_TOPK, TOPK = 4096, 32, 8, 4, 2
TransformerConfig(
    num_layers=1,
    hidden_size=64,
    num_attention_heads=4,
    num_moe_experts=EXPERTS,
    moe_router_topk=TOPK,
    moe_router_num_groups=GROUPS,
    moe_router_group_topk=GROUP_TOPK,
)

torch.manual_seed(0)
logits = torch.randn(TOKENS, EXPERTS)
_, plain = topk_routing_with_score_function(logits, TOPK)
_, limited = topk_routing_with_score_function(
    logits, TOPK, num_groups=GROUPS, group_topk=GROUP_TOPK
)

# The premise: plain top-2 never exceeds the limit.
assert plain.view(TOKENS, GROUPS, -1).any(-1).sum(1).max() <= GROUP_TOPK

used = limited.view(TOKENS, GROUPS, -1).any(-1).any(0).sum().item()
other = (plain != limited).any(1).float().mean().item()
best = torch.zeros_like(plain).scatter_(1, logits.argmax(1, keepdim=True), True)
missed = 1 - (limited & best).any(1).float().mean().item()
print(
    f"megatron-core {version('megatron-core')}: groups used {used} of {GROUPS}; "
    f"tokens with other experts than top-2: {other:.1%}; "
    f"tokens without their best expert: {missed:.1%}"
)
assert used == GROUP_TOPK, "the behavior has changed: other groups are used too"
assert other > 0.5 and missed > 0.25, "the behavior has changed: tokens get their best experts"
EOF
