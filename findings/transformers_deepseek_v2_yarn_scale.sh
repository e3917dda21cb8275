#!/usr/bin/env bash
# Library: transformers 5.12.1 and 5.23.0 (torch 2.13.0, Python 3.11); 4.57.6 is like the former.
# Behavior: DeepSeek-V2's published YaRN section (factor 40, mscale and mscale_all_dim 0.707) makes
#     the softmax scale of attention (0.1 * 0.707 * ln 40 + 1)^2 = 1.59 times head_dim^-0.5, as in
#     DeepSeek's own code. deepseek_v2 of 5.12.1 leaves the factor out, deepseek_v3 of the same
#     release has it, and deepseek_v2 of 5.23.0 has it too.
# Surprise: one folder, read without a warning by both, gives other logits: at every position, not
#     only beyond the original context.
# Seen: the scale over head_dim^-0.5
#     transformers 5.12.1: deepseek_v2 1.0000, deepseek_v3 1.5896
#     transformers 5.23.0: deepseek_v2 1.5896, deepseek_v3 1.5896
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" << 'PY'
import sys

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
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}


def factor(model):
    return model.model.layers[0].self_attn.scaling * 16**0.5


second = factor(DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES)))
third = factor(DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)))
print(f"transformers {transformers.__version__}: deepseek_v2 {second:.4f}, deepseek_v3 {third:.4f}")
assert abs(third - 1.5896) < 1e-4
assert abs(second - float(sys.argv[1])) < 1e-4, "the behavior has changed"
PY
for expected in 5.12.1=1 5.23.0=1.5896; do
    "$work/venv/bin/pip" install -q "transformers==${expected%=*}"
    CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore \
        "$work/check.py" "${expected#*=}"
done
