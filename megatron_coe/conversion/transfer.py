"""Weights out of one store into another: all accounted for first, then one at a time.

A store is a training checkpoint or a Hugging Face folder; the table of `hf/names.py` says what
either must hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.checkpoint.safe_unpickle import FORMAT
from megatron_coe.checkpoint.state import MODEL_ONLY
from megatron_coe.checkpoint.versions import VERSIONS_FILE, versions_text
from megatron_coe.conversion.distcp import CheckpointReader, CheckpointWriter
from megatron_coe.conversion.folders import HF_CONFIG
from megatron_coe.conversion.shards import ShardReader, ShardWriter
from megatron_coe.hf.weight_names import LAYERS, Weight
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.run_files import COMMON_FILE, FORMAT_FILE


def match_checkpoint(reader: CheckpointReader, table: list[Weight]) -> dict[Weight, str]:
    """Under which key each weight stands; all are there, with the right shape, and nothing else."""
    found: dict[Weight, str] = {}
    for weight in table:
        key = reader.find(weight.keys, weight.layer)
        where = _describe(weight)
        if key is None:
            raise ValueError(f"{reader.folder}: lacks {where}")
        shape, expected = reader.shape(key)[_is_stacked(weight, key) :], _shape(weight)
        fits = shape == expected
        if weight.padded:
            rows = next(iter(weight.parts.values()))[0]
            fits = shape[1:] == expected[1:] and shape[0] >= rows
        if not fits:
            raise ValueError(
                f"{reader.folder}: {where} has shape {list(shape)}, the model's configuration says "
                f"{list(expected)}"
            )
        found[weight] = key
    for key in set(reader.keys()) - set(found.values()):
        raise ValueError(f"{reader.folder}: holds {key}, which is no weight of this model")
    return found


def match_shards(reader: ShardReader, table: Sequence[Weight]) -> None:
    """All weights are in the files, with the right shapes, and nothing else."""
    expected = {name: shape for weight in table for name, shape in weight.parts.items()}
    present = reader.names()
    for name in expected.keys() - set(present):
        raise ValueError(f"{reader.folder}: lacks {name}, which its {HF_CONFIG} implies")
    for weight in table:
        types = {reader.dtype(name): name for name in weight.parts}
        if len(types) > 1:
            first, second, *_ = types.values()
            raise ValueError(f"{reader.folder}: {first} and {second} are of different types")
    for name in present:
        if name not in expected:
            raise ValueError(
                f"{reader.file_of(name)}: holds {name}, which is no weight of the model that "
                f"{HF_CONFIG} describes"
            )
        if reader.shape(name) != expected[name]:
            raise ValueError(
                f"{reader.file_of(name)}: {name} has shape {list(reader.shape(name))}, "
                f"{HF_CONFIG} says {list(expected[name])}"
            )


def read_stored(reader: CheckpointReader, weight: Weight, key: str) -> Tensor:
    """A weight of a checkpoint, whole; `key` is from `match_checkpoint`."""
    whole = reader.read(key, weight.layer if _is_stacked(weight, key) else None)
    _refuse_nonfinite(_describe(weight), whole, reader.folder)
    if weight.experts:
        for name, tensor in zip(weight.parts, weight.split(whole), strict=True):
            _refuse_zeros(name, tensor, reader.folder)
    return whole


def export(
    reader: CheckpointReader,
    writer: ShardWriter,
    weight: Weight,
    key: str,
    dtype: torch.dtype | None,
) -> None:
    """Write one weight of a checkpoint as its parts.

    A function of its own, so that nothing of one weight is alive when the next is read.
    """
    whole = read_stored(reader, weight, key)
    for name, tensor in zip(weight.parts, weight.split(whole), strict=True):
        stored = tensor.dtype if dtype is None or weight.keeps_fp32 else dtype
        writer.make_room(tensor.numel() * stored.itemsize)
        writer.add(name, _as_own_storage(tensor, stored))


def assemble(reader: ShardReader, weight: Weight) -> Tensor:
    """A weight of a Hugging Face folder, joined of its parts."""
    if not weight.experts:
        return weight.join([_read_finite(reader, name) for name in weight.parts])
    # Experts one at a time: together they may be as large as a layer, and lie in several files.
    first = next(iter(weight.parts))
    whole = torch.empty(_shape(weight), dtype=reader.dtype(first))
    for name, view in zip(weight.parts, weight.split(whole), strict=True):
        view.copy_(_read_finite(reader, name))
        _refuse_zeros(name, view, reader.folder)
    return whole


def _read_finite(reader: ShardReader, name: str) -> Tensor:
    tensor = reader.read(name)
    _refuse_nonfinite(name, tensor, reader.file_of(name))
    return tensor


def write_checkpoint(
    step: Path,
    table: Sequence[Weight],
    read: Callable[[Weight], Tensor],
    provider: CoEModelProvider,
) -> None:
    """Fill a folder with the weights of `table`, each asked of `read` when its turn comes."""
    layers = provider.num_layers
    # Megatron stacks the layers of a model whose `moe_layer_freq` makes them all alike.
    stacked = provider.moe_layer_freq == 1
    writer = CheckpointWriter(step)
    try:
        for weight in table:
            key, place, grid = weight.keys[0], (), ()
            if weight.layer is not None and stacked:
                writer.write(key, read(weight), weight.layer, layers)
                place, grid = (weight.layer,), (layers,)
            else:
                key = key.replace(LAYERS, f"{LAYERS}{weight.layer}.", 1)
                writer.write(key, read(weight))
            _write_extra_states(writer, key, place, grid, weight.experts)
        writer.close()
    finally:
        writer.abandon()
    torch.save(MODEL_ONLY, step / COMMON_FILE)
    (step / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
    (step / VERSIONS_FILE).write_text(versions_text(), encoding="utf-8")


def _write_extra_states(
    writer: CheckpointWriter,
    key: str,
    place: tuple[int, ...],
    grid: tuple[int, ...],
    experts: int,
) -> None:
    """The empty extra state of each linear layer, which Megatron's modules ask for on loading.

    Args:
        place: of the layer in a `grid` of stacked layers; both are empty where none are stacked.
    """
    module, _, parameter = key.rpartition(".")
    if parameter != "weight" or not module.rpartition(".")[2].startswith("linear_"):
        return
    key = f"{module}._extra_state"
    if not experts:
        return writer.write_extra_state(key, place or (0,), grid or (1,))
    for expert in range(experts):
        writer.write_extra_state(key, (*place, expert), (*grid, experts))


def _refuse_nonfinite(name: str, tensor: Tensor, source: Path) -> None:
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # of a NaN, both are NaN
        raise ValueError(f"{source}: {name} holds a number that is NaN or infinite")


def _refuse_zeros(name: str, tensor: Tensor, source: Path) -> None:
    if not tensor.any():
        raise ValueError(f"{source}: {name} is all zero, an expert that was never filled")


def _as_own_storage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy unless it is one already: a view would keep alive all that it looks into."""
    tensor = tensor.to(dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _shape(weight: Weight) -> tuple[int, ...]:
    parts = [torch.empty(shape, device="meta") for shape in weight.parts.values()]
    return tuple(weight.join(parts).shape)


def _is_stacked(weight: Weight, key: str) -> bool:
    return weight.layer is not None and key in weight.keys


def _describe(weight: Weight) -> str:
    names = list(weight.parts)
    layer = "" if weight.layer is None else f" of layer {weight.layer}"
    several = f" … {names[-1]}" if len(names) > 1 else ""
    return f"{weight.keys[0]}{layer} ({names[0]}{several})"
