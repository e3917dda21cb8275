#!/usr/bin/env bash
# Library: megatron-core 0.16.1 and 0.19.2 (torch 2.13.0, Python 3.12, CPU).
# Behavior: from bf16 logits, the router's dtype by default, 0.16.1 rounds the scores to bf16 before
#     it takes the top-k; 0.19.2 takes it from fp32 scores. Scores near 1 share few bf16 values, so
#     under sigmoid many of them tie, and an expert with a smaller logit is chosen. An expert bias in
#     fp32 does not help, as it is added to the rounded scores.
# Surprise: sigmoid and softmax keep the order of logits, so neither should change which are largest;
#     and a model goes on from its checkpoint with other experts for one token in twenty when
#     Megatron-Core is upgraded.
# Seen: 4,096 tokens, 64 experts, top-6, logits of unit variance; tokens with other experts than
#     from the same logits in fp32
#     megatron-core 0.16.1: sigmoid 223, sigmoid with expert bias 223, softmax before top-k 12
#     megatron-core 0.19.2: sigmoid 0, sigmoid with expert bias 0, softmax before top-k 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 packaging

cat > "$work/check.py" << 'PY'
import sys

import megatron.core
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

CASES = {
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid with expert bias": {"score_function": "sigmoid", "expert_bias": torch.zeros(64)},
    "softmax before top-k": {"use_pre_softmax": True},
}
torch.manual_seed(0)
logits = torch.randn(4096, 64).bfloat16()


def others(case):
    _, chosen = topk_routing_with_score_function(logits, 6, **case)
    _, right = topk_routing_with_score_function(logits.float(), 6, **case)
    return (chosen != right).any(dim=1).sum().item()


counts = {name: others(case) for name, case in CASES.items()}
print(f"megatron-core {megatron.core.__version__}: ", end="")
print(", ".join(f"{name} {count}" for name, count in counts.items()))
if sys.argv[1] == "0.16.1":
    assert counts["sigmoid"] > 100 and counts["sigmoid with expert bias"] > 100
else:
    assert not any(counts.values()), "the choice is from rounded scores again"
PY
for version in 0.16.1 0.19.2; do
    "$work/venv/bin/pip" install -q --no-deps "megatron-core==$version"
    CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore "$work/check.py" "$version"
done
