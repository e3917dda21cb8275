"""Held-out text as sequences of token ids, cut as in training, and classes of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_coe.analysis.routing import Ints
from megatron_coe.data.records import Fields, check_inputs, read_texts

CLASSES = ("number", "word", "symbol", "space", "mixed", "special")
"""Kinds of tokens: digits, letters, neither, white space, several of these; control tokens."""

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Source:
    """A source of text and the number of tokens to read from it.

    Args:
        paths: prefixes of `.bin/.idx` pairs, tokenized by the model's tokenizer, or files of text
            (see `data.records`), read in this order.
        fields: of a record in a file that hold the text.
        tokens: to read, rounded up to whole sequences.
        seq_length: S, the most tokens of a sequence; None: 512, or fewer if the model has fewer
            positions.
        mode: packed (documents joined, cut every S tokens) or padded (one document a sequence);
            None: as the model was trained.
    """

    paths: tuple[Path, ...]
    fields: Fields
    tokens: int = 16384
    seq_length: int | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.seq_length is not None and self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length}: at least 2 are needed")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: at least 1 is needed")
        for path in self.paths:
            if not _is_data_set(path):
                if not path.exists():
                    raise ValueError(f"{path}: neither a data set ({path}.idx) nor a file of text")
                check_inputs([path], self.fields)

    def read(
        self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, mode: str
    ) -> list[Ints]:
        """Read the sequences' token ids, for a model of that configuration, trained in that mode.

        Raises:
            ValueError: the text is damaged, too short, or of another tokenizer.
        """
        named = ", ".join(map(str, self.paths))
        positions = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
        S = self.seq_length or min(DEFAULT_LENGTH, positions)
        if positions < S:
            raise ValueError(f"seq_length={S}: the model has max_position_embeddings={positions}")
        found, total = [], 0
        for sequence in _cut(self._documents(tokenizer), S, self.mode or mode):
            if sequence.max() >= config.vocab_size or sequence.min() < 0:
                raise ValueError(
                    f"{named}: holds the token id {sequence.max()}, but the model has vocab_size="
                    f"{config.vocab_size}: the data is of another tokenizer"
                )
            found.append(sequence)
            total += len(sequence)
            if total >= self.tokens:
                break
        if not found:
            raise ValueError(f"{named}: too little text for one sequence of {S} tokens")
        return found

    def _documents(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Ints]:
        for path in self.paths:
            if _is_data_set(path):
                yield from _stored_documents(str(path))
            else:
                yield from self._tokenized_documents(path, tokenizer)

    def _tokenized_documents(
        self, path: Path, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[Ints]:
        """Yield documents with the BOS of training and the EOD of `coe preprocess --append-eod`."""
        first = tokenizer.encode("a")[:1]
        begin = first if first == [tokenizer.bos_token_id] else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for text in read_texts([path], self.fields):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids:
                yield np.array(begin + ids + end)


def _cut(documents: Iterable[Ints], S: int, mode: str) -> Iterator[Ints]:
    if mode != "packed":
        yield from (document[:S] for document in documents if len(document) > 1)
        return
    rest: list[Ints] = []
    for document in documents:
        rest.append(document)
        if sum(map(len, rest)) >= S:
            joined = np.concatenate(rest)
            whole = len(joined) // S * S
            yield from joined[:whole].reshape(-1, S)
            rest = [joined[whole:]]


def token_classes(ids: Ints, tokenizer: PreTrainedTokenizerBase) -> Ints:
    """Return the index into `CLASSES` of each token, by its own text, [T]."""
    special = set(tokenizer.all_special_ids)
    known, place = np.unique(ids, return_inverse=True)
    names = (
        "special" if number in special else _class_of(tokenizer.decode([number]))
        for number in known.tolist()
    )
    return np.array([CLASSES.index(name) for name in names])[place]


def _class_of(text: str) -> str:
    text = text.strip()
    if not text:
        return "space"
    if text.isdigit():
        return "number"
    if text.isalpha():
        return "word"
    return "mixed" if any(map(str.isalnum, text)) else "symbol"


def _is_data_set(path: Path) -> bool:
    return Path(f"{path}.idx").is_file()


def _stored_documents(prefix: str) -> Iterator[Ints]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds

    from megatron_coe.data.indexed import inspect

    inspect(prefix)
    stored = IndexedDataset(prefix)
    ends = stored.document_indices
    for first, end in zip(ends, islice(ends, 1, None), strict=False):
        parts = [stored.get(sequence) for sequence in range(first, end)]
        if parts and sum(map(len, parts)):
            yield np.concatenate(parts).astype(np.int64)


def sequence_numbers(sequences: Sequence[Ints]) -> Ints:
    """Return the number of the sequence that each token is of, [T]."""
    return np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
