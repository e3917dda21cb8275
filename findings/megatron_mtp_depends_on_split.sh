#!/usr/bin/env bash
# Library: megatron-core 0.19.2 (torch 2.13.0, Python 3.12, where torch is a download of several GB).
# Behavior: with calculate_per_token_loss, process_mtp_loss multiplies the multi-token-prediction
#     losses of each micro-batch by its own tokens before / tokens after the shift. The gradient of
#     the same global batch depends on how it is split into micro-batches.
# Surprise: the option divides once by the tokens of the global batch just so that the split does
#     not matter, and for the main loss it does not. Here a sequence of 2 tokens (1 after the shift)
#     counts double when it is a micro-batch of its own: factor 2 beside 16/15, and 18/16 for
#     both when they are together.
# Seen: megatron-core 0.19.2: one micro-batch of two sequences against two of one:
#     main loss, gradients differ by 0.0%; MTP loss, gradients differ by 19.8%
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q megatron-core==0.19.2 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore - << 'EOF'
from importlib.metadata import version

import torch
from megatron.core.transformer.multi_token_prediction import process_mtp_loss
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import cross_entropy

LENGTH, HIDDEN, VOCABULARY = 16, 8, 20
config = TransformerConfig(
    num_layers=1,
    hidden_size=HIDDEN,
    num_attention_heads=1,
    mtp_num_layers=1,
    mtp_loss_scaling_factor=1.0,
    calculate_per_token_loss=True,
)

torch.manual_seed(0)
weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
hidden_states = torch.randn(2 * LENGTH, 2, HIDDEN, dtype=torch.float64)  # main, then MTP
labels = torch.randint(VOCABULARY, (2, LENGTH))
loss_mask = torch.zeros(2, LENGTH, dtype=torch.float64)
loss_mask[0, :] = 1
loss_mask[1, :2] = 1


def output_layer(hidden, **_):
    return hidden @ weight.T, None


def token_losses(labels, logits):
    return cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


def main_loss(rows):
    logits, _ = output_layer(hidden_states[:LENGTH, rows])
    return (token_losses(labels[rows], logits) * loss_mask[rows]).sum()


def mtp_loss(rows):
    # What comes back is the main hidden states, with the gradient of the MTP loss attached.
    return process_mtp_loss(
        hidden_states=hidden_states[:, rows],
        labels=labels[rows],
        loss_mask=loss_mask[rows],
        output_layer=output_layer,
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,  # read for logging alone, which needs CUDA
        compute_language_model_loss=token_losses,
        config=config,
    ).sum()


def gradient(objective, micro_batches):
    """Leave out the division by the tokens of the global batch: it is the same for every split."""
    return torch.autograd.grad(sum(objective(rows) for rows in micro_batches), weight)[0]


def difference(objective):
    together, apart = gradient(objective, [[0, 1]]), gradient(objective, [[0], [1]])
    return ((apart - together).norm() / together.norm()).item()


main, mtp = difference(main_loss), difference(mtp_loss)
print(
    f"megatron-core {version('megatron-core')}: "
    "one micro-batch of two sequences against two of one:"
)
print(f"main loss, gradients differ by {main:.1%}; MTP loss, gradients differ by {mtp:.1%}")
assert main < 1e-12
assert mtp > 0.01, "the behavior has changed: the split no longer matters"
EOF
