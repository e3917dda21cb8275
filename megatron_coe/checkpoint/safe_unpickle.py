"""Reading the pickles in a checkpoint without executing them.

A checkpoint holds three kinds of pickle, each of which Megatron or torch opens unchecked:

    .metadata       pickle.load in torch/distributed/checkpoint/filesystem.py
    common.pt       torch.load in megatron/core/dist_checkpointing/strategies/common.py
    objects in *.distcp (RNG states, extra states of modules, and `common_state`, which replaces
                    common.pt where Megatron-Core 0.19 has saved by itself)
                    torch.load in torch/distributed/checkpoint/default_planner.py, with
                    weights_only=False; Transformer Engine unpickles extra states once more

Torch itself reads the tensors in *.distcp with `weights_only=True`. Here the first kind is read by
an unpickler that allows the classes of an index and no other name, the others as weights only.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.versions import unreadable_error
from megatron_coe.megatron_compat.checkpoints import COMMON_OBJECT
from megatron_coe.utils.run_files import COMMON_FILE, FORMAT_FILE

INDEX_FILE = ".metadata"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of `metadata.json` as written here: the fields that every Megatron-Core reads."""
_COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}
"""What Megatron-Core 0.16 adds to it."""
_EXTRA_STATE = "_extra_state"

# All that the pickle of an index refers to.
_DCP = "torch.distributed.checkpoint."
_INDEX_NAMES = {
    f"{_DCP}metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    f"{_DCP}filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
}

# All that the pickle of an extra state of Transformer Engine refers to, its recipes aside.
_EXTRA_NAMES = {
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict", "deque"},
    "_codecs": {"encode"},
}
_RECIPES = "transformer_engine.common.recipe"


@dataclass(frozen=True)
class Contents:
    """The parts of a checkpoint that every rank reads."""

    common: dict[str, Any]
    """Values that all ranks share."""
    index: Metadata
    """Where each tensor and object is stored."""


def read_index(folder: Path) -> Metadata:
    """Read where each tensor and object of a checkpoint is stored.

    Raises:
        BadCheckpointError: the index is damaged, refers to a class that no index needs, or points
            out of the folder.
        OSError: it cannot be read.
    """
    with (folder / INDEX_FILE).open("rb") as file:
        try:
            index = _IndexUnpickler(file).load()
        except Exception as error:  # a damaged pickle can raise anything
            raise BadCheckpointError(f"{INDEX_FILE}: no index of a checkpoint ({error})") from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise BadCheckpointError(f"{INDEX_FILE}: no index of a checkpoint")
    for place in index.storage_data.values():
        name = place.relative_path if isinstance(place, _StorageInfo) else None
        if not isinstance(name, str) or Path(name).name != name or place.transform_descriptors:
            raise BadCheckpointError(f"{INDEX_FILE}: no index of a checkpoint (data at {name!r})")
    return index


def read_common(folder: Path, index: Metadata | None = None) -> dict[str, Any]:
    """Read the values and tensors of a checkpoint that all ranks share.

    They are in `common.pt`, or in an object among the shards.

    Args:
        index: of the checkpoint, if it has been read.

    Raises:
        BadCheckpointError: they are damaged, or anything but values and tensors.
        OSError: they cannot be read.
    """
    try:
        with (folder / COMMON_FILE).open("rb") as file:
            where, common = COMMON_FILE, _read_weights(file, COMMON_FILE)
    except FileNotFoundError:
        index = index or read_index(folder)
        key = ShardedObject(COMMON_OBJECT, None, (1,), (0,)).unique_key
        if MetadataIndex(key) not in index.storage_data:
            raise
        where, common = _read_object(folder, index, key)
        if isinstance(common, list) and len(common) == 1:  # as Megatron keeps every object
            (common,) = common
    if not isinstance(common, dict):
        raise BadCheckpointError(f"{where}: holds no state of a run")
    return common


def read_contents(folder: Path) -> Contents:
    """Read a checkpoint's format, index and common values, but not its tensors.

    Raises: BadCheckpointError naming the file; OSError: a file cannot be read.
    """
    _check_format(folder)
    index = read_index(folder)
    return Contents(read_common(folder, index), index)


def check_pickles(folder: Path, part: int = 0, parts: int = 1) -> Contents:
    """Check every pickle that Megatron will open in a checkpoint, without executing it.

    Args:
        part, parts: check this part of `parts` of the objects (ranks share the work).

    Raises:
        BadCheckpointError: naming the file, or the versions that the checkpoint needs.
        OSError: a file cannot be read.
    """
    try:
        contents = read_contents(folder)
        objects = sorted(
            key
            for key, stored in contents.index.state_dict_metadata.items()
            if isinstance(stored, BytesStorageMetadata)
        )
        for key in objects[part::parts]:
            where, content = _read_object(folder, contents.index, key)
            if _EXTRA_STATE in key:
                _check_extra_state(content, where)
    except BadCheckpointError as error:
        raise unreadable_error(folder, error) from error
    return contents


def _check_format(folder: Path) -> None:
    """Check `metadata.json`, in either form: that of 0.16 has two fields more than that of 0.19."""
    try:
        content = json.loads((folder / FORMAT_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadCheckpointError(f"{FORMAT_FILE} is damaged") from error
    if content not in (FORMAT, FORMAT | _COMMON_FORMAT):
        raise BadCheckpointError(f"{FORMAT_FILE}: {content} is another format than {FORMAT}")


def _read_object(folder: Path, index: Metadata, key: str) -> tuple[str, object]:
    """Read an object among the shards; return its place, for messages, and the object."""
    place = index.storage_data.get(MetadataIndex(key))
    if place is None:
        raise BadCheckpointError(f"{INDEX_FILE}: {key} has no place")
    where = f"{place.relative_path}: {key}"
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return where, _read_weights(io.BytesIO(file.read(place.length)), where)


def _read_weights(file: BinaryIO, where: str) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise anything
        reason = str(error).strip().split("\n")[0]
        raise BadCheckpointError(
            f"{where} is damaged, or holds more than plain values and tensors ({reason})"
        ) from error


def _check_extra_state(content: object, where: str) -> None:
    """Check an extra state: Transformer Engine pickles FP8 scales into a tensor of bytes."""
    for state in content if isinstance(content, list) else [content]:
        if not isinstance(state, torch.Tensor) or state.numel() == 0:
            continue
        try:
            _ExtraStateUnpickler(io.BytesIO(state.numpy().tobytes())).load()
        except Exception as error:
            raise BadCheckpointError(f"{where}: no state of a module ({error})") from error


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles an index, and refuses every class that no index needs."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == (TensorProperties.__module__, TensorProperties.__name__):
            return _AnyTensorProperties
        if _is_dtype(module, name) or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")


class _AnyTensorProperties(TensorProperties):
    """Unpickles the tensor properties of any torch version; an instance becomes torch's own.

    torch 2.15 has added a sixth entry, the strides. Loading does not need them: each tensor's file
    has its own.
    """

    def __setstate__(self, state: tuple[object, ...]) -> None:
        known = len(TensorProperties().__getstate__())
        if len(state) > max(known, 6):
            raise pickle.UnpicklingError(
                f"it has {len(state)} properties of a tensor, torch {torch.__version__} {known}"
            )
        super().__setstate__(state[:known])
        self.__class__ = TensorProperties  # type: ignore[assignment]  # its parent


class _ExtraStateUnpickler(pickle.Unpickler):
    """Unpickles a module's extra state, and refuses every class that none needs."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage  # torch's own function unpickles anything
        if _is_dtype(module, name) or name in _EXTRA_NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == _RECIPES and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == _RECIPES:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no extra state does")


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)
