"""Seeds, generators and deterministic kernels."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)


def use_deterministic_kernels() -> None:
    """Make torch, cuBLAS and Transformer Engine sum in a fixed order on a GPU (call it first).

    New memory is not filled with NaN, which torch then does to every tensor that is made empty, a
    pass over each. It protects programs that read what they have not written: this one does not,
    which a test shows by filling it (`tests/unit/distributed/test_seeds.py`).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(seed: int) -> None:
    """Seed all generators; pipeline stages differ, so that their dropout does.

    Initial weights depend on none of them: see `megatron_coe.model.weight_init`.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def rng_state() -> dict[str, Any]:
    """Return the state of this rank's random number generators."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state that `rng_state` has returned."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))  # which it then writes to
