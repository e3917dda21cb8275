"""Held-out text in each of its forms comes as the same sequences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PretrainedConfig

from megatron_coe.analysis.heldout import CLASSES, Source, sequence_numbers, token_classes
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer

TEXTS = [f"one two three {number} , four : five {number * 7} six" for number in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    inputs = [folder / "t.jsonl"]
    train_tokenizer(inputs, folder / "t.model", fields=Fields(), vocab_size=300)
    write_tokenizer(folder / "t.model", folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def read(tokenizer, path: Path, mode: str = "packed", vocab_size: int = 300, **changes):
    config = PretrainedConfig(vocab_size=vocab_size, max_position_embeddings=64)
    return Source((path,), Fields(), **changes).read(tokenizer, config, mode)


def documents(tokenizer) -> list[list[int]]:
    end = tokenizer.eos_token_id
    return [[*tokenizer.encode(text, add_special_tokens=False), end] for text in TEXTS]


def test_packed_sequences_are_the_joined_documents_cut(folder, tokenizer):
    joined = [number for document in documents(tokenizer) for number in document]
    found = read(tokenizer, folder / "t.jsonl", seq_length=50, tokens=10**6)
    assert {len(sequence) for sequence in found} == {50}
    assert np.concatenate(found).tolist() == joined[: len(joined) // 50 * 50]
    some = read(
        tokenizer, folder / "t.jsonl", tokens=130
    )  # of 64: what the model has positions for
    assert np.concatenate(some).tolist() == joined[: 3 * 64]


def test_examples_are_a_document_each(folder, tokenizer):
    found = read(tokenizer, folder / "t.jsonl", "padded", seq_length=20, tokens=10**6)
    assert [sequence.tolist() for sequence in found] == [d[:20] for d in documents(tokenizer)]
    numbers = sequence_numbers(found)
    assert numbers.tolist() == [n for n, part in enumerate(found) for _ in part]


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_a_data_set_gives_what_its_text_gives(folder, tokenizer, mode):
    prefix = folder / "set_text_document"
    preprocess(
        [folder / "t.jsonl"],
        folder / "set",
        folder / "t.model",
        fields=Fields(),
        append_eod=True,
        quiet=True,
    )
    ours, stored = (read(tokenizer, path, mode) for path in (folder / "t.jsonl", prefix))
    assert len(ours) == len(stored) > 3
    assert all(np.array_equal(*pair) for pair in zip(ours, stored, strict=True))


def test_classes_of_tokens(tokenizer):
    ids = [*tokenizer.encode("one 12 , ", add_special_tokens=False), tokenizer.eos_token_id]
    names = [CLASSES[number] for number in token_classes(np.array(ids), tokenizer)]
    for number, name in zip(ids, names, strict=True):
        text = tokenizer.decode([number]).strip()
        expected = {
            "special": number == tokenizer.eos_token_id,
            "number": text.isdigit(),
            "word": text.isalpha() and number != tokenizer.eos_token_id,
            "space": not text,
            "symbol": text == ",",
        }
        assert expected[name], (text, name)
    assert {"number", "word", "symbol", "special"} <= set(names)


def test_what_cannot_be_is_named(folder, tokenizer):
    with pytest.raises(ValueError, match=r"none: neither a data set"):
        Source((folder / "none",), Fields())
    with pytest.raises(ValueError, match="tokens=0"):
        Source((folder / "t.jsonl",), Fields(), tokens=0)
    with pytest.raises(ValueError, match="seq_length=1"):
        Source((folder / "t.jsonl",), Fields(), seq_length=1)
    with pytest.raises(ValueError, match=r"max_position_embeddings=64"):
        read(tokenizer, folder / "t.jsonl", seq_length=65)
    with pytest.raises(ValueError, match=r"t\.jsonl: holds the token id \d+.*vocab_size=100"):
        read(tokenizer, folder / "t.jsonl", vocab_size=100)
    (folder / "short.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="too little text for one sequence of 64 tokens"):
        read(tokenizer, folder / "short.jsonl")
