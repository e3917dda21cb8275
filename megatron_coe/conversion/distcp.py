"""Single tensors of Megatron's distributed checkpoints, read and written without process groups.

The format is torch.distributed.checkpoint's: files of serialized tensors, and `.metadata`, an index
of the chunks of each global tensor. Torch's own reader copies each tensor into a target that exists
beside it, and its writer keeps all tensors until the end; here one tensor at a time is in memory.
Plugs into torch/distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.safe_unpickle import INDEX_FILE, read_index
from megatron_coe.distributed.weight_average import PREFIX as AVERAGE
from megatron_coe.hf.weight_names import LAYERS
from megatron_coe.utils.fsynced import HashedFile

DATA_FILE = "__0_0.distcp"
# Besides weights: states of optimizers and generators, and modules' extra states (FP8 scales).
_NO_WEIGHTS = ("optimizer.", "rng/")
_EXTRA_STATE = "_extra_state"


class CheckpointReader:
    """The model's tensors in a checkpoint folder, read one at a time."""

    def __init__(self, folder: Path, averaged: bool = False) -> None:
        """Read a folder's index.

        Args:
            averaged: of weights that have a moving average, read that.

        Raises: ValueError: it is damaged, names more than tensors or has no average.
        """
        self.folder = folder
        try:
            self._index = read_index(folder)
        except BadCheckpointError as error:
            raise BadCheckpointError(f"{folder}: {error}") from error
        self._stored_as: dict[str, str] = {}
        averages: dict[str, str] = {}
        for key, stored in self._index.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata) or _EXTRA_STATE in key:
                continue
            if key.startswith(f"{AVERAGE}."):
                averages[key.removeprefix(f"{AVERAGE}.")] = key
            elif not key.startswith(_NO_WEIGHTS):
                self._stored_as[key] = key
        if averaged:
            if not averages:
                raise ValueError(
                    f"{folder}: holds no moving average: it was trained without train.ema_decay"
                )
            self._stored_as |= averages
        self._chunks: dict[str, list[tuple[ChunkStorageMetadata, _StorageInfo]]] = {
            key: [
                (chunk, self._index.storage_data[MetadataIndex(name, chunk.offsets)])
                for chunk in self._metadata_of(name).chunks
            ]
            for key, name in self._stored_as.items()
        }

    def find(self, keys: Iterable[str], layer: int | None) -> str | None:
        """Return the key a tensor is stored under; None if it is not stored.

        It is the key of its layer, or that of all layers stacked.
        """
        for key in keys:
            for spelling in (_of_layer(key, layer), key):
                if spelling in self._chunks:
                    return spelling
        return None

    def keys(self) -> list[str]:
        return list(self._chunks)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor, with the axis of stacked layers if it has one."""
        return tuple(self._described(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._described(key).properties.dtype

    def _described(self, key: str) -> TensorStorageMetadata:
        return self._metadata_of(self._stored_as[key])

    def _metadata_of(self, name: str) -> TensorStorageMetadata:
        metadata = self._index.state_dict_metadata[name]
        assert isinstance(metadata, TensorStorageMetadata)
        return metadata

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """Read a tensor, or its slice of one layer when all layers are stacked in it.

        Raises: ValueError naming the file and the tensor when it cannot be read.
        """
        shape = self.shape(key)[layer is not None :]
        result: Tensor | None = None
        read = 0
        for chunk, place in self._chunks[key]:
            if layer is not None and not _holds(chunk, layer):
                continue
            tensor = self._load(key, place)
            offsets = tuple(chunk.offsets)
            if layer is not None:
                tensor, offsets = tensor[layer - offsets[0]], offsets[1:]
            if tensor.shape == shape:  # a single chunk: no copy
                return tensor
            if result is None:
                result = torch.empty(shape, dtype=tensor.dtype)
            extents = zip(offsets, tensor.shape, strict=True)
            result[tuple(slice(start, start + size) for start, size in extents)] = tensor
            read += tensor.numel()
        if result is None or read != result.numel():
            raise ValueError(f"{self.folder / INDEX_FILE}: {key} is incomplete")
        return result

    def _load(self, key: str, place: _StorageInfo) -> Tensor:
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                content = _create_file_view(file, place.offset, place.length)
                return torch.load(cast("IO[bytes]", content), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: {key} cannot be read, the file is damaged") from error


class CheckpointWriter:
    """Writer of a model's tensors, one after another, and of the index at the end.

    Raises: OSError when a file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = HashedFile(folder / DATA_FILE, hashed=False)
        self._stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, tensor: Tensor, layer: int | None = None, layers: int = 0) -> None:
        """Write a tensor, or slice `layer` of one in which `layers` layers are stacked."""
        offset, size = torch.Size([0] * tensor.dim()), tensor.shape
        total = tensor.shape
        if layer is not None:
            tensor, offset = tensor[None], torch.Size([layer, *offset])
            size, total = tensor.shape, torch.Size([layers, *total])
        properties = TensorProperties(dtype=tensor.dtype)
        stored = self._stored.setdefault(key, TensorStorageMetadata(properties, total, []))
        assert isinstance(stored, TensorStorageMetadata)
        stored.chunks.append(ChunkStorageMetadata(offset, size))
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            # torch.save would store a view with its whole storage.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._append(MetadataIndex(key, offset), tensor)

    def write_extra_state(self, key: str, place: Iterable[int], grid: Iterable[int]) -> None:
        """Write the empty state that modules load at `place` of a grid of layers and experts."""
        spelled = "_".join(".".join(map(str, numbers)) for numbers in (place, grid))
        key = f"{key}/shard_{spelled}"
        self._stored[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [None])

    def close(self) -> None:
        """Write the index, without which nothing can be read."""
        self._file.close()
        with (self.folder / INDEX_FILE).open("wb") as file:
            pickle.dump(Metadata(self._stored, storage_data=self._places), file)

    def abandon(self) -> None:
        """Close the file if it is not closed."""
        self._file.abandon()

    def _append(self, index: MetadataIndex, content: Tensor | list[None]) -> None:
        start = self._file.tell()
        try:
            torch.save(content, cast("IO[bytes]", self._file))
        except RuntimeError as error:
            raise (self._file.error or error) from error
        self._places[index] = _StorageInfo(DATA_FILE, start, self._file.tell() - start)


def _of_layer(key: str, layer: int | None) -> str:
    return key if layer is None else key.replace(LAYERS, f"{LAYERS}{layer}.", 1)


def _holds(chunk: ChunkStorageMetadata, layer: int) -> bool:
    return chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
