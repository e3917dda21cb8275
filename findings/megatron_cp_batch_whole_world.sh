#!/usr/bin/env bash
# Library: megatron-core 0.19.2 (torch 2.13.0, Python 3.12, where torch is a download of several GB).
# Behavior: get_batch_on_this_cp_rank(batch, is_hybrid_cp=False) without its optional cp_group takes
#     all processes for the context-parallel group. With data parallelism 2 and context parallelism
#     1 each data-parallel rank keeps half of its own sequence (zig-zag chunks) and drops the rest.
# Surprise: cp_group defaults to None, and parallel_state knows that the context-parallel size is 1
#     (0.16.1, without is_hybrid_cp, asks it). Nothing fails: training goes on with half of
#     the tokens, and the positions 0, 1, 6 and 7 pass for neighbors.
# Seen: megatron-core 0.19.2: data parallel 2, context parallel 1
#     rank 0: [0, 1, 6, 7], with cp_group [0, 1, 2, 3, 4, 5, 6, 7]
#     rank 1: [102, 103, 104, 105], with cp_group [100, 101, 102, 103, 104, 105, 106, 107]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q megatron-core==0.19.2 torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" << 'EOF'
import sys
from importlib.metadata import version

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", world_size=2, rank=rank)
parallel_state.initialize_model_parallel(context_parallel_size=1)
data_parallel = parallel_state.get_data_parallel_world_size()
context_parallel = parallel_state.get_context_parallel_world_size()
assert (data_parallel, context_parallel) == (2, 1)

tokens = torch.arange(8)[None] + 100 * rank


def sliced(**groups):
    batch = get_batch_on_this_cp_rank({"tokens": tokens}, is_hybrid_cp=False, **groups)
    return batch["tokens"][0].tolist()


default = sliced()
explicit = sliced(cp_group=parallel_state.get_context_parallel_group())
torch.distributed.destroy_process_group()

if rank == 0:
    print(
        f"megatron-core {version('megatron-core')}: "
        f"data parallel {data_parallel}, context parallel {context_parallel}"
    )
print(f"rank {rank}: {default}, with cp_group {explicit}")
assert explicit == tokens[0].tolist()
assert default == ([0, 1, 6, 7], [102, 103, 104, 105])[rank], "the behavior has changed"
EOF

export CUDA_VISIBLE_DEVICES=''
"$work/venv/bin/python" -W ignore "$work/check.py" 1 "$work/store" > "$work/rank1" &
"$work/venv/bin/python" -W ignore "$work/check.py" 0 "$work/store"
wait $!
cat "$work/rank1"
