"""Training and validation samples out of `.bin/.idx` files.

Three modes over the same files. In each a sample has S = seq_length input positions, and is a dict
of `tokens`, `labels`, `position_ids` (int64 [S]) and `loss_mask` (float32 [S]), as from Megatron's
`GPTDataset`. There is no attention mask: attention is causal in the kernel.

    packed    Megatron's `GPTDataset`: documents joined, cut every S tokens; a sample reads S + 1
              tokens and has S loss terms.
    padded    one document per sample, as in the paper: the first S tokens, padded on the right. A
              document of n tokens has min(n, S) - 1 loss terms: the token after a cut is not a
              target, as where a model is given S tokens and shifts them itself (the authors' 512
              inputs have 511 loss terms). Megatron's S + 1 would add one.
    packed_documents
              whole documents side by side, each as in `padded` (a longer one is cut at S tokens),
              with positions from 0 and padded to a multiple of `pad_seq_to_mult`. `cu_seqlens`
              (int32, filled up with S) has their offsets, for attention that stays within one.

Where a file says which tokens are answers (`indexed.answers_prefix`), they alone are targets in the
last two modes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset, Subset

from megatron_coe.data import index_cache
from megatron_coe.data.indexed import (
    CheckedDataset,
    IndexedFile,
    check_token_ids,
    document_lengths,
    inspect,
    non_empty,
    sequence_lengths,
)
from megatron_coe.data.packing import pack_documents
from megatron_coe.data.tokenizer import Tokenizer

Mode = Literal["packed", "padded", "packed_documents"]
Part = tuple[float, float]
"""Documents of a file, from one share of them up to another."""
WHOLE: Part = (0.0, 1.0)

# Validation samples must not depend on the seed of a run.
VALIDATION_SEED = 0
MAX_SEED = 2**32 - 1  # numpy's


@dataclass
class DocumentsConfig(GPTDatasetConfig):
    """Megatron's configuration, and what packing documents adds to it."""

    pad_seq_to_mult: int = 1
    """Each document is padded to a multiple of this."""
    part: Part = WHOLE
    """The documents of each file that are read."""


class PackedDataset(GPTDataset):
    """Megatron's `GPTDataset`, over data whose ids are checked as they are read."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """Open a `.bin/.idx` pair."""
        return CheckedDataset(dataset_path, config.tokenizer, mmap=config.mmap_bin_files)


class PaddedDataset(MegatronDataset):
    """One document per sample, cut on the right at S tokens and padded (mode `padded`).

    Training reads every document once per epoch, in an order that depends on the seed and the
    epoch; validation reads the documents in their order. Takes the arguments of `MegatronDataset`,
    so that `BlendedMegatronDatasetBuilder` builds and blends it; `indexed_indices` are documents,
    of which the empty ones are left out, and the length is exactly `num_samples` (None: one epoch).
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        has_tokens = non_empty(indexed_dataset.sequence_lengths, indexed_dataset.document_indices)
        indices = indexed_indices[np.concatenate(list(has_tokens))[indexed_indices]]
        super().__init__(indexed_dataset, dataset_path, indices, num_samples, index_split, config)
        self._order = self._document_order()
        # Embeddings are looked up at padded positions too, so the id must exist.
        self._padding = max(config.tokenizer.pad, 0)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Return the number of documents, the unit that is split and shuffled."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """Open a `.bin/.idx` pair."""
        return CheckedDataset(dataset_path, config.tokenizer, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        sample = self._blank_sample()
        self._fill(sample, int(self._order[idx]), 0)
        return sample

    def _blank_sample(self) -> dict[str, torch.Tensor]:
        """Return a sample of padding without a loss term."""
        seq_length = self.config.sequence_length
        tokens = torch.full((seq_length,), self._padding, dtype=torch.int64)
        return {
            "tokens": tokens,
            "labels": tokens.clone(),
            "loss_mask": torch.zeros(seq_length, dtype=torch.float32),
            "position_ids": torch.arange(seq_length, dtype=torch.int64),
        }

    def _fill(self, sample: dict[str, torch.Tensor], document: int, start: int) -> None:
        """Write a document into a sample from position `start` on, cut at S tokens."""
        seq_length = self.config.sequence_length
        ids = torch.from_numpy(self._read(self.dataset, document, seq_length))
        inputs, targets = slice(start, start + len(ids)), slice(start, start + len(ids) - 1)
        sample["tokens"][inputs] = ids
        sample["labels"][targets] = ids[1:]
        sample["loss_mask"][targets] = 1.0
        if self.dataset.answers is not None:
            answers = self._read(self.dataset.answers, document, seq_length)
            sample["loss_mask"][targets] = torch.from_numpy(answers[1:]).float()

    def _read(self, dataset: IndexedDataset, document: int, length: int) -> np.ndarray:
        """Read the first `length` tokens of a document, which may be several sentences."""
        first, end = dataset.document_indices[document : document + 2]
        parts: list[np.ndarray] = []
        for sequence in range(first, end):
            parts.append(dataset.get(sequence)[:length])
            length -= len(parts[-1])
            if length == 0:
                break
        return np.concatenate(parts).astype(np.int64)

    def _document_order(self) -> np.ndarray:
        """Return the document of each sample, int32 [number of samples]."""
        samples = len(self.indices) if self.num_samples is None else self.num_samples
        epochs = []
        for epoch in range(math.ceil(samples / len(self.indices))):
            documents = self.indices.astype(np.int32)
            if self.index_split is Split.train:
                # RandomState: numpy guarantees that its streams never change.
                np.random.RandomState([self.config.random_seed, epoch]).shuffle(documents)
            epochs.append(documents)
        return np.concatenate(epochs)[:samples]


class PackedDocumentsDataset(PaddedDataset):
    """Whole documents side by side in a sequence (mode `packed_documents`).

    Training packs the documents again for each epoch, in an order that depends on the seed and the
    epoch; validation packs them in their order. An epoch has the same number of samples each time.
    """

    def _document_order(self) -> np.ndarray:
        """Prepare to pack; return the numbers of the samples."""
        lengths, boundaries = self.dataset.sequence_lengths, self.dataset.document_indices
        before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        tokens = before[boundaries[1:]] - before[boundaries[:-1]]
        self._lengths = _positions(tokens, self.config.sequence_length, self.config.pad_seq_to_mult)
        self._packed: dict[int, list[np.ndarray]] = {}
        self.samples_per_epoch = len(self._packs(0))
        return np.arange(self.num_samples or self.samples_per_epoch)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        epoch, number = divmod(int(self._order[idx]), self.samples_per_epoch)
        documents = self._packs(epoch)[number]
        offsets = [0, *np.cumsum(self._lengths[documents]).tolist()]
        sample, seq_length = self._blank_sample(), self.config.sequence_length
        for document, start in zip(documents, offsets[:-1], strict=True):
            self._fill(sample, int(document), start)
        most = seq_length // self.config.pad_seq_to_mult + 1
        cu_seqlens = torch.full((most,), seq_length, dtype=torch.int32)
        cu_seqlens[: len(offsets)] = torch.tensor(offsets)
        for start in offsets:  # what is left over has positions of its own, too
            sample["position_ids"][start:] = torch.arange(seq_length - start)
        return sample | {"cu_seqlens": cu_seqlens}

    def _packs(self, epoch: int) -> list[np.ndarray]:
        """Return the documents of each sample of an epoch; those of the latest two are kept."""
        if epoch not in self._packed:
            latest = {key: packs for key, packs in self._packed.items() if key == epoch - 1}
            self._packed = {**latest, epoch: self._pack(epoch)}
        return self._packed[epoch]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        """Pack the documents of an epoch, into samples in their order."""
        documents = self.indices.astype(np.int32)
        random = np.random.RandomState([self.config.random_seed, epoch])
        is_training = self.index_split is Split.train
        if is_training:
            random.shuffle(documents)
        packs = pack_documents(self._lengths[documents], self.config.sequence_length)
        order = random.permutation(len(packs)) if is_training else range(len(packs))
        return [documents[packs[number]] for number in order]


def _positions(tokens: np.ndarray, seq_length: int, multiple: int) -> np.ndarray:
    """Return the positions that documents take in a pack, padding included."""
    return -(-np.minimum(tokens, seq_length) // multiple) * multiple


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron's builder without its collectives: ranks synchronize in `index_cache.prepare`.

    Without torch.distributed, Megatron-Core 0.16.1 cannot blend with a cache (`BlendedDataset`
    reads its rank): a blend's index is quickly rebuilt, so it is not cached.
    """

    @staticmethod
    def build_generic_dataset(
        cls: type[Dataset] | Callable[..., Dataset],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Dataset:
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            *arguments, config = args
            args = (*arguments, replace(config, path_to_cache=None))
        return cls(*args)

    def _build_megatron_dataset_splits(
        self,
        dataset_path: str | None,
        split: list[Any],
        sizes: list[int],
        synchronize_ranks: bool = True,
    ) -> list[MegatronDataset | None]:
        """Build a file's datasets of the part of its documents that the configuration names."""
        parts = [None if whole is None else self.config.part for whole in split]
        return super()._build_megatron_dataset_splits(dataset_path, parts, sizes, synchronize_ranks)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[float], sizes_per_dataset: list[list[int]]
    ) -> list[list[MegatronDataset | None]]:
        of_each = [
            self._build_megatron_dataset_splits(prefix, split, sizes, synchronize_ranks=False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*of_each, strict=True)]


KINDS: dict[str, type[MegatronDataset]] = {
    "packed": PackedDataset,
    "padded": PaddedDataset,
    "packed_documents": PackedDocumentsDataset,
}
"""The dataset of each mode."""


def split_parts(split: str | None) -> tuple[Part, Part | None]:
    """Return the part of each training set that is trained on, and the one that is held out.

    Args:
        split: as `data.split`; None: all is trained on.
    """
    if split is None:
        return WHOLE, None
    train, valid, _ = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return train, valid


def build_datasets(*, valid: Sequence[str], **options: Any) -> tuple[Dataset, Dataset | None]:
    """Build the training and the validation dataset, where there is one held-out set or none.

    Args:
        valid: prefixes of the held-out data; none: no validation dataset.
        options: as for `build_dataset_sets`.

    Raises: as `build_dataset_sets`.
    """
    train_set, sets = build_dataset_sets(valid={"": valid} if valid else {}, **options)
    return train_set, sets.get("")


def build_dataset_sets(
    *,
    train: Sequence[str | tuple[str, float]],
    valid: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    seq_length: int,
    mode: Mode,
    num_samples: tuple[int, int | None],
    seed: int,
    pad_seq_to_mult: int = 1,
    split: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Dataset, dict[str, Dataset]]:
    """Build the training and the validation datasets, the same on every rank in any layout.

    With torch.distributed initialized it is a collective of all ranks.

    Args:
        train: prefixes of `.bin/.idx` pairs, all with a weight in the blend or none: then each is
            drawn in proportion to its size (documents in mode `padded`, otherwise tokens). A pair
            of weight 0 is not read.
        valid: prefixes of each held-out set, by its name.
        seq_length: S, input positions of a sample.
        num_samples: training samples, for which the data is repeated as often as needed (the
            dataset may be slightly longer); validation samples of each set, at most one epoch
            (None: all).
        seed: order of the training samples; validation does not depend on it.
        pad_seq_to_mult: in mode `packed_documents`, documents are padded to a multiple of it.
        split: in place of `valid`, holds out a part of each training set, as one set "".
        cache_dir: where packed mode and blends keep their indices; None: `index_cache` beside the
            first data file. Data that has been rewritten is indexed again.

    Returns: the training dataset, and the validation datasets by name.

    Raises: ValueError naming the argument or the file that cannot be used.
    """
    files, weights, valid_files = check_datasets(
        train=train,
        valid=valid,
        tokenizer=tokenizer,
        seq_length=seq_length,
        mode=mode,
        num_samples=num_samples,
        seed=seed,
        pad_seq_to_mult=pad_seq_to_mult,
        split=split,
    )
    cache = Path(cache_dir) if cache_dir else Path(files[0].prefix).parent / "index_cache"

    def config(use: Split, chosen: Sequence[IndexedFile], **options: Any) -> GPTDatasetConfig:
        blend = ([file.prefix for file in chosen], weights if use is Split.train else None)
        return DocumentsConfig(
            random_seed=seed if use is Split.train else VALIDATION_SEED,
            sequence_length=seq_length,
            blend_per_split=[blend if use is which else None for which in Split],
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            pad_seq_to_mult=pad_seq_to_mult,
            **options,
        )

    def build(
        use: Split, chosen: Sequence[IndexedFile], size: int | None, part: Part, **options: object
    ) -> Any:
        kind = KINDS[mode]
        described = config(use, chosen, part=part, **options)
        # What is not asked for leaves the name as it was before there was such a thing.
        more = ((pad_seq_to_mult,) if pad_seq_to_mult > 1 else ()) + (part if part != WHOLE else ())
        named = (kind.__name__, use.name, size, seq_length, described.random_seed, weights, *more)
        folder = cache / _fingerprint(chosen, (*named, tokenizer.unique_identifiers))
        blends = len(chosen) > 1 and torch.distributed.is_initialized()
        if mode == "packed" or blends:  # otherwise Megatron keeps no index
            index_cache.prepare(folder, lambda partial: _build(kind, use, size, described, partial))
        return _build(kind, use, size, described, folder)

    trained, held_out = split_parts(split)
    surplus = _surplus(weights, num_samples[0])
    options = {"mid_level_dataset_surplus": surplus}
    train_set = build(Split.train, files, num_samples[0], trained, **options)
    valid_sets = {}
    for name, chosen in valid_files.items():
        valid_set = build(Split.valid, chosen, None, held_out or WHOLE)
        if num_samples[1] is not None and num_samples[1] < len(valid_set):
            valid_set = Subset(valid_set, range(num_samples[1]))
        valid_sets[name] = valid_set
    return train_set, valid_sets


def check_datasets(
    *,
    train: Sequence[str | tuple[str, float]],
    valid: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    seq_length: int,
    mode: Mode,
    num_samples: tuple[int, int | None],
    seed: int,
    pad_seq_to_mult: int = 1,
    split: str | None = None,
) -> tuple[list[IndexedFile], list[float], dict[str, list[IndexedFile]]]:
    """Check the arguments of `build_dataset_sets` and its files, on each process by itself.

    Returns: the training files, their weights, and the held-out files by the name of their set.

    Raises: as `build_dataset_sets`.
    """
    if mode not in (*KINDS, "examples"):
        raise ValueError(f"mode={mode!r}: choose {', '.join(KINDS)}")
    if seq_length < 2:
        raise ValueError(f"seq_length={seq_length}: a loss term needs at least 2 tokens")
    if seq_length % pad_seq_to_mult:
        raise ValueError(f"pad_seq_to_mult={pad_seq_to_mult} does not divide {seq_length=}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed}: give a number from 0 to {MAX_SEED}")
    if num_samples[0] < 1 or (num_samples[1] is not None and num_samples[1] < 1):
        raise ValueError(f"num_samples={num_samples}: at least 1 of each is needed")
    files, weights = _training_blend(train, mode)
    valid_files = {name: [inspect(prefix) for prefix in of] for name, of in valid.items()}
    for file in chain(files, *valid_files.values()):
        check_token_ids(file, tokenizer)
        _check_fits(file, mode)
    trained, held_out = split_parts(split)
    if held_out is not None:
        valid_files = {"": files}
    for file in files if split is not None else ():
        _check_part(file, mode, trained, f"data.split={split!r} trains on")
    for file in chain(*valid_files.values()):
        if held_out is not None:
            _check_part(file, mode, held_out, f"data.split={split!r} holds out")
        tokens = int(_lengths(file, mode, held_out).sum()) if held_out else file.tokens
        if mode == "packed" and tokens <= seq_length:
            raise ValueError(
                f"{file.prefix} has {tokens} tokens{' held out' if held_out else ''}, too few for "
                f"one packed sample of seq_length={seq_length} (it needs {seq_length + 1}); "
                "shorten it or use padded"
            )
    return files, weights, valid_files


def _build(
    kind: type[MegatronDataset],
    split: Split,
    size: int | None,
    config: GPTDatasetConfig,
    cache: Path,
) -> Dataset:
    sizes = [size if split is which else 0 for which in Split]
    config = replace(config, path_to_cache=str(cache))
    return _Builder(kind, sizes, lambda: True, config).build()[split.value]


def _training_blend(
    train: Sequence[str | tuple[str, float]], mode: Mode
) -> tuple[list[IndexedFile], list[float]]:
    if not train:
        raise ValueError("data.train is empty: name at least one dataset")
    weighted = [source for source in train if not isinstance(source, str)]
    if len(weighted) not in (0, len(train)):
        raise ValueError(f"train={list(train)}: give every dataset a weight, or none")
    for prefix, weight in weighted:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"train: the weight of {prefix} is {weight}, it must be 0 or more")
    if weighted:
        drawn = [(prefix, float(weight)) for prefix, weight in weighted if weight]
        if not drawn:
            raise ValueError(f"train={list(train)}: give at least one a weight above 0")
        return [inspect(prefix) for prefix, _ in drawn], [weight for _, weight in drawn]
    files = [inspect(prefix) for prefix in train if isinstance(prefix, str)]
    return files, [float(f.documents if mode == "padded" else f.tokens) for f in files]


def _check_fits(file: IndexedFile, mode: Mode) -> None:
    if mode == "packed" and file.split:
        raise ValueError(
            f"{file.prefix} has its sentences split: packed mode would shuffle them one by one; "
            "preprocess without --split-sentences, or use mode padded"
        )
    if mode == "packed" and file.answers:
        raise ValueError(
            f"{file.prefix} has its answers marked ({file.answers.prefix}), and mode packed joins "
            "documents without regard to them: use data.mode=padded or packed_documents"
        )


def samples_per_epoch(
    files: Sequence[IndexedFile],
    mode: str,
    seq_length: int,
    pad_seq_to_mult: int = 1,
    split: str | None = None,
) -> float:
    """Return the number of sequences in one epoch of the training data."""
    part, _ = split_parts(split)
    if part == WHOLE and mode != "packed_documents":  # known without reading the index
        packed = sum(file.tokens for file in files) / seq_length
        return packed if mode == "packed" else sum(file.documents for file in files)
    lengths = [_lengths(file, mode, part) for file in files]
    if mode == "packed":
        return sum(int(each.sum()) for each in lengths) / seq_length
    if mode == "packed_documents":
        packs = (_positions(each, seq_length, pad_seq_to_mult) for each in lengths)
        return sum(len(pack_documents(each[each > 0], seq_length)) for each in packs)
    return sum(int(np.count_nonzero(each)) for each in lengths)


def describe_split(files: Sequence[IndexedFile], mode: str, split: str) -> str:
    """Say how many documents are trained on and held out."""
    trained, held_out = (
        0 if part is None else sum(np.count_nonzero(_lengths(f, mode, part)) for f in files)
        for part in split_parts(split)
    )
    return f"split {split}: {trained:,} documents to train on, {held_out:,} held out"


def _lengths(file: IndexedFile, mode: str, part: Part) -> np.ndarray:
    """Return the tokens of each document of a part of a file, cut as Megatron's builder does."""
    # The units of mode packed are sequences: an empty document may have none.
    lengths = sequence_lengths(file) if mode == "packed" else document_lengths(file)
    begin, end = (round(share * float(len(lengths))) for share in part)
    return lengths[begin:end]


def _check_part(file: IndexedFile, mode: str, part: Part, text: str) -> None:
    if not np.any(_lengths(file, mode, part)):
        raise ValueError(
            f"{text} none of the {file.documents} documents of {file.prefix}: give that part a "
            "larger share"
        )


def truncation(files: Sequence[IndexedFile], seq_length: int) -> str | None:
    """Say how many documents of marked answers are cut at S tokens; None: none is.

    Answers that stand beyond the cut are no targets: counted are the tokens, and the documents that
    lose all of theirs.
    """
    cut = lost = mute = documents = 0
    for file in files:
        if file.answers is None:
            continue
        lengths = document_lengths(file)
        documents += len(lengths)
        starts = np.cumsum(lengths) - lengths
        answers = np.memmap(f"{file.answers.prefix}.bin", mode="r")
        for number in np.flatnonzero(lengths > seq_length):
            of_document = answers[starts[number] : starts[number] + lengths[number]]
            cut, lost = cut + 1, lost + int(np.count_nonzero(of_document[seq_length:]))
            mute += not of_document[1:seq_length].any()
    if not cut:
        return None
    return (
        f"{cut:,} of {documents:,} documents are longer than model.seq_length={seq_length} and are "
        f"cut: {lost:,} tokens of answers are no targets, and {mute:,} documents have none left"
    )


def _surplus(weights: Sequence[float], size: int) -> float:
    """Return the share of samples per dataset that the builder prepares beyond its own.

    The blend has up to len(weights) samples more than requested, and may take one more from a
    dataset than its share. Megatron's fixed 0.5% is less than that for small sizes, and fails.
    """
    shares = [weight / sum(weights) for weight in weights]
    return max((share * len(weights) + 1) / max(1.0, share * size) for share in shares)


def _fingerprint(files: Sequence[IndexedFile], use: tuple[object, ...]) -> str:
    """Name of the folder for the index of some files in one use.

    Megatron's own names contain only the path of the data, so that its index would also be used for
    other data written to the same path.
    """
    described = repr([(file.prefix, file.stamp) for file in files] + list(use)).encode()
    return hashlib.sha256(described).hexdigest()[:16]
