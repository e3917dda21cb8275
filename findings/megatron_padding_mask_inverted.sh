#!/usr/bin/env bash
# Library: megatron-core 0.16.1 (torch 2.13.0, Python 3.11); 0.19.2 does the same.
# Behavior: TopKRouter and MoELayer document padding_mask as "True for valid tokens"; the router takes
#     True for padding. Given a mask as documented, the auxiliary loss balances the padding, and
#     the valid tokens get no gradient from it at all.
# Surprise: the shape is right either way and nothing fails: the loss is of the usual size.
#     GPTModel and TransformerLayer document the same argument the other way round, and are right.
# Seen: megatron-core 0.16.1: norm of the auxiliary loss's gradient with padding_mask True for
#     valid tokens: valid 0, padding 0.0331; True for padding: valid 0.0175, padding 0
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

SEQ_LENGTH, EXPERTS = 16, 8
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
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=1.0,
)
router = TopKRouter(config, pg_collection=groups).train()
lengths = torch.tensor([16, 12, 8, 4])
valid = torch.arange(SEQ_LENGTH)[:, None] < lengths
torch.manual_seed(0)
logits = torch.randn(SEQ_LENGTH, len(lengths), EXPERTS)


def gradient_norms(padding_mask):
    """Gradient of the auxiliary loss alone, on the logits of valid tokens and of padding."""
    leaf = logits.clone().requires_grad_()
    probs, _ = router.routing(leaf, padding_mask=padding_mask)
    gradient = torch.autograd.grad((0 * probs).sum(), leaf)[0]
    return gradient[valid].norm().item(), gradient[~valid].norm().item()


documented, inverted = gradient_norms(valid), gradient_norms(~valid)
torch.distributed.destroy_process_group()
print(
    f"megatron-core {version('megatron-core')}: norm of the auxiliary loss's gradient with "
    f"padding_mask True for valid tokens: valid {documented[0]:.3g}, padding {documented[1]:.3g}; "
    f"True for padding: valid {inverted[0]:.3g}, padding {inverted[1]:.3g}"
)
for method in (TopKRouter.routing, TopKRouter.forward):
    assert "True for valid tokens" in method.__doc__, "the documentation has changed"
assert documented[0] == 0 < documented[1], "the behavior has changed"
assert inverted[1] == 0 < inverted[0]
EOF
