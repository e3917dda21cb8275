"""A rank's share of a checkpoint: Megatron plans it, threads write, fsync and hash it.

Format and planning are those of Megatron's `torch_dist` strategy (megatron/core/dist_checkpointing/
strategies/torch.py). The writing is not: Megatron's runs in forked processes, which inherit the
rank's connections, so that its death goes unnoticed by its peers, and which outlive a `kill -9`,
writing on into a folder that the next run is about to use; and an error of the disk on one rank
leaves the others waiting for it.
"""

from __future__ import annotations

import io
import traceback
from dataclasses import dataclass, field
from pathlib import Path

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
    """What became of a rank's share."""

    files: dict[str, FileDigest] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)


@dataclass
class ShardFile:
    """A file to be, and what goes into it."""

    name: str
    items: list[tuple[WriteItem, Tensor | io.BytesIO]]

    def nbytes(self) -> int:
        return sum(
            data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes
            for _, data in self.items
        )

    def take_copy(self) -> None:
        """Hold copies in host memory, of the values of this moment, in place of live tensors."""
        self.items = [(item, _copy_of(data)) for item, data in self.items]

    def write(self, folder: Path, hashed: bool) -> Written:
        """Raises: OSError."""
        file, results = HashedFile(folder / self.name, hashed), []
        try:
            for item, data in self.items:
                start = file.tell()
                if isinstance(data, io.BytesIO):
                    # Not its buffer: where an error keeps one alive in a reference cycle, Python
                    # 3.12.1 crashes in the garbage collection of the BytesIO.
                    file.write(data.getvalue())
                else:
                    tensor = _compact(data)
                    file.expect(tensor.reshape(-1).view(torch.uint8).numpy())
                    torch.save(tensor, file)
                place = _StorageInfo(self.name, start, file.tell() - start)
                results.append(WriteResult(item.index, place.length, place))
            return Written({self.name: file.close()}, results)
        except Exception as error:
            _release(error)
            raise (file.error or error) from error
        finally:
            file.abandon()


def _release(error: BaseException | None) -> None:
    """Let go of what the functions of an error held, as soon as it is caught.

    Of torch.save that is its writer: left to the garbage collector, which may take the file before
    it, it ends the process (torch 2.11, Python 3.12: a segmentation fault).
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class SharePlan:
    """What a rank writes of a state, and the index that rank 0 makes of all shares.

    A collective of all ranks. Nothing is copied: the files hold the live tensors.

    Args:
        state: sharded, as `save_preprocess` leaves it.
        folder: where the checkpoint is to be written.
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
        """See `ShardFile.take_copy`."""
        for file in self.files:
            file.take_copy()

    def write(self, hashed: bool) -> Written:
        """Write this rank's files, all at once, fsynced. Raises: OSError."""
        computes_crc32 = get_crc32_options()
        # Torch's own checksums are never compared on loading: the manifest's take their place.
        set_crc32_options(computes_crc32 and not hashed)
        try:
            started = [in_background(file.write, self.folder, hashed) for file in self.files]
            for future in started:
                future.exception()  # all have ended before any error is raised
        finally:
            set_crc32_options(computes_crc32)
        whole = Written()
        for future in started:
            written = future.result()
            whole.files |= written.files
            whole.results += written.results
        return whole

    def write_index(self, shares: list[Written]) -> None:
        """Write `.metadata`, which says where all ranks' tensors lie. Rank 0 only."""
        assert isinstance(self._index, Metadata)
        self._writer.finish(self._index, [share.results for share in shares])


class _Collector(FileSystemWriterAsync):
    """Takes part in Megatron's planning, and keeps what is to be written."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is there: a rank that failed to make it would fail alone

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
    """The tensor on the CPU, in a storage of its own: torch.save writes all of a view's."""
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _copy_of(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    if isinstance(data, io.BytesIO):
        return data  # was serialized when it was planned
    copy = torch.empty(data.shape, dtype=data.dtype)
    return copy.copy_(data.detach())
