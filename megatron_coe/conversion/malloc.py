"""The C library's allocator, set for a process that handles one large tensor after another."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_KEPT_BELOW = 128 * 1024  # bytes; glibc's own, before it adapts


def release_freed_memory() -> None:
    """Make the process return freed tensors at once; else the peak is up to half as high again.

    glibc maps a block larger than a threshold by itself and unmaps it when it is freed, but raises
    that threshold, up to 32 MB, with each such block. A threshold that was set stays. Where the C
    library has no such setting, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BELOW)
