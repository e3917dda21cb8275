"""Documents packed into one sequence: Megatron's `PackedSeqParams`, and their share of a rank.

A pack is described by the offsets of its documents, `cu_seqlens` [documents + 1] from 0 to S. With
them Megatron's attention restarts positions at each document and lets none attend to another
(`qkv_format="thd"`). Under context parallelism each document is cut into 2 CP chunks by itself, of
which rank r has chunks r and 2 CP - 1 - r, as Transformer Engine's attention expects.

Axis letters: S positions of a pack, CP context-parallel ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def packed_seq_params(offsets: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Describe a pack to Megatron's attention."""
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    # Of the longest document, not of the pack: from a length equal to the pack's, Megatron's rotary
    # embedding (rope_utils.py) concludes that positions run on from document to document.
    longest = max(end - start for start, end in _documents(offsets))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def positions_of_rank(offsets: Sequence[int], rank: int, size: int) -> Tensor:
    """Return the positions in the pack that a context-parallel rank holds, int64 [S / CP].

    Raises: ValueError for a document whose length is no multiple of 2 CP.
    """
    held = []
    for start, end in _documents(offsets):
        chunk, rest = divmod(end - start, 2 * size)
        if rest:
            raise ValueError(
                f"a document of {end - start} positions cannot be cut into 2 x {size} chunks for "
                f"context_parallel_size={size}: set data.pad_seq_to_mult to a multiple of "
                f"{2 * size}"
            )
        for first in (start + rank * chunk, end - (rank + 1) * chunk):
            held.append(torch.arange(first, first + chunk))
    return torch.cat(held)


def _documents(offsets: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets))
