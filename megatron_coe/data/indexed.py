"""What is in a `.bin/.idx` pair, checked before Megatron maps it into memory.

Megatron asserts or fails deep inside on files that are missing, cut short or of another tokenizer;
here each of these is one error that names the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from torch.utils.data import Dataset

from megatron_coe.data.tokenizer import Tokenizer

# magic, version, code of the dtype, number of sequences, number of document boundaries
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BYTES_PER_SEQUENCE = 4 + 8  # length (int32) and offset (int64)

# Larger files are checked in their first tokens only, so that a start stays quick.
CHECKED_TOKENS = 1 << 24


@dataclass(frozen=True)
class IndexedFile:
    """A checked `.bin/.idx` pair.

    Attributes:
        sequences: as many as documents, unless sentences were split.
        dtype: of a token id in the `.bin`.
        stamp: changes when the pair is written anew.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: np.dtype
    stamp: tuple[int, int]


def inspect(prefix: str) -> IndexedFile:
    """Reads the `.idx` and checks the `.bin` against it.

    Raises: ValueError naming the file that is missing, damaged, empty, or not the other's partner.
    """
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise ValueError(f"{path} does not exist (data sets are named without .bin and .idx)")
    with idx.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise ValueError(f"{idx} is not an index of Megatron's")
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1 or code not in {kind.value for kind in DType}:
            raise ValueError(f"{idx} is of an unknown version ({version}) or dtype ({code})")
        needed = _HEADER.size + sequences * _BYTES_PER_SEQUENCE + boundaries * 8
        if idx.stat().st_size < needed:
            raise ValueError(f"{idx} is cut short: {idx.stat().st_size} of {needed} bytes")
    if sequences == 0 or boundaries < 2:
        raise ValueError(f"{prefix} holds no document")
    lengths = np.memmap(idx, dtype="<i4", mode="r", offset=_HEADER.size, shape=(sequences,))
    tokens = int(lengths.sum(dtype=np.int64))
    dtype = np.dtype(DType.dtype_from_code(code))
    needed, size = tokens * dtype.itemsize, bin_.stat().st_size
    if size != needed:
        difference = "shorter" if size < needed else "longer"
        raise ValueError(f"{bin_} is {difference} than {idx} says: {size} bytes, not {needed}")
    if tokens == 0:
        raise ValueError(f"{prefix} holds no token")
    stamp = (idx.stat().st_size, idx.stat().st_mtime_ns)
    return IndexedFile(prefix, boundaries - 1, sequences, tokens, dtype, stamp)


def check_token_ids(file: IndexedFile, tokenizer: Tokenizer) -> None:
    """Raises: ValueError when the file holds ids that the tokenizer has not."""
    count = min(file.tokens, CHECKED_TOKENS)
    ids = np.memmap(f"{file.prefix}.bin", dtype=file.dtype, mode="r", shape=(count,))
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(
                f"{file.prefix}.bin holds token id {token}, but tokenizer {tokenizer.path} has "
                f"{tokenizer.vocab_size} tokens: preprocess the data with the same tokenizer"
            )


def data_summary(prefixes: Iterable[str]) -> str:
    """One line per data set: documents and tokens.

    Raises: as `inspect`.
    """
    lines = []
    for prefix in prefixes:
        file = inspect(prefix)
        mean = file.tokens / file.documents
        lines.append(
            f"{prefix}: {file.documents:,} documents, {file.tokens:,} tokens ({mean:.1f} each)"
        )
    return "\n".join(lines)


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the token distribution of a dataset's loss targets, in nats per token.

    It is the loss of the best model that ignores all context, over just the tokens that the loss of
    `dataset` is taken over.

    Args:
        dataset: items with `labels` [S] and `loss_mask` [S], as `build_datasets` makes them.
    """
    counts = np.zeros(0, dtype=np.int64)
    for number in range(len(dataset)):
        item = dataset[number]
        more = np.bincount(item["labels"][item["loss_mask"] > 0].numpy(), minlength=counts.size)
        more[: counts.size] += counts
        counts = more
    if counts.sum() == 0:
        raise ValueError("the dataset has no loss target to take an entropy of")
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
