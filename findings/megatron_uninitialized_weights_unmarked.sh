#!/usr/bin/env bash
# Library: megatron-core 0.16.1 (torch 2.13.0, Python 3.11).
# Behavior: with perform_initialization=False, tensor-parallel linear layers and embeddings do not
#     mark their weights as tensor-parallel. What computes a norm then takes the shards of every
#     tensor-parallel rank but the first for duplicates and leaves them out: gradient norm,
#     clipping and the log are of one shard. 0.19.2 marks them.
# Surprise: the field says whether weights are drawn, which a run that loads a checkpoint does not
#     need; how gradients are clipped has nothing to do with that, and nothing fails.
# Seen: megatron-core 0.16.1, tensor-parallel rank 1 of 2: does the weight count in the norm?
#     ColumnParallelLinear: initialized True, not initialized False
#     RowParallelLinear: initialized True, not initialized False
#     VocabParallelEmbedding: initialized True, not initialized False
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q megatron-core==0.16.1 torch==2.13.0 numpy==2.4.6

cat > "$work/check.py" << 'EOF'
from importlib.metadata import version

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    param_is_not_tensor_parallel_duplicate,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
parallel_state.initialize_model_parallel(
    tensor_model_parallel_size=2, create_gloo_process_groups=False
)


def modules(draws):
    config = ModelParallelConfig(
        tensor_model_parallel_size=2, use_cpu_initialization=True, perform_initialization=draws
    )
    options = {"config": config, "init_method": torch.nn.init.normal_}
    linear = {**options, "bias": False, "skip_bias_add": False}
    yield ColumnParallelLinear(8, 8, **linear)
    yield RowParallelLinear(8, 8, **linear, input_is_parallel=True)
    yield VocabParallelEmbedding(16, 8, **options)


print(
    f"megatron-core {version('megatron-core')}, tensor-parallel rank 1 of 2: "
    "does the weight count in the norm?"
)
for drawn, undrawn in zip(modules(True), modules(False), strict=True):
    assert drawn.weight.shape == undrawn.weight.shape  # half of the whole, either way
    counts = [param_is_not_tensor_parallel_duplicate(m.weight) for m in (drawn, undrawn)]
    print(f"{type(drawn).__name__}: initialized {counts[0]}, not initialized {counts[1]}")
    assert counts == [True, False], "the behavior has changed"
EOF
CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore "$work/check.py"
