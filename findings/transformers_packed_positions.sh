#!/usr/bin/env bash
# Library: transformers 5.24.0 (torch 2.13.0, Python 3.11); 4.57.6, 5.12.1 and 5.23.0 do the same.
# Behavior: two sequences packed in a row with position_ids that restart at 0 are kept apart
#     (block-diagonal attention) with use_cache=False, and see each other with use_cache=True,
#     the default of a forward pass. Gradient checkpointing turns the cache off, and so the same
#     line of a training loop computes another loss with it than without.
# Surprise: the only difference is an empty cache that nobody reads, and an option that trades time
#     for memory decides whether sequences see each other. No warning says so.
# Seen: transformers 5.24.0: largest logit error of the packed sequences against one at a time:
#     use_cache=False 0, use_cache=True 11.6, default 11.6
#     in training: default 11.6, default with gradient checkpointing 0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        attention_dropout=0.0,
    )
).eval()
first, second = torch.randint(1, 96, (1, 4)), torch.randint(1, 96, (1, 5))
packed = torch.cat([first, second], dim=1)
position_ids = torch.cat([torch.arange(4), torch.arange(5)])[None]
apart = torch.cat([model(first).logits, model(second).logits], dim=1)


def error(**options):
    together = model(packed, position_ids=position_ids, **options).logits
    return (together - apart).abs().max().item()


without, cached, default = error(use_cache=False), error(use_cache=True), error()
model.train()
training = error()
model.gradient_checkpointing_enable()
checkpointed = error()

print(
    f"transformers {transformers.__version__}: largest logit error of the packed sequences against "
    f"one at a time: use_cache=False {without:.3g}, use_cache=True {cached:.3g}, "
    f"default {default:.3g}"
)
print(
    f"in training: default {training:.3g}, default with gradient checkpointing {checkpointed:.3g}"
)
assert max(without, checkpointed) < 1e-4
assert min(cached, default, training) > 1, "the behavior has changed: sequences are kept apart"
EOF
