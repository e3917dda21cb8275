#!/usr/bin/env bash
# Library: transformers 5.23.0 (torch 2.13.0, Python 3.11); 4.57.6 and 5.12.1 do the same,
#     5.24.0 does not.
# Behavior: with gradient checkpointing enabled and the model in train(), greedy generate with its
#     default use_cache=True writes other tokens than with use_cache=False. The layers drop the
#     cache, but generate still feeds them the newest token alone: after the first new token each
#     is predicted from its predecessor only.
# Surprise: a cache is an optimization. The log says "Setting `use_cache=False`" (once), and setting
#     it gives the right tokens; the call that was warned about does not. A loop that
#     samples between two training steps gets tokens that the model would not write.
# Seen: transformers 5.23.0: eval [28, 20, 36, 1, 6, 44, 25, 46]
#     train, use_cache=False [28, 20, 36, 1, 6, 44, 25, 46]
#     train, default [28, 57, 69, 27, 43, 15, 91, 0]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - << 'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT, NEW = 9, 8
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,  # clear winners, so that greedy decoding has no ties
        attention_dropout=0.0,  # nothing of the model differs between train() and eval()
    )
)
prompt = torch.randint(1, 96, (1, PROMPT))


def continue_prompt(**options):
    written = model.generate(
        prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return written[0, PROMPT:].tolist()


model.eval()
evaluated = continue_prompt()
model.train()
assert continue_prompt() == evaluated  # train() alone changes nothing
model.gradient_checkpointing_enable()
uncached, default = continue_prompt(use_cache=False), continue_prompt()

print(f"transformers {transformers.__version__}: eval {evaluated}")
print(f"train, use_cache=False {uncached}")
print(f"train, default {default}")
assert uncached == evaluated
assert default[0] == evaluated[0]
assert default != evaluated, "the behavior has changed: the default writes the right tokens"
EOF
