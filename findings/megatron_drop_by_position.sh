#!/usr/bin/env bash
# Library: megatron-core 0.19.2 (torch 2.13.0, Python 3.12, CPU); 0.16.1 does the same.
# Behavior: apply_router_token_dropping with drop_policy="position" takes the top-k of a map that is
#     1 for every token of an expert, so that all of them tie, and unsorted: of 64 tokens for
#     an expert with room for 16 it keeps the tokens 33 to 48.
# Surprise: the policy is named for the order of tokens, and Switch-style dropping keeps the first
#     ones; what is kept here follows from how topk breaks ties on the device.
# Seen: megatron-core 0.19.2: kept of 64 with room for 16: 33 ... 48
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 packaging
"$work/venv/bin/pip" install -q --no-deps megatron-core==0.19.2

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore - << 'EOF'
import megatron.core
import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

chosen = torch.zeros(64, 4, dtype=torch.bool)
chosen[:, 0] = True
_, kept = apply_router_token_dropping(
    chosen.float(), chosen, router_topk=1, capacity_factor=1.0, drop_policy="position"
)
tokens = kept[:, 0].nonzero().flatten().tolist()
print(f"megatron-core {megatron.core.__version__}: kept of 64 with room for 16: {tokens}")
assert len(tokens) == 16
assert tokens != list(range(16)), "the policy keeps the first tokens now"
EOF
