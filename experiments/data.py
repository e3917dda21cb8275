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

    @property
    def name(self) -> str:
        """The name of its data's folder."""
        return f"{'generated' if self.train is None else Path(self.train).stem}-{self.vocab_size}"


@dataclass(frozen=True)
class Data:
    """Paths of a tokenizer, and prefixes of tokenized text."""

    tokenizer: Path
    train: Path
    valid: Path

    @staticmethod
    def at(folder: Path) -> Data:
        """Return the paths in a folder."""
        return Data(folder / "tokenizer.model", folder / "train", folder / "valid")


def make_data(source: Source, folder: Path) -> Data:
    """Make the data in `folder`, unless they exist.

    Raises:
        ValueError: the text cannot be read, or the folder holds other data.
        OSError: a file cannot be read or written.
    """
    data, recorded = Data.at(folder), folder / _SOURCE_FILE
    described = json.dumps(asdict(source), indent=2) + "\n"
    if recorded.exists():
        if recorded.read_text(encoding="utf-8") != described:
            raise ValueError(f"{recorded}: the folder's data came from elsewhere; name another one")
        return data
    fields = Fields(tuple(source.keys), question_answer=True)
    train, valid = (Path(path) if path else None for path in (source.train, source.valid))
    if train is None or valid is None:
        train, valid = make_corpus(folder)
    train_tokenizer([train], data.tokenizer, fields=fields, vocab_size=source.vocab_size)
    for text, prefix in ((train, data.train), (valid, data.valid)):
        preprocess([text], prefix, data.tokenizer, fields=fields, append_eod=True)
    with atomic_path(recorded) as temporary:  # written last: it marks the data as complete
        temporary.write_text(described, encoding="utf-8")
    return data
