"""A SentencePiece model's Hugging Face form gives the same ids and the same text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_coe.conversion import tokenizer as conversion
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import load_tokenizer, train_tokenizer
from tests.unit.data.texts import random_texts, write_jsonl

ALPHABET = "ab12. \n\t∑é𝔸-_</s>"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in random_texts(300, 1)])
    output = folder / "t.model"
    train_tokenizer([path], output, fields=Fields(), vocab_size=300, model_type=request.param)
    return output


def test_ids_and_texts_are_the_same(model, tmp_path):
    special = write_tokenizer(model, tmp_path)
    assert special == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    original, converted = load_tokenizer(model), AutoTokenizer.from_pretrained(tmp_path)
    assert len(converted) == original.vocab_size
    assert (converted.bos_token_id, converted.eos_token_id, converted.pad_token_id) == (1, 2, 3)
    # A unigram model takes text that spells a special token for it; a BPE model does not.
    bpe = "bpe" in model.parent.name
    alphabet = ALPHABET if bpe else ALPHABET.replace("<", "")
    rng = random.Random(2)
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(300)]
    texts += random_texts(100, 3) + ["  two  spaces  ", "\n\n", ""] + bpe * ["</s> <pad> <s>"]
    for text in texts:
        ids = original.tokenize(text)
        assert converted.encode(text, add_special_tokens=False) == ids, text
        assert converted.encode(text) == ids, "nothing is added"
        assert converted.decode(ids) == original.detokenize(ids) == text
    assert converted.decode([2, 3, 3], skip_special_tokens=True) == ""
    assert list(converted("a b")) == ["input_ids", "attention_mask"], "what the model takes"


def test_the_package_reads_it_back(model, tmp_path):
    write_tokenizer(model, tmp_path)
    original, converted = load_tokenizer(model), load_tokenizer(tmp_path)
    text = random_texts(1, 4)[0]
    assert converted.tokenize(text) == original.tokenize(text)
    assert (converted.vocab_size, converted.eod) == (original.vocab_size, original.eod)


def test_a_hugging_face_folder_is_copied(model, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    special = write_tokenizer(model, tmp_path / "first")
    assert write_tokenizer(tmp_path / "first", tmp_path / "second") == special
    for name in ("tokenizer.json", "tokenizer_config.json"):
        first, second = tmp_path / "first" / name, tmp_path / "second" / name
        assert first.read_bytes() == second.read_bytes()


def test_other_ids_are_refused(model, tmp_path, monkeypatch):
    """A conversion that loses a rule is caught before anything is written."""
    right = conversion._normalizer
    monkeypatch.setattr(
        conversion, "_normalizer", lambda proto: conversion.normalizers.Sequence([right(proto)] * 2)
    )
    with pytest.raises(ValueError, match="no exact Hugging Face form"):
        write_tokenizer(model, tmp_path)
    assert not list(tmp_path.iterdir())
