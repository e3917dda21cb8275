"""Checks of a `.bin/.idx` pair before Megatron maps it into memory.

Megatron asserts or fails deep inside on files that are missing, truncated, damaged or of another
tokenizer, or reads wrong data; here each of these is one error that names the file. Sizes, counts
and documents are always checked, other contents by samples, for a quick start (`_sampled`); ids are
checked again when they are read (`CheckedDataset`).

Documents without a token are valid: Megatron-LM's own preprocessing writes them without a sequence,
other writers as a sequence of length 0.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_coe.data.chat import answers_prefix
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.utils.errors import DataError

# magic, version, code of the dtype, number of sequences, number of document boundaries
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BYTES_PER_SEQUENCE = 4 + 8  # length (int32) and offset (int64)

# Of larger files only so much is checked, in slices from the first to the last, for a quick start.
CHECKED_TOKENS = 1 << 24
CHECKED_ENTRIES = 1 << 24
CHECKED_DOCUMENTS = 1000
_SLICES = 16
_FINGERPRINTED_BYTES = 1 << 20
DIGESTED_BYTES = 1 << 22


@dataclass(frozen=True)
class IndexedFile:
    """A checked `.bin/.idx` pair.

    Attributes:
        documents: number of documents with a token.
        empty: number of documents without one, which Megatron-LM writes without a sequence and
            others as a sequence of length 0.
        sequences: number of sequences of all documents, those of length 0 included.
        split: whether a document has several sequences, as where sentences were split.
        dtype: of a token id in the `.bin`.
        stamp: changes when the pair is rewritten, also within one clock tick or with the old
            modification time.
    """

    prefix: str
    documents: int
    empty: int
    sequences: int
    split: bool
    tokens: int
    dtype: np.dtype
    stamp: tuple[int, ...]
    answers: IndexedFile | None = None
    """The pair that says which tokens are answers (`answers_prefix`), if there is one."""


def inspect(prefix: str) -> IndexedFile:
    """Read the `.idx` and check the `.bin` against it, and the companion pair if there is one.

    Raises: ValueError naming the file that is missing, damaged, empty, or not the other's partner.
    """
    tokens, companion = _inspect(prefix), answers_prefix(prefix)
    if not _exists(companion):
        return tokens
    answers = _inspect(companion)
    same = np.array_equal(_shape_of(prefix), _shape_of(companion))
    if not same or answers.dtype != np.uint8:
        raise ValueError(
            f"{companion}.idx does not belong to {prefix}.idx: its documents have other lengths or "
            "are no bytes; preprocess the data again, or remove the pair"
        )
    return replace(tokens, answers=answers, stamp=(*tokens.stamp, *answers.stamp))


def _exists(prefix: str) -> bool:
    return Path(f"{prefix}.idx").is_file()


def document_lengths(file: IndexedFile) -> np.ndarray:
    """Return the tokens of each document, int64 [documents + empty]."""
    lengths, documents = _lengths_and_documents(file.prefix)
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.diff(before[documents])


def sequence_lengths(file: IndexedFile) -> np.ndarray:
    """Return the tokens of each sequence, int32 [sequences]."""
    lengths, _ = _lengths_and_documents(file.prefix)
    return lengths


def _shape_of(prefix: str) -> np.ndarray:
    return np.concatenate(_lengths_and_documents(prefix))


def _lengths_and_documents(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    idx = Path(f"{prefix}.idx")
    _, sequences, boundaries = _read_header(idx)
    content = np.memmap(idx, mode="r")[_HEADER.size :]
    lengths, _, documents = _arrays(content, sequences, boundaries)
    return lengths, documents


def _inspect(prefix: str) -> IndexedFile:
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise ValueError(f"{path} does not exist (datasets are named without .bin and .idx)")
    code, sequences, boundaries = _read_header(idx)
    if sequences == 0 or boundaries < 2:
        raise ValueError(f"{prefix} holds no document")
    dtype = np.dtype(DType.dtype_from_code(code))
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{idx} says that ids are of type {dtype} ({code}): they must be integers")
    content = np.memmap(idx, mode="r")[_HEADER.size :]
    lengths, offsets, documents = _arrays(content, sequences, boundaries)
    if int(lengths.min()) < 0:
        number = int(lengths.argmin())
        raise ValueError(f"{idx} is damaged: sequence {number} has the length {lengths[number]}")
    tokens = int(lengths.sum(dtype=np.int64))
    needed, size = tokens * dtype.itemsize, bin_.stat().st_size
    if size != needed:
        difference = "shorter" if size < needed else "longer"
        raise ValueError(f"{bin_} is {difference} than {idx} says: {size} bytes, not {needed}")
    if tokens == 0:
        raise ValueError(f"{prefix} holds no token")
    _check_offsets(idx, lengths, offsets, dtype.itemsize)
    most = _check_documents(idx, documents, sequences)
    stamp = (idx.stat().st_size, idx.stat().st_mtime_ns, _checksum(content))
    with_tokens = sum(int(part.sum()) for part in non_empty(lengths, documents))
    return IndexedFile(
        prefix,
        documents=with_tokens,
        empty=boundaries - 1 - with_tokens,
        sequences=sequences,
        split=most > 1,
        tokens=tokens,
        dtype=dtype,
        stamp=stamp,
    )


def non_empty(lengths: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for consecutive blocks of documents, which of them hold a token (bool).

    Args:
        lengths: of the sequences.
        documents: their boundaries: document d has the sequences from `documents[d]` on up to
            `documents[d + 1]`.
    """
    all_sequences_do = int(lengths.min()) > 0
    for start in range(0, len(documents) - 1, CHECKED_ENTRIES):
        some = documents[start : start + CHECKED_ENTRIES + 1]
        if all_sequences_do:
            yield np.diff(some) > 0
        else:
            first, end = some[0], some[-1]
            before = np.concatenate([[0], np.cumsum(lengths[first:end], dtype=np.int64)])
            yield np.diff(before[some - first]) > 0


def identify(file: IndexedFile) -> dict[str, Any]:
    """Describe a dataset by its content, independent of its path.

    Of large files the digest covers slices from the first to the last byte, which takes
    milliseconds; the counts are of all.
    """
    digest = hashlib.sha256()
    for pair in [file, file.answers] if file.answers else [file]:
        for suffix in ("idx", "bin"):
            content = np.memmap(f"{pair.prefix}.{suffix}", mode="r")
            for part in _sampled(content.size, DIGESTED_BYTES):
                digest.update(content[part].data)
    return {
        "name": Path(file.prefix).name,
        "documents": file.documents,
        "tokens": file.tokens,
        "sha256": digest.hexdigest(),
    }


def check_token_ids(file: IndexedFile, tokenizer: Tokenizer) -> None:
    """Check that a file's ids are the tokenizer's, by samples of a large file.

    Raises: ValueError naming the document and the id.
    """
    ids = np.memmap(f"{file.prefix}.bin", dtype=file.dtype, mode="r", shape=(file.tokens,))
    for part in _sampled(file.tokens, CHECKED_TOKENS):
        wrong = _first_wrong(ids[part], tokenizer.vocab_size)
        if wrong is not None:
            place = part.start + wrong
            raise ValueError(
                _wrong_id(file.prefix, _document_of(file, place), int(ids[place]), tokenizer)
            )


def documents_begin_with(prefixes: Iterable[str], token: int) -> bool:
    """Return whether all documents begin with a token, judging by the first ones of each file."""
    return token >= 0 and all(_begin_with(prefix, token) for prefix in prefixes)


def _begin_with(prefix: str, token: int) -> bool:
    data = IndexedDataset(prefix)
    first = data.document_indices[:-1][:CHECKED_DOCUMENTS]
    first = first[data.sequence_lengths[first] > 0]
    return len(first) > 0 and all(data.get(number, length=1)[0] == token for number in first)


class CheckedDataset(IndexedDataset):
    """Megatron's reader of a `.bin/.idx` pair; checks that every id read is one of the tokenizer's.

    An embedding lookup of another id fails far from its cause, and on a GPU ends the process. Only
    what is read is checked, so the cost is negligible beside a step.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer, mmap: bool = True) -> None:
        super().__init__(prefix, mmap=mmap)
        self._tokenizer = tokenizer
        companion = answers_prefix(prefix)
        self.answers = IndexedDataset(companion, mmap=mmap) if _exists(companion) else None
        """Which tokens are answers, by the same sequences; None: all are targets."""

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Read the ids of sequence `idx`, as in Megatron.

        Raises: DataError for an id outside of the vocabulary.
        """
        ids = super().get(idx, offset, length)
        wrong = _first_wrong(ids, self._tokenizer.vocab_size)
        if wrong is not None:
            document = int(np.searchsorted(self.document_indices, idx, side="right")) - 1
            raise DataError(_wrong_id(self.path_prefix, document, int(ids[wrong]), self._tokenizer))
        return ids


def _arrays(content: np.ndarray, sequences: int, boundaries: int) -> tuple[np.ndarray, ...]:
    """Return lengths and offsets of the sequences, and document boundaries, without modes."""
    middle = _BYTES_PER_SEQUENCE * sequences
    return (
        content[: 4 * sequences].view("<i4"),
        content[4 * sequences : middle].view("<i8"),
        content[middle : middle + 8 * boundaries].view("<i8"),
    )


def _read_header(idx: Path) -> tuple[int, int, int]:
    """Return the dtype's code, the number of sequences and that of document boundaries."""
    with idx.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{idx} is not an index of Megatron's")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in {kind.value for kind in DType}:
        raise ValueError(f"{idx} is of an unknown version ({version}) or dtype ({code})")
    needed = _HEADER.size + sequences * _BYTES_PER_SEQUENCE + boundaries * 8
    size = idx.stat().st_size
    if size not in (needed, needed + sequences):  # multimodal data have a mode for each sequence
        fault = "is cut short" if size < needed else "is longer than its counts say"
        raise ValueError(f"{idx} {fault}: {size} of {needed} bytes")
    return code, sequences, boundaries


def _check_offsets(idx: Path, lengths: np.ndarray, offsets: np.ndarray, itemsize: int) -> None:
    """Check that each sequence begins where the one before it ends."""
    if offsets[0] != 0:
        raise ValueError(f"{idx} is damaged: sequence 0 has the offset {offsets[0]}, not 0")
    for part in _sampled(len(lengths) - 1, CHECKED_ENTRIES):
        after = slice(part.start + 1, part.stop + 1)
        expected = offsets[part] + lengths[part].astype(np.int64) * itemsize
        wrong = np.flatnonzero(offsets[after] != expected)
        if wrong.size:
            number = after.start + int(wrong[0])
            raise ValueError(
                f"{idx} is damaged: sequence {number} has the offset {offsets[number]}, but the "
                f"one before it ends at {expected[wrong[0]]}; preprocess the data again"
            )


def _check_documents(idx: Path, boundaries: np.ndarray, sequences: int) -> int:
    """Check that documents follow one another from the first sequence to the last.

    Returns: the most sequences of a document.
    """
    damaged = f"{idx} is damaged: the documents "
    if boundaries[0] != 0 or boundaries[-1] != sequences:
        raise ValueError(
            f"{damaged}go from sequence {boundaries[0]} to {boundaries[-1]} instead of from 0 to "
            f"{sequences}; preprocess the data again"
        )
    most = 0
    for start in range(0, len(boundaries) - 1, CHECKED_ENTRIES):
        steps = np.diff(boundaries[start : start + CHECKED_ENTRIES + 1])
        if steps.min() < 0:
            number = start + int(steps.argmin())
            raise ValueError(f"{damaged}overlap: document {number} ends before it begins")
        most = max(most, int(steps.max()))
    return most


def _sampled(size: int, limit: int) -> Iterator[slice]:
    """Return slices of `size` entries to check: all, or about `limit` with first and last."""
    if size <= limit:
        if size > 0:
            yield slice(0, size)
        return
    length = limit // _SLICES
    for number in range(_SLICES):
        start = (size - length) * number // (_SLICES - 1)
        yield slice(start, start + length)


def _first_wrong(ids: np.ndarray, vocab_size: int) -> int | None:
    """Return the index of the first id outside of [0, vocab_size)."""
    if ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size):
        return None
    return int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])


def _document_of(file: IndexedFile, token: int) -> int:
    """Return the index of a token's document, for a message."""
    idx = Path(f"{file.prefix}.idx")
    _, sequences, boundaries = _read_header(idx)
    content = np.memmap(idx, mode="r")[_HEADER.size :]
    _, offsets, documents = _arrays(content, sequences, boundaries)
    byte = token * file.dtype.itemsize
    sequence = int(np.searchsorted(offsets, byte, side="right")) - 1
    return int(np.searchsorted(documents, sequence, side="right")) - 1


def _wrong_id(prefix: str, document: int, token: int, tokenizer: Tokenizer) -> str:
    return (
        f"{prefix}.bin holds token id {token} in document {document}, but tokenizer "
        f"{tokenizer.path} has {tokenizer.vocab_size} tokens: preprocess the data with the same "
        "tokenizer"
    )


def _checksum(content: np.ndarray) -> int:
    """Return the CRC of both ends of an index, where another differs even at equal size."""
    ends = content[:_FINGERPRINTED_BYTES].tobytes(), content[-_FINGERPRINTED_BYTES:].tobytes()
    return zlib.crc32(ends[1], zlib.crc32(ends[0]))


def count_answers(file: IndexedFile) -> int:
    """Count the tokens of answers in a file that has them marked."""
    assert file.answers is not None
    return int(np.count_nonzero(np.memmap(f"{file.answers.prefix}.bin", mode="r")))


def data_summary(prefixes: Iterable[str]) -> str:
    """Return a line per dataset: documents and tokens.

    Raises: as `inspect`.
    """
    lines = []
    for file in map(inspect, prefixes):
        empty = f" and {file.empty:,} empty ones, left out" if file.empty else ""
        mean = file.tokens / file.documents
        targets = f", {count_answers(file):,} of them answers" if file.answers else ""
        lines.append(
            f"{file.prefix}: {file.documents:,} documents{empty}, {file.tokens:,} tokens "
            f"({mean:.1f} each){targets}"
        )
    return "\n".join(lines)


def count_targets(dataset: Any) -> np.ndarray:
    """Count each id among a dataset's loss targets, int64 [up to V].

    Args:
        dataset: items with `labels` [S] and `loss_mask` [S], as from `build_datasets`.
    """
    counts = np.zeros(0, dtype=np.int64)
    for number in range(len(dataset)):
        item = dataset[number]
        more = np.bincount(item["labels"][item["loss_mask"] > 0].numpy(), minlength=counts.size)
        more[: counts.size] += counts
        counts = more
    return counts


def unigram_entropy(dataset: Any) -> float:
    """Return the entropy of a dataset's loss targets, in nats per token.

    It is the loss of the best model that ignores all context, over the tokens that count in the
    loss of `dataset`.

    Args:
        dataset: as for `count_targets`.

    Raises: ValueError for a dataset without loss targets.
    """
    return entropy(count_targets(dataset))


def entropy(*counted: np.ndarray) -> float:
    """Return the entropy of what was counted, in one or several datasets together, in nats.

    Args:
        counted: how often each id stands there, int64 [any length].

    Raises: ValueError where nothing was.
    """
    counts = np.zeros(max(map(len, counted)), dtype=np.int64)
    for of_one in counted:
        counts[: len(of_one)] += of_one
    if counts.sum() == 0:
        raise ValueError("the dataset has no loss target to take an entropy of")
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
