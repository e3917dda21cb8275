"""A tokenizer trained on random texts, and `.bin/.idx` files of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.unit.data.texts import random_texts, write_jsonl


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    path = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in random_texts(300, 1)])
    return train_tokenizer([path], folder / "t.model", fields=Fields(), vocab_size=360)


@pytest.fixture
def make_data(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> Callable[..., str]:
    """Writes texts as a `.bin/.idx` pair and gives its prefix."""

    def make(name: str, texts: Sequence[str], **options: bool) -> str:
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        preprocess([path], tmp_path / name, tokenizer.path, fields=Fields(), quiet=True, **options)
        level = "sentence" if options.get("split_sentences") else "document"
        return str(tmp_path / f"{name}_text_{level}")

    return make
