#!/usr/bin/env bash
# Library: transformers 5.24.0 (torch 2.13.0, Python 3.11); 4.57.6, 5.12.1 and 5.23.0 do the same.
# Behavior: deepseek_v2 accepts and saves norm_topk_prob=True, which its documentation describes as
#     normalizing the weights of the chosen experts, and computes without it: the logits are the same
#     to the bit. deepseek_v3 of the same release normalizes.
# Surprise: a fine-tune or a conversion of a model that was trained with normalized weights runs,
#     with expert outputs weighted by another sum, and nothing says so.
# Seen: transformers 5.24.0: largest change of the logits by norm_topk_prob
#     deepseek_v2 0, deepseek_v3 0.539
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'EOF'
import torch
import transformers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}


def logits(config, model_class, normalized):
    model = model_class(config(**SIZES, norm_topk_prob=normalized)).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    with torch.no_grad():
        return model(torch.arange(1, 11)[None]).logits


def change(*classes):
    return (logits(*classes, True) - logits(*classes, False)).abs().max().item()


second = change(DeepseekV2Config, DeepseekV2ForCausalLM)
third = change(DeepseekV3Config, DeepseekV3ForCausalLM)
print(f"transformers {transformers.__version__}: largest change of the logits by norm_topk_prob")
print(f"deepseek_v2 {second:.3g}, deepseek_v3 {third:.3g}")
assert third > 0.01
assert second == 0, "the behavior has changed: deepseek_v2 normalizes"
EOF
