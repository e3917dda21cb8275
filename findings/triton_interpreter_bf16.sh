#!/usr/bin/env bash
# Library: triton 3.7.1 (its interpreter, TRITON_INTERPRET=1; torch 2.13.0, Python 3.11, no GPU).
# Behavior: a kernel run by the interpreter loads bf16 tensors as the integers of their bits and
#     computes with those: 2 * 3 gives 0, and tl.dot of 2s and 3s over 16 gives 4.3e9 where 96 is
#     right. fp16 and fp32 are right, and so is bf16 that the kernel converts to fp32 first.
# Surprise: nothing warns, and the interpreter is the documented way to test a kernel without a GPU.
# Seen: triton 3.7.1
#     float16: product 6.0, dot 96.0
#     bfloat16: product 0.0, dot 4311744512.0, product in float32 6.0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q triton==3.7.1 torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" << 'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def multiply(a, b, out, N: tl.constexpr, FP32: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    if FP32:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(out + at, x * y)


def run(dtype):
    a, b = torch.full((16, 16), 2.0, dtype=dtype), torch.full((16, 16), 3.0, dtype=dtype)
    summed, same, wide = torch.zeros(16, 16), torch.zeros(16, dtype=dtype), torch.zeros(16)
    dot[(1,)](a, b, summed, 16)
    multiply[(1,)](a[0], b[0], same, 16, False)
    multiply[(1,)](a[0], b[0], wide, 16, True)
    return same[0].item(), summed[0, 0].item(), wide[0].item()


print(f"triton {triton.__version__}")
half, brain = run(torch.float16), run(torch.bfloat16)
print(f"float16: product {half[0]}, dot {half[1]}")
print(f"bfloat16: product {brain[0]}, dot {brain[1]}, product in float32 {brain[2]}")
assert half == (6.0, 96.0, 6.0)
assert brain[2] == 6.0
assert brain[0] != 6.0 and brain[1] != 96.0, "the interpreter computes with bf16 now"
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/check.py"
