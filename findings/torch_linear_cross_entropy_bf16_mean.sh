#!/usr/bin/env bash
# Library: torch 2.13.0 (Python 3.11, CPU).
# Behavior: F.linear_cross_entropy(..., options=LinearCrossEntropyOptions(...)), the chunked one,
#     adds the chunks' parts of a bf16 mean in bf16, so that the loss it returns drifts with the
#     number of chunks. acc_dtype=torch.float32 and acc_policy="accurate", which are there for the
#     precision of sums, do not change that. With reduction="none" each loss is right, and the
#     gradient of the mean is as without options, to the precision of bf16.
# Surprise: the function without options rounds once, so the option that only saves memory changes
#     the loss by percents; a curve of it has offsets and jumps where the batch size changes.
# Seen: torch 2.13.0: 4,096 tokens, 2,000 classes; the mean in float64 is 10.4496
#     without options 10.4375
#     chunks of 1024: 10.4375, of 256: 10.375, of 64: 10.625, of 16: 9.125; all with acc_dtype=float32
#     chunks of 16, the mean of reduction="none" 10.4497
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" << 'PY'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

torch.manual_seed(0)
x, weight = torch.randn(4096, 64).bfloat16(), (torch.randn(2000, 64) * 0.3).bfloat16()
target = torch.randint(2000, (4096,))


def chunked(size, reduction="mean"):
    options = LinearCrossEntropyOptions(batch_chunk_size=size, acc_dtype=torch.float32)
    return linear_cross_entropy(x, weight, target, options=options, reduction=reduction)


right = linear_cross_entropy(x.double(), weight.double(), target).item()
whole = linear_cross_entropy(x, weight, target).item()
means = {size: chunked(size).item() for size in (1024, 256, 64, 16)}
tokens = chunked(16, "none").double().mean().item()
print(f"torch {torch.__version__}: the mean in float64 is {right:.4f}")
print(f"without options {whole}")
print(", ".join(f"chunks of {size}: {mean}" for size, mean in means.items()))
print(f'chunks of 16, the mean of reduction="none" {tokens:.4f}')
assert abs(whole - right) < 0.04 and abs(tokens - right) < 0.01
assert abs(means[16] / right - 1) > 0.05, "the parts of the mean are summed in fp32 now"
PY
CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore "$work/check.py"
