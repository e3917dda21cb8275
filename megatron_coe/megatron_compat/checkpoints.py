"""Load a sharded state through either Megatron-Core line, from an index that was read safely.

Megatron reads a checkpoint's index by `pickle.load` (torch/distributed/checkpoint/filesystem.py),
and torch refuses one of a newer torch whose classes have gained fields. 0.16 finds the values that
all ranks share in `common.pt` only, which 0.19 no longer writes. Here both are handed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

COMMON_OBJECT = "common_state"
"""Key of the object that holds the common values where 0.19 saves a state by itself."""


def load_sharded_state(
    state: dict[str, Any], folder: Path, index: Metadata, common: dict[str, Any]
) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint whose index and common values have been read.

    Raises: CheckpointingException, CheckpointException: they do not fit the state.
    """
    options = {}
    # 0.19 has no strategies for them: it finds them itself, in either place.
    if "common_strategy" in signature(dist_checkpointing.load).parameters:
        options["common_strategy"] = _given(common)
    with _index_given(index):
        return dist_checkpointing.load(state, str(folder), **options)


@contextmanager
def _index_given(index: Metadata) -> Iterator[None]:
    """Have torch's checkpoint reader use this index instead of the file's."""
    reader: Any = FileSystemReader
    original = reader.read_metadata

    def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    reader.read_metadata = read_metadata
    try:
        yield
    finally:
        reader.read_metadata = original


def _given(common: dict[str, Any]) -> Any:
    """Return a strategy of 0.16 for common values that has these, and reads no file."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class GivenCommon(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
            return dict(common)

    return GivenCommon()
