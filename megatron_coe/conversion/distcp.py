"""Single tensors of Megatron's distributed checkpoints, read and written without process groups.

The format is torch.distributed.checkpoint's: files of serialized tensors, and `.metadata`, an index
that says which box of which global tensor stands where. Torch's own reader copies each tensor into
a target that exists beside it, and its writer keeps all tensors until the end; here there is never
more in memory than one tensor. Plugs into torch/distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

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
from megatron_coe.hf.weight_names import LAYERS
from megatron_coe.utils.fsynced import HashedFile

DATA_FILE = "__0_0.distcp"
# Beside weights: states of optimizers and generators, and modules' extra states (FP8 scales).
_NO_WEIGHTS = ("optimizer.", "rng/")
_EXTRA_STATE = "_extra_state"


class CheckpointReader:
    """The model's tensors in a checkpoint folder; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises: ValueError for an index that is damaged or names anything but tensors."""
        self.folder = folder
        try:
            self._index = read_index(folder)
        except BadCheckpointError as error:
            raise BadCheckpointError(f"{folder}: {error}") from error
        self._boxes: dict[str, list[tuple[ChunkStorageMetadata, _StorageInfo]]] = {}
        for key, stored in self._index.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata) or key.startswith(_NO_WEIGHTS):
                continue
            if _EXTRA_STATE in key:
                continue
            self._boxes[key] = [
                (box, self._index.storage_data[MetadataIndex(key, box.offsets)])
                for box in stored.chunks
            ]

    def find(self, keys: Iterable[str], layer: int | None) -> str | None:
        """The spelling a tensor is stored under: of its layer alone, or of all layers stacked."""
        for key in keys:
            for spelling in (_of_layer(key, layer), key):
                if spelling in self._boxes:
                    return spelling
        return None

    def keys(self) -> list[str]:
        return list(self._boxes)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._index.state_dict_metadata[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._index.state_dict_metadata[key].properties.dtype

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or its slice of one layer when all layers are stacked in it.

        Raises: ValueError naming the file and the tensor when it cannot be read.
        """
        shape = self.shape(key)[layer is not None :]
        whole: Tensor | None = None
        read = 0
        for box, place in self._boxes[key]:
            if layer is not None and not _holds(box, layer):
                continue
            tensor = self._load(key, place)
            offsets = tuple(box.offsets)
            if layer is not None:
                tensor, offsets = tensor[layer - offsets[0]], offsets[1:]
            if tensor.shape == shape:  # in one piece: no copy
                return tensor
            if whole is None:
                whole = torch.empty(shape, dtype=tensor.dtype)
            corner = zip(offsets, tensor.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in corner)] = tensor
            read += tensor.numel()
        if whole is None or read != whole.numel():
            raise ValueError(f"{self.folder / INDEX_FILE}: {key} is not there in full")
        return whole

    def _load(self, key: str, place: _StorageInfo) -> Tensor:
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                content = _create_file_view(file, place.offset, place.length)
                return torch.load(content, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: {key} cannot be read, the file is damaged") from error


class CheckpointWriter:
    """Writes a model's tensors one after another, and the index at the end; raises OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = HashedFile(folder / DATA_FILE, hashed=False)
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, tensor: Tensor, layer: int | None = None, layers: int = 0) -> None:
        """A whole tensor, or slice `layer` of one in which `layers` layers are stacked."""
        offset, size = torch.Size([0] * tensor.dim()), tensor.shape
        total = tensor.shape
        if layer is not None:
            tensor, offset = tensor[None], torch.Size([layer, *offset])
            size, total = tensor.shape, torch.Size([layers, *total])
        if key not in self._tensors:
            properties = TensorProperties(dtype=tensor.dtype)
            self._tensors[key] = TensorStorageMetadata(properties, total, [])
        self._tensors[key].chunks.append(ChunkStorageMetadata(offset, size))
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            # A view would be stored with all of the tensor that it looks into.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._append(MetadataIndex(key, offset), tensor)

    def write_extra_state(self, key: str, place: Iterable[int], grid: Iterable[int]) -> None:
        """The empty state that modules look for at `place` of a grid of layers and experts."""
        place, grid = (".".join(map(str, numbers)) for numbers in (place, grid))
        key = f"{key}/shard_{place}_{grid}"
        self._tensors[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [None])

    def close(self) -> None:
        """Completes the checkpoint's data; without it there is no index and nothing can be read."""
        self._file.close()
        with (self.folder / INDEX_FILE).open("wb") as file:
            pickle.dump(Metadata(self._tensors, storage_data=self._places), file)

    def abandon(self) -> None:
        self._file.abandon()

    def _append(self, index: MetadataIndex, content: Tensor | list[None]) -> None:
        start = self._file.tell()
        try:
            torch.save(content, self._file)
        except RuntimeError as error:
            raise (self._file.error or error) from error
        self._places[index] = _StorageInfo(DATA_FILE, start, self._file.tell() - start)


def _of_layer(key: str, layer: int | None) -> str:
    return key if layer is None else key.replace(LAYERS, f"{LAYERS}{layer}.", 1)


def _holds(box: ChunkStorageMetadata, layer: int) -> bool:
    return box.offsets[0] <= layer < box.offsets[0] + box.sizes[0]
