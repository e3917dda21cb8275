"""Weights out of one store into another: all accounted for first, then read one at a time.

A store is a training checkpoint or a Hugging Face folder; the table of `hf/weight_names.py` names
what either must hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.conversion.distcp import CheckpointReader
from megatron_coe.conversion.folders import HF_CONFIG
from megatron_coe.conversion.safetensors_shards import ShardReader, ShardWriter
from megatron_coe.hf.weight_names import MTP, Weight


def match_checkpoint(
    reader: CheckpointReader, table: list[Weight], ignored: tuple[str, ...] = ()
) -> dict[Weight, str]:
    """Find each weight's key in a checkpoint that holds these weights and nothing else.

    Args:
        ignored: what the keys of further weights begin with.

    Raises: ValueError naming the first weight that is missing, left over or of another shape.
    """
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
        if key.startswith(ignored):
            continue
        raise ValueError(f"{reader.folder}: holds {key}, which is no weight of this model")
    return found


def match_shards(
    reader: ShardReader, table: Sequence[Weight], ignored: tuple[str, ...] = ()
) -> None:
    """Check that a folder's files hold these weights and nothing else, but copies of them.

    Args:
        ignored: what the names of further weights begin with.

    Raises: ValueError naming the first weight that is missing, left over, of another shape, or of
        another dtype than what is stored in one Megatron tensor with it.
    """
    expected = {name: shape for weight in table for name, shape in weight.parts.items()}
    present = dict.fromkeys(name for name in reader.names() if not name.startswith(ignored))
    for weight in table:
        for name in weight.parts:
            if name in present:
                continue
            is_mtp = weight.keys[0].startswith(MTP)
            fix = "; leave its MTP layers out: --without-mtp" if is_mtp else ""
            raise ValueError(f"{reader.folder}: lacks {name}, which its {HF_CONFIG} implies{fix}")
        expected |= {copy: expected[next(iter(weight.parts))] for copy in weight.copies}
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
    """Read a weight of a checkpoint.

    Args:
        key: from `match_checkpoint`.

    Raises: ValueError for a number that is not finite, or an expert that is all zero.
    """
    tensor = reader.read(key, weight.layer if _is_stacked(weight, key) else None)
    _refuse_nonfinite(_describe(weight), tensor, reader.folder)
    if weight.experts:
        for name, part in zip(weight.parts, weight.split(tensor), strict=True):
            _refuse_zeros(name, part, reader.folder)
    return tensor


def export_weight(
    reader: CheckpointReader,
    writer: ShardWriter,
    weight: Weight,
    key: str,
    dtype: torch.dtype | None,
) -> None:
    """Write one weight of a checkpoint as its Hugging Face parts.

    A function of its own, so that no tensor of one weight is alive when the next is read.

    Args:
        key: from `match_checkpoint`.
        dtype: of what is written; None: as it is stored.

    Raises: ValueError as `read_stored`; OSError: a file cannot be written.
    """
    tensor = read_stored(reader, weight, key)
    for name, part in zip(weight.parts, weight.split(tensor), strict=True):
        stored = part.dtype if dtype is None or weight.keeps_fp32 else dtype
        writer.make_room(part.numel() * stored.itemsize)
        writer.add(name, _as_own_storage(part, stored))
        for copy in weight.copies:
            writer.make_room(part.numel() * stored.itemsize)
            writer.add(copy, _as_own_storage(part.clone(), stored))


def assemble(reader: ShardReader, weight: Weight) -> Tensor:
    """Read the parts of a weight from a Hugging Face folder, and join them.

    Raises: ValueError for a number that is not finite, or an expert that is all zero.
    """
    if not weight.experts:
        parts = [_read_finite(reader, name) for name in weight.parts]
        for copy in set(weight.copies) & set(reader.names()):
            _refuse_other(copy, reader, weight, parts[0])
        return weight.join(parts)
    # Experts one at a time: together they may be as large as a layer, and lie in several files.
    first = next(iter(weight.parts))
    tensor = torch.empty(_shape(weight), dtype=reader.dtype(first))
    for name, view in zip(weight.parts, weight.split(tensor), strict=True):
        view.copy_(_read_finite(reader, name))
        _refuse_zeros(name, view, reader.folder)
    return tensor


def _read_finite(reader: ShardReader, name: str) -> Tensor:
    tensor = reader.read(name)
    _refuse_nonfinite(name, tensor, reader.file_of(name))
    return tensor


def _refuse_other(copy: str, reader: ShardReader, weight: Weight, tensor: Tensor) -> None:
    """Check that a copy is one: Megatron has a single tensor for both."""
    name = next(iter(weight.parts))
    if reader.dtype(copy) != tensor.dtype or not torch.equal(reader.read(copy), tensor):
        raise ValueError(
            f"{reader.file_of(copy)}: {copy} differs from {name}, which its MTP layers share; "
            "leave them out: --without-mtp"
        )


def _refuse_nonfinite(name: str, tensor: Tensor, source: Path) -> None:
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # of a NaN, both are NaN
        raise ValueError(f"{source}: {name} holds a number that is NaN or infinite")


def _refuse_zeros(name: str, tensor: Tensor, source: Path) -> None:
    if not tensor.any():
        raise ValueError(f"{source}: {name} is all zero, an expert that was never filled")


def _as_own_storage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor, copied if it is a view: one would keep its whole storage in memory."""
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
