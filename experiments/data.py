"""The text that all variants of an experiment read: made or read once, tokenised once."""

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


@dataclass(frozen=True)
class Source:
    """Where the text comes from.

    Attributes:
        train, valid: files of the user's; None: the generated problems of the quickstart.
        keys: of a question and an answer in them.
    """

    vocab_size: int
    train: str | None = None
    valid: str | None = None
    keys: list[str] = field(default_factory=lambda: ["query", "response"])

    def check(self) -> None:
        """Check the files. Raises: ValueError: only one is named; OSError: one is missing."""
        if (self.train is None) != (self.valid is None):
            raise ValueError("--input and --valid-input belong together: name both files, or none")
        for path in (self.train, self.valid):
            if path is not None:
                Path(path).open("rb").close()

    @property
    def name(self) -> str:
        """Of the folder of its data."""
        return f"{'generated' if self.train is None else Path(self.train).stem}-{self.vocab_size}"


@dataclass(frozen=True)
class Data:
    """A tokenizer, and prefixes of tokenised text."""

    tokenizer: Path
    train: Path
    valid: Path

    @staticmethod
    def at(folder: Path) -> Data:
        return Data(folder / "tokenizer.model", folder / "train", folder / "valid")


def make_data(source: Source, folder: Path) -> Data:
    """Make the data in `folder`, where they are not there yet.

    Raises: ValueError for text that cannot be read, or a folder with other data; OSError.
    """
    data, told = Data.at(folder), folder / _SOURCE_FILE
    described = json.dumps(asdict(source), indent=2) + "\n"
    if told.exists():
        if told.read_text(encoding="utf-8") != described:
            raise ValueError(f"{told}: the folder's data came from elsewhere; name another folder")
        return data
    fields = Fields(tuple(source.keys), question_answer=True)
    train, valid = (Path(path) if path else None for path in (source.train, source.valid))
    if train is None or valid is None:
        train, valid = make_corpus(folder)
    train_tokenizer([train], data.tokenizer, fields=fields, vocab_size=source.vocab_size)
    for text, prefix in ((train, data.train), (valid, data.valid)):
        preprocess([text], prefix, data.tokenizer, fields=fields, append_eod=True)
    with atomic_path(told) as temporary:  # the last: what it is beside is complete
        temporary.write_text(described, encoding="utf-8")
    return data
