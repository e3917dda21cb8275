#!/usr/bin/env bash
# Library: torch 2.13.0, its gloo backend (Python 3.11, CPU), four ranks.
# Behavior: all_reduce of bf16 tensors adds in bf16 round a ring, and each part of a tensor begins at
#     another rank. Four ranks with 256, 1, 1, 1 in every element sum to 260 in some elements of the
#     tensor and to 256 in others; the exact sum is 259.
# Surprise: the elements of each rank's tensor are all equal, and those of the sum are not. The same
#     gradient is rounded otherwise where it lies elsewhere in a bucket, so that bucket sizes and
#     the order of parameters change a run. fp32 tensors give 259 everywhere.
# Seen: torch 2.13.0
#     rank 0 has 256: bfloat16 [260, 260, 256, 256, 256, 256, 260, 260], float32 [259, ...]
#     rank 3 has 256: bfloat16 [256, 256, 256, 256, 260, 260, 260, 260], float32 [259, ...]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" << 'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 4


def reduced(rank, large, dtype):
    tensor = torch.full((8,), 256.0 if rank == large else 1.0, dtype=dtype)
    dist.all_reduce(tensor)
    return tensor.tolist()


def run(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for large in (0, 3):
        half = reduced(rank, large, torch.bfloat16)
        full = reduced(rank, large, torch.float32)
        if rank == 0:
            print(f"rank {large} has 256: bfloat16 {half}, float32 {full}", flush=True)
        assert full == [259.0] * 8
        assert set(half) == {256.0, 260.0}, "the sum no longer depends on the position"
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"torch {torch.__version__}", flush=True)
    mp.spawn(run, (sys.argv[1],), nprocs=RANKS)
PY
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 "$work/venv/bin/python" -W ignore \
    "$work/check.py" "$work/store"
