"""A model with its experts in another order, so that those of one rank belong together.

Consecutive experts share an expert-parallel rank. An order is a permutation of a layer's experts;
what each of its routers knows of an expert moves with it, so that the model computes the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.conversion.folders import HF_CONFIG, check_absent, read_json
from megatron_coe.conversion.import_hf import open_folder
from megatron_coe.conversion.initial_checkpoint import write_initial_checkpoint
from megatron_coe.conversion.stored_model import StoredModel, open_checkpoint
from megatron_coe.hf.weight_names import Weight
from megatron_coe.utils.files import atomic_path

PLACEMENT_FILE = "placement.json"
"""What `coe analyze --placement` writes."""

Orders = Mapping[int, Sequence[int]]
"""Expert at each place, by number of the layer from 1."""


def place(
    source: Path, checkpoint: Path, placement: Path, ep: int, tokenizer: Path | None = None
) -> Path:
    """Write a model with its experts placed as a checkpoint, from which training starts.

    Args:
        source: a Hugging Face folder, or a training checkpoint as `to_hf` takes it.
        checkpoint: a new folder.
        placement: of `coe analyze --placement`.
        ep: expert-parallel size whose placement is taken.
        tokenizer: that of a training checkpoint without a copy; see `find_tokenizer`.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the run that starts there.

    Raises:
        ValueError: the placement does not fit the model, its experts are assigned by groups, or a
            weight is missing, left over or of another shape; the message names it.
        OSError: a file cannot be read or written.
    """
    check_absent(checkpoint)
    orders = read_orders(placement, ep)
    is_folder = (source / HF_CONFIG).is_file()
    if is_folder and tokenizer:
        raise ValueError(f"{source} is a Hugging Face folder: its own tokenizer goes with it")
    model = open_folder(source) if is_folder else open_checkpoint(source, tokenizer)
    return write_initial_checkpoint(placed(model, orders, placement), checkpoint)


def placed(model: StoredModel, orders: Orders, source: object = "orders") -> StoredModel:
    """Return the model with the experts of each layer in another order.

    Args:
        source: of the orders, for messages.

    Raises: ValueError: an order is missing, left over or no permutation of the layer's experts, or
        groups of consecutive experts decide the assignment.
    """
    provider = model.provider
    if provider.moe_router_num_groups:
        raise ValueError(
            f"{model.path}: moe_router_num_groups={provider.moe_router_num_groups}: groups are "
            "consecutive experts, so their order is part of the model"
        )
    layers = [
        layer for layer, has_experts in enumerate(provider.moe_layer_pattern, 1) if has_experts
    ]
    if sorted(orders) != layers:
        raise ValueError(
            f"{source}: has layers {sorted(orders)}, {model.path} has experts in {layers}"
        )
    N = provider.num_moe_experts
    for layer, order in orders.items():
        if sorted(order) != list(range(N)):
            raise ValueError(f"{source}: layer {layer}: not an order of {N} experts, 0 … {N - 1}")
    indices = {layer - 1: torch.tensor(order) for layer, order in orders.items()}

    def read(weight: Weight) -> Tensor:
        tensor = model.read(weight)
        if weight.layer is not None and (weight.experts or _is_of_router(weight)):
            return tensor[indices[weight.layer]]
        return tensor

    return replace(model, read=read)


def _is_of_router(weight: Weight) -> bool:
    """Return whether a weight is a router's: its first axis is the experts, as theirs is."""
    return ".mlp.router." in weight.keys[0]


def write_orders(path: Path, orders: Mapping[int, Orders]) -> None:
    """Write the orders of each layer, by expert-parallel size.

    Raises: OSError.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(orders) + "\n", encoding="utf-8")


def read_orders(path: Path, ep: int) -> dict[int, list[int]]:
    """Read the order of each layer for an expert-parallel size.

    Raises:
        ValueError: the file is of something else, or lacks the size.
        OSError: it cannot be read.
    """
    content = read_json(path)
    if str(ep) not in content:
        raise ValueError(f"{path}: has no placement for EP {ep}; it has {', '.join(content)}")
    try:
        orders = {int(layer): list(order) for layer, order in content[str(ep)].items()}
        if all(type(expert) is int for order in orders.values() for expert in order):
            return orders
    except (AttributeError, TypeError, ValueError):
        pass
    raise ValueError(f"{path}: holds no placement; `coe analyze --placement` writes one")
