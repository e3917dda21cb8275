"""Selective recomputation: keep Megatron-Core's current line from compiling in the first step.

0.19's `CheckpointWithoutOutput` hands a recomputed output over by a C++ extension that it builds in
the first backward pass of every process: 20 seconds, and where a node has no compiler or ninja the
run ends there. Here it is built before the first step, or the output is copied, as 0.16 does.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

ShareStorage = Callable[[Tensor, Tensor], None]


def install() -> None:
    """Choose between sharing and copying at the first call. Idempotent; nothing on 0.16."""
    build = getattr(random, "_get_share_storage", None)
    if build is not None and not hasattr(build, "cache_info"):
        random._get_share_storage = functools.cache(functools.partial(_share_or_copy, build))


def prepare_recompute(config: TransformerConfig) -> None:
    """Build the extension that this configuration's first backward pass would build."""
    if config.recompute_granularity == "selective" and hasattr(random, "_get_share_storage"):
        random._get_share_storage()


def copy_storage(output: Tensor, recomputed: Tensor) -> None:
    """Fill the freed storage of `output` with that of `recomputed`, below autograd's version count.

    One copy in memory, where Megatron's extension points one storage at the other.
    """
    storage, source = output.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _share_or_copy(build: Callable[[], ShareStorage]) -> ShareStorage:
    if not torch.cuda.is_available():
        return copy_storage  # a copy costs less than a compiler run
    try:
        return build()
    except (ImportError, OSError, RuntimeError) as error:  # no ninja, no compiler, no headers
        warnings.warn(
            "Megatron's extension for selective recomputation could not be built "
            f"({str(error).splitlines()[0]}): recomputed outputs are copied instead. Install a C++ "
            "compiler and ninja on the compute nodes to save the copy",
            RuntimeWarning,
            stacklevel=2,
        )
        return copy_storage
