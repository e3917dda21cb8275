"""Writing a rank's shards of a checkpoint: planned by Megatron, written and hashed by threads.

Format and planning are those of Megatron's `torch_dist` strategy (megatron/core/dist_checkpointing/
strategies/torch.py). The writing is not. Megatron's runs in forked processes: they inherit the
rank's connections, so that its peers do not notice its death; they survive a `kill -9` and keep
writing into a folder that the next run is about to use; and a disk error on one rank leaves the
others waiting.
"""

from __future__ import annotations

import io
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_coe.utils.fsynced import FileDigest, HashedFile, in_background

FILES_PER_RANK = 2


@dataclass
class Written:
    """The files that a rank has written, and where its tensors are in them."""

    files: dict[str, FileDigest] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)


@dataclass
class ShardFile:
    """A file to be written, and its content."""

    name: str
    items: list[tuple[WriteItem, Tensor | io.BytesIO]]

    def nbytes(self) -> int:
        """Return the size of the content."""
        return sum(
            data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes
            for _, data in self.items
        )

    def take_copy(self) -> None:
        """Replace the live tensors by copies in host memory."""
        self.items = [(item, _copy_of(data)) for item, data in self.items]

    def write(self, folder: Path, hashed: bool) -> Written:
        """Write the file into a folder, fsync and hash it. Raises: OSError."""
        file, results = HashedFile(folder / self.name, hashed), []
        try:
            for item, data in self.items:
                start = file.tell()
                if isinstance(data, io.BytesIO):
                    # Not its buffer: where an error keeps one alive in a reference cycle, Python
                    # 3.12.1 crashes in the garbage collection of the BytesIO.
                    file.write(data.getvalue())
                else:
                    torch.save(_compact(data), cast("IO[bytes]", file))
                place = _StorageInfo(self.name, start, file.tell() - start)
                results.append(WriteResult(item.index, place.length, place))
            return Written({self.name: file.close()}, results)
        except Exception as error:
            _release(error)
            raise (file.error or error) from error
        finally:
            file.abandon()


def _release(error: BaseException | None) -> None:
    """Drop the local variables of the functions that an error passed through.

    One of them is the writer of torch.save: if the garbage collector frees the file before it, the
    process dies of a segmentation fault (torch 2.11, Python 3.12).
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class ShardPlan:
    """The plan of what a rank writes of a state, and of the index that rank 0 writes.

    A collective of all ranks. Nothing is copied: the files hold the live tensors.

    Args:
        state: sharded, as `save_preprocess` returns it.
        folder: where the checkpoint is written.
    """

    def __init__(self, state: ShardedStateDict, folder: Path) -> None:
        named, *_ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
        self._writer = _Collector(str(folder), thread_count=FILES_PER_RANK)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        (_, self._index, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(named, is_loading=False), self._writer, planner=planner
        )
        self.folder = folder
        self.files = self._writer.files
        self.nbytes = sum(file.nbytes() for file in self.files)

    def take_copy(self) -> None:
        """Replace the live tensors by copies in host memory."""
        for file in self.files:
            file.take_copy()

    def write(self, hashed: bool) -> Written:
        """Write this rank's files in parallel, fsynced.

        Args:
            hashed: False leaves out their digests.

        Raises: OSError.
        """
        computes_crc32 = get_crc32_options()
        # Torch's own checksums are never compared on loading; the manifest's are.
        set_crc32_options(computes_crc32 and not hashed)
        try:
            started = [in_background(file.write, self.folder, hashed) for file in self.files]
            for future in started:
                future.exception()  # all have ended before any error is raised
        finally:
            set_crc32_options(computes_crc32)
        all_files = Written()
        for future in started:
            written = future.result()
            all_files.files |= written.files
            all_files.results += written.results
        return all_files

    def write_index(self, shares: list[Written]) -> None:
        """Write `.metadata`, the index of all ranks' tensors. Rank 0 only. Raises: OSError."""
        assert isinstance(self._index, Metadata)
        self._writer.finish(self._index, [share.results for share in shares])


class _Collector(FileSystemWriterAsync):
    """Collects from Megatron's planning what is to be written."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder exists: a rank that failed to create it would fail alone

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        buckets = _split_by_size_and_type(self.thread_count, plan.items)
        self.files = [
            ShardFile(
                f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}",
                [(item, planner.resolve_data(item)) for item in bucket],
            )
            for number, bucket in enumerate(filter(None, buckets))
        ]


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU in its own storage: torch.save writes the whole storage."""
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _copy_of(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    if isinstance(data, io.BytesIO):
        return data  # was serialized when it was planned
    copy = torch.empty(data.shape, dtype=data.dtype)
    return copy.copy_(data.detach())
