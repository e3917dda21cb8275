"""Training and validation samples out of `.bin/.idx` files.

Two modes over the same files. In both a sample has S = seq_length input positions, and is a dict of
`tokens`, `labels`, `position_ids` (int64 [S]) and `loss_mask` (float32 [S]), as from Megatron's
`GPTDataset`. There is no attention mask: attention is causal in the kernel.

    packed    Megatron's `GPTDataset`: documents joined, cut every S tokens; a sample reads S + 1
              tokens and has S loss terms.
    padded    one document per sample, as in the paper: the first S tokens, padded on the right. A
              document of n tokens has min(n, S) - 1 loss terms: the token after a cut is not a
              target, as where a model is given S tokens and shifts them itself (the authors' 512
              inputs have 511 loss terms). Megatron's S + 1 would add one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
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
    inspect,
    non_empty,
)
from megatron_coe.data.tokenizer import Tokenizer

Mode = Literal["packed", "padded"]

# Validation samples must not depend on the seed of a run.
VALIDATION_SEED = 0
MAX_SEED = 2**32 - 1  # numpy's


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
        seq_length = self.config.sequence_length
        ids = torch.from_numpy(self._read(int(self._order[idx]), seq_length))
        tokens = torch.full((seq_length,), self._padding, dtype=torch.int64)
        labels = tokens.clone()
        loss_mask = torch.zeros(seq_length, dtype=torch.float32)
        tokens[: len(ids)] = ids
        labels[: len(ids) - 1] = ids[1:]
        loss_mask[: len(ids) - 1] = 1.0
        position_ids = torch.arange(seq_length, dtype=torch.int64)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": position_ids,
        }

    def _read(self, document: int, length: int) -> np.ndarray:
        """Read the first `length` tokens of a document, which may be several sentences."""
        first, end = self.dataset.document_indices[document : document + 2]
        parts: list[np.ndarray] = []
        for sequence in range(first, end):
            parts.append(self.dataset.get(sequence)[:length])
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

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[float], sizes_per_dataset: list[list[int]]
    ) -> list[list[MegatronDataset | None]]:
        of_each = [
            self._build_megatron_dataset_splits(prefix, split, sizes, synchronize_ranks=False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(datasets) for datasets in zip(*of_each, strict=True)]


def build_datasets(
    *,
    train: Sequence[str | tuple[str, float]],
    valid: Sequence[str],
    tokenizer: Tokenizer,
    seq_length: int,
    mode: Mode,
    num_samples: tuple[int, int | None],
    seed: int,
    cache_dir: str | Path | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Build the training and the validation dataset, the same on every rank in any layout.

    With torch.distributed initialized it is a collective of all ranks.

    Args:
        train: prefixes of `.bin/.idx` pairs, all with a weight in the blend or none: then each is
            drawn in proportion to its size (documents in mode `padded`, otherwise tokens). A pair
            of weight 0 is not read.
        valid: prefixes of the held-out data; none: no validation dataset.
        seq_length: S, input positions of a sample.
        num_samples: training samples, for which the data is repeated as often as needed (the
            dataset may be slightly longer); validation samples, at most one epoch (None: all).
        seed: order of the training samples; validation does not depend on it.
        cache_dir: where packed mode and blends keep their indices; None: `index_cache` beside the
            first data file. Data that has been rewritten is indexed again.

    Returns: the training dataset, and the validation dataset if there is one.

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
    )
    cache = Path(cache_dir) if cache_dir else Path(files[0].prefix).parent / "index_cache"

    def config(split: Split, chosen: Sequence[IndexedFile], **options: object) -> GPTDatasetConfig:
        blend = ([file.prefix for file in chosen], weights if split is Split.train else None)
        return GPTDatasetConfig(
            random_seed=seed if split is Split.train else VALIDATION_SEED,
            sequence_length=seq_length,
            blend_per_split=[blend if split is which else None for which in Split],
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **options,
        )

    def build(
        split: Split, chosen: Sequence[IndexedFile], size: int | None, **options: object
    ) -> Any:
        kind = PackedDataset if mode == "packed" else PaddedDataset
        described = config(split, chosen, **options)
        use = (kind.__name__, split.name, size, seq_length, described.random_seed, weights)
        folder = cache / _fingerprint(chosen, (*use, tokenizer.unique_identifiers))
        blends = len(chosen) > 1 and torch.distributed.is_initialized()
        if mode == "packed" or blends:  # otherwise Megatron keeps no index
            index_cache.prepare(
                folder, lambda partial: _build(kind, split, size, described, partial)
            )
        return _build(kind, split, size, described, folder)

    surplus = _surplus(weights, num_samples[0])
    train_set = build(Split.train, files, num_samples[0], mid_level_dataset_surplus=surplus)
    if not valid_files:
        return train_set, None
    valid_set = build(Split.valid, valid_files, None)
    if num_samples[1] is not None and num_samples[1] < len(valid_set):
        valid_set = Subset(valid_set, range(num_samples[1]))
    return train_set, valid_set


def check_datasets(
    *,
    train: Sequence[str | tuple[str, float]],
    valid: Sequence[str],
    tokenizer: Tokenizer,
    seq_length: int,
    mode: Mode,
    num_samples: tuple[int, int | None],
    seed: int,
) -> tuple[list[IndexedFile], list[float], list[IndexedFile]]:
    """Check the arguments of `build_datasets` and its files, on each process by itself.

    Returns: the training files, their weights, and the held-out files.

    Raises: as `build_datasets`.
    """
    if mode not in ("packed", "padded", "examples"):
        raise ValueError(f"mode={mode!r}: choose packed or padded")
    if seq_length < 2:
        raise ValueError(f"seq_length={seq_length}: a loss term needs at least 2 tokens")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed}: give a number from 0 to {MAX_SEED}")
    if num_samples[0] < 1 or (num_samples[1] is not None and num_samples[1] < 1):
        raise ValueError(f"num_samples={num_samples}: at least 1 of each is needed")
    files, weights = _training_blend(train, mode)
    valid_files = [inspect(prefix) for prefix in valid]
    for file in files + valid_files:
        check_token_ids(file, tokenizer)
        _check_fits(file, mode)
    for file in valid_files:
        if mode == "packed" and file.tokens <= seq_length:
            raise ValueError(
                f"{file.prefix} has {file.tokens} tokens, too few for one packed sample of "
                f"seq_length={seq_length} (it needs {seq_length + 1}); shorten it or use padded"
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
    return files, [float(f.tokens if mode == "packed" else f.documents) for f in files]


def _check_fits(file: IndexedFile, mode: Mode) -> None:
    if mode == "packed" and file.split:
        raise ValueError(
            f"{file.prefix} has its sentences split: packed mode would shuffle them one by one; "
            "preprocess without --split-sentences, or use mode padded"
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
