"""A pretrained MoE model as the start of a CoE model ("upcycling").

Every iteration gets a copy of the model's router, and an iteration scale of zero: before the first
step the CoE model computes what the MoE model did (`CoEConfig.coe_upcycled`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.conversion.folders import HF_CONFIG, check_absent
from megatron_coe.conversion.import_hf import open_folder
from megatron_coe.conversion.initial_checkpoint import write_initial_checkpoint
from megatron_coe.conversion.stored_model import StoredModel, open_checkpoint, provider_of
from megatron_coe.hf.weight_names import Weight, weights

STANDARD_MOE = {"coe_iterations": 1, "coe_residual": "outer"}
"""The fields that make a CoE model a standard MoE model."""


def upcycle(
    source: Path, checkpoint: Path, iterations: int = 2, tokenizer: Path | None = None
) -> Path:
    """Write a standard MoE model as a checkpoint of a CoE model, from which training starts.

    Args:
        source: a Hugging Face folder, or a training checkpoint as `to_hf` takes it.
        checkpoint: a new folder.
        iterations: C of the CoE model.
        tokenizer: that of a training checkpoint without a copy; see `find_tokenizer`.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the run that starts there.

    Raises:
        ValueError: the source is no standard MoE model, or a weight of it is missing, left over, of
            another shape, or an expert's and all zero; the message names it.
        OSError: a file cannot be read or written.
    """
    if iterations < 2:
        raise ValueError(f"iterations={iterations}: give 2 or more, 1 is the MoE model itself")
    check_absent(checkpoint)
    is_folder = (source / HF_CONFIG).is_file()
    if is_folder and tokenizer:
        raise ValueError(f"{source} is a Hugging Face folder: its own tokenizer goes with it")
    moe = open_folder(source) if is_folder else open_checkpoint(source, tokenizer)
    return write_initial_checkpoint(upcycled(moe, iterations), checkpoint)


def upcycled(moe: StoredModel, iterations: int) -> StoredModel:
    """Return the CoE model that a standard MoE model becomes.

    Raises: ValueError if it is no standard MoE model.
    """
    for field, value in STANDARD_MOE.items():
        if getattr(moe.provider, field) != value:
            raise ValueError(
                f"{moe.path}: {field}={getattr(moe.provider, field)!r}: only a standard MoE model "
                f"can be upcycled, which has {value!r}"
            )
    if not any(moe.provider.moe_layer_pattern):
        raise ValueError(f"{moe.path}: has no MoE layer to be upcycled")
    model = {
        **moe.settings.model,
        "vocab_size": moe.provider.vocab_size,
        "coe_iterations": iterations,
        "coe_residual": "outer",
        "coe_independent_gate": True,
        "coe_upcycled": True,
    }
    settings = replace(moe.settings, model=model)
    provider = provider_of(settings)
    origins = {(_without_iteration(weight), weight.layer): weight for weight in moe.table}

    def read(weight: Weight) -> Tensor:
        key = (_without_iteration(weight), weight.layer)
        if key in origins:
            return moe.read(origins[key])
        # An iteration scale, which has the shape and dtype of a norm.
        return torch.zeros_like(moe.read(origins["decoder.final_layernorm.weight", None]))

    return replace(moe, settings=settings, provider=provider, table=weights(provider), read=read)


def _without_iteration(weight: Weight) -> str:
    """Return a weight's name, the same for the routers of all iterations and for a single one."""
    return re.sub(r"\.router\.\d+\.", ".router.", weight.keys[0])
