"""A pretrained mixture of experts as the start of a chain of experts ("upcycling").

Every iteration gets a copy of the mixture's router, and a gate, which starts closed: before its
first step the chain computes what the mixture did (`CoEConfig.coe_upcycled`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.conversion.folders import HF_CONFIG, check_absent
from megatron_coe.conversion.model import (
    StoredModel,
    open_checkpoint,
    open_folder,
    provider_of,
    write_model,
)
from megatron_coe.hf.weight_names import Weight, weights

MIXTURE = {"coe_iterations": 1, "coe_residual": "outer"}
"""What a plain mixture of experts is among the chains."""


def upcycle(
    source: Path, checkpoint: Path, iterations: int = 2, tokenizer: Path | None = None
) -> Path:
    """Write a mixture of experts as a checkpoint of a chain, which training starts from.

    Args:
        source: a Hugging Face folder, or a training checkpoint as `to_hf` takes it.
        checkpoint: a new folder.
        iterations: C of the chain.
        tokenizer: that of a training checkpoint without a copy; see `find_tokenizer`.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the run that starts there.

    Raises:
        ValueError: the source is no mixture of experts, or a weight of it is missing, left over, of
            another shape, or an expert's and all zero; the message names it.
        OSError: a file cannot be read or written.
    """
    if iterations < 2:
        raise ValueError(f"iterations={iterations}: give 2 or more, one is the mixture itself")
    check_absent(checkpoint)
    is_folder = (source / HF_CONFIG).is_file()
    if is_folder and tokenizer:
        raise ValueError(f"{source} is a Hugging Face folder: its own tokenizer goes with it")
    mixture = open_folder(source) if is_folder else open_checkpoint(source, tokenizer)
    return write_model(chain_of(mixture, iterations), checkpoint)


def chain_of(mixture: StoredModel, iterations: int) -> StoredModel:
    """The chain that a mixture becomes. Raises: ValueError if it is none."""
    for field, value in MIXTURE.items():
        if getattr(mixture.provider, field) != value:
            raise ValueError(
                f"{mixture.path}: {field}={getattr(mixture.provider, field)!r}: only a mixture of "
                f"experts can be upcycled, which has {value!r}"
            )
    if not any(mixture.provider.moe_layer_pattern):
        raise ValueError(f"{mixture.path}: has no layer of experts to be upcycled")
    model = {
        **mixture.settings.model,
        "vocab_size": mixture.provider.vocab_size,
        "coe_iterations": iterations,
        "coe_residual": "outer",
        "coe_independent_gate": True,
        "coe_upcycled": True,
    }
    settings = replace(mixture.settings, model=model)
    provider = provider_of(settings)
    origins = {(_without_iteration(weight), weight.layer): weight for weight in mixture.table}

    def read(weight: Weight) -> Tensor:
        key = (_without_iteration(weight), weight.layer)
        if key in origins:
            return mixture.read(origins[key])
        # A closed gate; it has the shape and type of a norm.
        return torch.zeros_like(mixture.read(origins["decoder.final_layernorm.weight", None]))

    return replace(
        mixture, settings=settings, provider=provider, table=weights(provider), read=read
    )


def _without_iteration(weight: Weight) -> str:
    """A weight's name, the same for all iterations' routers, and for the only one of a mixture."""
    return re.sub(r"\.router\.\d+\.", ".router.", weight.keys[0])
