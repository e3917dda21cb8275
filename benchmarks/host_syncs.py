"""Host syncs: how often the host waits for the device, and where.

On a GPU PyTorch reports them (`torch.cuda.set_sync_debug_mode`). On a CPU nothing waits; calls that
would wait on a GPU are counted: those that turn the contents of a tensor into a number or into the
shape of another tensor. That counts too many, for a tensor may be on the host anyway (the step
counts of torch's AdamW are), and too few: copies to a device are not seen.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"tolist", "numpy", "cpu"}
"""Methods of a tensor that bring all of it to the host without an operation of its own."""

_SHAPED_BY_CONTENTS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::equal",
}


def count_host_syncs(work: Callable[[], object], device: torch.device) -> Counter[str]:
    """Count the host syncs of `work` by place, `file:line`."""
    if device.type == "cuda":
        return _count_on_gpu(work)
    counts: Counter[str] = Counter()
    with _Operations(counts), _Methods(counts):
        work()
    return counts


def _count_on_gpu(work: Callable[[], object]) -> Counter[str]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Counter(
        _place(warning.filename, warning.lineno)
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    )


def _place(file: str, line: int) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def _caller() -> str:
    """Return the innermost line on the stack that is neither torch's nor this module's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return _place(frame.f_code.co_filename, frame.f_lineno)


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indexed_by_mask = name == "aten::index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in _SHAPED_BY_CONTENTS or indexed_by_mask or repeats:
            self.counts[_caller()] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and getattr(torch.Tensor, name) is func:
            self.counts[_caller()] += 1
        return func(*args, **(kwargs or {}))
