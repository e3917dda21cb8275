"""The text that all variants of an experiment read, generated or read and tokenized once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_coe.data.corpus import make_corpus
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from megatron_coe.utils.files import atomic_path

_SOURCE_FILE = "source.json"
_GENERATED_HELD_OUT = 4000
"""Generated problems that are held out: half of them fill the sequences of a validation."""


@dataclass(frozen=True)
class Source:
    """The source of the text.

    Attributes:
        vocab_size: of the tokenizer to train.
        train: a file of the user's; None: the generated problems of the quickstart.
        valid: likewise, held out.
        keys: of question and answer in their records.
    """

    vocab_size: int
    train: str | None = None
    valid: str | None = None
    keys: list[str] = field(default_factory=lambda: ["query", "response"])

    def check(self) -> None:
        """Check that both files or none are named, and readable.

        Raises:
            ValueError: only one is named.
            OSError: one is missing.
        """
        if (self.train is None) != (self.valid is None):
            raise ValueError("--input and --valid-input belong together: name both files, or none")
        for path in (self.train, self.valid):
            if path is not None:
                Path(path).open("rb").close()

    def described(self) -> dict[str, object]:
        """Describe it for comparison with another, without paths."""
        names = {key: path and Path(path).name for key, path in self._files.items()}
        return {**asdict(self), **names, "generated_held_out": _GENERATED_HELD_OUT}

    @property
    def _files(self) -> dict[str, str | None]:
        return {"train": self.train, "valid": self.valid}

    @property
    def name(self) -> str:
        """The name of its data's folder."""
        return f"{'generated' if self.train is None else Path(self.train).stem}-{self.vocab_size}"


@dataclass(frozen=True)
class Data:
    """Paths of a tokenizer, and prefixes of tokenized text.

    Attributes:
        tokenizer: trained on the training text.
        train: the training text.
        valid: the held-out text.
        tuning: every other document of it, to choose learning rates by.
        report: the others.
    """

    tokenizer: Path
    train: Path
    valid: Path
    tuning: Path
    report: Path

    @staticmethod
    def at(folder: Path) -> Data:
        """Return the paths in a folder."""
        prefixes = ("train", "valid", "tuning", "report")
        return Data(folder / "tokenizer.model", *(folder / prefix for prefix in prefixes))


def make_data(source: Source, folder: Path) -> Data:
    """Make the data in `folder`, unless they exist.

    Raises:
        ValueError: the text cannot be read, or the folder holds other data.
        OSError: a file cannot be read or written.
    """
    data, recorded = Data.at(folder), folder / _SOURCE_FILE
    held_out = {"generated_held_out": _GENERATED_HELD_OUT} if source.train is None else {}
    described = json.dumps({**asdict(source), **held_out}, indent=2) + "\n"
    if recorded.exists():
        if recorded.read_text(encoding="utf-8") != described:
            raise ValueError(f"{recorded}: the folder's data came from elsewhere; name another one")
        return data
    fields = Fields(tuple(source.keys), question_answer=True)
    train, valid = (Path(path) if path else None for path in (source.train, source.valid))
    if train is None or valid is None:
        train, valid = make_corpus(folder, valid_size=_GENERATED_HELD_OUT)
    train_tokenizer([train], data.tokenizer, fields=fields, vocab_size=source.vocab_size)
    for text, prefix in ((train, data.train), (valid, data.valid)):
        preprocess([text], prefix, data.tokenizer, fields=fields, append_eod=True)
    _halve(data.valid, data.tuning, data.report)
    with atomic_path(recorded) as temporary:  # written last: it marks the data as complete
        temporary.write_text(described, encoding="utf-8")
    return data


def _halve(source: Path, *halves: Path) -> None:
    """Write every other document of a `.bin/.idx` pair into each of two."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = IndexedDataset(str(source))
    for first, half in enumerate(halves):
        builder = IndexedDatasetBuilder(f"{half}.bin", dtype=documents.index.dtype)
        for number in range(first, len(documents), len(halves)):
            ids = torch.tensor(documents[number].tolist())
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{half}.idx")
