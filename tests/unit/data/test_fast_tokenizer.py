"""A SentencePiece model's form in `tokenizers` gives SentencePiece's ids."""

from __future__ import annotations

import io
import random

import pytest
import sentencepiece

pytest.importorskip("tokenizers", reason="needs the extra `hf`")

from megatron_coe.data.fast_tokenizer import (
    WHITE_SPACE,
    SentencePieceModel,
    export_warning,
    fast_tokenizer,
)
from megatron_coe.data.tokenizer import load_tokenizer
from tests.unit.data.texts import random_texts

SYMBOLS = ["<|sep|>", "<|se", "ab", "\n", "é<x>"]


def train(**options) -> SentencePieceModel:
    content = io.BytesIO()
    defaults = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "control_symbols": ["<cls>"],
        "pad_id": 3,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(200, 1)),
        model_writer=content,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **defaults | options,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    return SentencePieceModel(processor)


def texts_with(parts: list[str], seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(parts, k=generator.randint(1, 9))) for _ in range(300)]


MODELS = {
    "as train_tokenizer makes them": {},
    "unigram": {"model_type": "unigram"},
    "unigram without bytes": {"model_type": "unigram", "byte_fallback": False},
    "characters": {"model_type": "char", "vocab_size": 300},
    "no prefix": {"add_dummy_prefix": False},
    "symbols": {"user_defined_symbols": SYMBOLS},
    "symbols, no prefix": {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
    "symbols, unigram": {"user_defined_symbols": SYMBOLS, "model_type": "unigram"},
    "symbols, SentencePiece's defaults": {
        "user_defined_symbols": SYMBOLS,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "nmt_nfkc, all white space": {"normalization_rule_name": "nmt_nfkc"},
    "white space removed": {"remove_extra_whitespaces": True},
}


@pytest.mark.parametrize("kind", MODELS)
def test_ids_are_those_of_the_model(kind: str) -> None:
    model = train(**MODELS[kind])
    tokenizer = fast_tokenizer(model).tokenizer
    tokenizer.encode_special_tokens = True
    words = "".join(random_texts(20, 7)).split(" ")[:60]
    parts = [*SYMBOLS, *WHITE_SPACE, "<0x41>", "</s>", "<cls>", "<unk>", "<", *words]
    texts = [*texts_with(parts, 2), *random_texts(100, 3), *model.unspellable]
    for text, ids in zip(texts, model.processor.encode(texts), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_symbol_is_one_id_wherever_it_stands(model_type: str) -> None:
    model = train(model_type=model_type, user_defined_symbols=["<|sep|>"])
    tokenizer, symbol = fast_tokenizer(model).tokenizer, model.pieces.index("<|sep|>")
    for text in ("<|sep|>", "one<|sep|>two", "<|sep|><|sep|>", " x <|sep|> "):
        ids = tokenizer.encode(text).ids
        assert ids.count(symbol) == text.count("<|sep|>")
        assert ids == model.processor.encode(text)
    assert tokenizer.token_to_id("<|sep|>") == symbol


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_special_tokens_in_text_are_one_id_by_default(model_type: str) -> None:
    model = train(model_type=model_type)
    tokenizer = fast_tokenizer(model).tokenizer
    for piece in ("<s>", "</s>", "<unk>", "<pad>", "<cls>"):
        number = model.pieces.index(piece)
        one, two = model.processor.encode(["one", "two"])
        assert tokenizer.encode(f"one{piece}two").ids == [*one, number, *two]


def test_text_of_later_tokens_begins_with_their_space() -> None:
    model = train()
    tokenizer = fast_tokenizer(model).tokenizer
    prompt, whole = model.processor.encode(["one plus", "one plus two"])
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == " two"
    assert tokenizer.decode(whole) == " one plus two"
    assert tokenizer.decode([*whole, 2, 3]) == " one plus two", "special tokens give nothing"


def test_rare_differences_are_said_and_do_not_refuse() -> None:
    warning = fast_tokenizer(train(normalization_rule_name="nmt_nfkc")).warning
    assert "rare texts differ: '½́' has the ids" in warning
    assert fast_tokenizer(train()).warning is None


def test_what_has_no_form_is_refused(tmp_path) -> None:
    """Models of words; and BPE with unused pieces, which SentencePiece merges through."""
    with pytest.raises(ValueError, match="no exact Hugging Face form: models of whole words"):
        fast_tokenizer(train(model_type="word", byte_fallback=False, vocab_size=50))
    model = train()
    for piece in model.proto.pieces:
        if piece.type == piece.NORMAL and len(piece.piece) == 2:
            piece.type = piece.UNUSED
    (tmp_path / "unused.model").write_bytes(model.proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path / "unused.model")
    with pytest.raises(ValueError, match=r"no exact Hugging Face form: .* has the ids"):
        fast_tokenizer(SentencePieceModel(tokenizer.processor))
    warning = export_warning(tokenizer)
    assert str(tokenizer.path) in warning
    assert "to-hf will refuse it" in warning
