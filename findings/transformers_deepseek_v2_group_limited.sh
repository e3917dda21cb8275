#!/usr/bin/env bash
# Library: transformers 5.12.1 (torch 2.13.0, Python 3.11); 4.57.6, 5.23.0 and 5.24.0
#     run it.
# Behavior: a DeepseekV2 model with topk_method="group_limited_greedy" is built without
#     complaint and raises in its first forward pass:
#     AttributeError: 'DeepseekV2Moe' object has no attribute 'num_experts'
# Surprise: this is the routing of the 236-billion-parameter DeepSeek-V2 that the class is named
#     for; only "greedy", the routing of DeepSeek-V2-Lite, works.
# Seen: transformers 5.12.1: greedy: logits of shape (1, 6, 64)
#     group_limited_greedy: AttributeError: 'DeepseekV2Moe' object has no attribute 'num_experts'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.12.1 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'EOF'
import torch
import transformers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM


def first_forward(topk_method):
    model = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            first_k_dense_replace=0,
            num_attention_heads=2,
            num_key_value_heads=2,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            topk_method=topk_method,
            n_group=4,
            topk_group=2,
        )
    ).eval()
    with torch.no_grad():
        return f"logits of shape {tuple(model(torch.arange(6)[None]).logits.shape)}"


print(f"transformers {transformers.__version__}: greedy: {first_forward('greedy')}")
try:
    outcome = first_forward("group_limited_greedy")
except AttributeError as error:
    outcome = f"AttributeError: {error}"
print(f"group_limited_greedy: {outcome}")
assert "has no attribute 'num_experts'" in outcome, "the behavior has changed"
EOF
