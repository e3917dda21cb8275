#!/usr/bin/env bash
# Library: megatron-core 0.16.1 (torch 2.13.0, Python 3.11); 0.19.2 does the same.
# Behavior: with a padding_mask, the sequence-level auxiliary loss ("seq_aux_loss") divides the sums
#     of every sequence by the mean number of valid tokens, twice. A sequence of n tokens counts
#     (n / mean)^2 times: 2.56, 1.44, 0.64 and 0.16 for 16, 12, 8 and 4 tokens.
# Surprise: the loss is the mean over the sequences of each one's own auxiliary loss, as it is when
#     all are equally long. One would expect padding to change nothing; instead it makes the
#     longest of these sequences weigh 16 times the shortest.
# Seen: megatron-core 0.16.1: weight of each sequence in the gradient:
#     equally long 1.00 1.00 1.00 1.00; 16, 12, 8, 4 tokens 2.56 1.44 0.64 0.16
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q megatron-core==0.16.1 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore - "$work/store" << 'EOF'
import sys
from importlib.metadata import version

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

SEQ_LENGTH, BATCH, EXPERTS = 16, 4, 8
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", world_size=1, rank=0
)
groups = ProcessGroupCollection()
groups.tp = groups.cp = groups.tp_cp = groups.tp_dp_cp = torch.distributed.group.WORLD
config = TransformerConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=1,
    num_moe_experts=EXPERTS,
    moe_router_topk=2,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=1.0,
)
router = TopKRouter(config, pg_collection=groups).train()
torch.manual_seed(0)
logits = torch.randn(SEQ_LENGTH, BATCH, EXPERTS)


def aux_gradient(logits, padding_mask=None):
    """Gradient of the auxiliary loss alone, which is attached to the probabilities."""
    logits = logits.clone().requires_grad_()
    probs, _ = router.routing(logits, padding_mask=padding_mask)
    return torch.autograd.grad((0 * probs).sum(), logits)[0]


def sequence_weights(lengths):
    """Compare a padded batch with each sequence routed by itself, without padding."""
    padding_mask = torch.arange(SEQ_LENGTH)[:, None] >= torch.tensor(lengths)  # True = padding
    batch = aux_gradient(logits, padding_mask)
    assert not batch[padding_mask].any()
    weights = []
    for row, length in enumerate(lengths):
        got = batch[:length, row]
        alone = aux_gradient(logits[:length, row : row + 1])[:, 0] / BATCH
        weight = (got * alone).sum() / alone.square().sum()
        torch.testing.assert_close(got, weight * alone, rtol=1e-4, atol=1e-7)
        weights.append(weight.item())
    return weights


def shown(numbers):
    return " ".join(f"{number:.2f}" for number in numbers)


EQUAL, UNEQUAL = [10, 10, 10, 10], [16, 12, 8, 4]  # 10 valid tokens on average
equal, unequal = sequence_weights(EQUAL), sequence_weights(UNEQUAL)
torch.distributed.destroy_process_group()
print(f"megatron-core {version('megatron-core')}: weight of each sequence in the gradient:")
print(f"equally long {shown(equal)}; 16, 12, 8, 4 tokens {shown(unequal)}")
assert shown(equal) == "1.00 1.00 1.00 1.00"
assert shown(unequal) == shown((length / 10) ** 2 for length in UNEQUAL), "the behavior has changed"
EOF
