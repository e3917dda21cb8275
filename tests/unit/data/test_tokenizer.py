from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import (
    SPECIAL_IDS,
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tests.unit.data.texts import random_texts, write_jsonl

ALPHABET = "ab1. \n\t∑é𝔸-_</s>\x00"


def test_any_text_comes_back_from_its_tokens(tokenizer: SentencePieceTokenizer) -> None:
    rng = random.Random(2)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(300)]
    for text in [*texts, "</s> <pad> <s>", "  two  spaces  ", "\n\n"]:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        # Nothing is added, and text cannot spell a control token.
        assert not set(ids) & set(SPECIAL_IDS.values())


def test_special_tokens(tokenizer: SentencePieceTokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (1, 2, 3)
    assert tokenizer.vocab_size == 360
    assert tokenizer.detokenize([*tokenizer.tokenize("x y"), 2, 3, 3]) == "x y"
    assert tokenizer.tokenize("") == []


def test_every_digit_is_a_token(tokenizer: SentencePieceTokenizer) -> None:
    single = {tokenizer.tokenize(f"x{digit}")[-1] for digit in "0123456789"}
    assert len(single) == 10
    assert len(tokenizer.tokenize("12 12")) - len(tokenizer.tokenize("2 2")) == 2


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, model_type: str) -> None:
    texts = [{"text": text} for text in random_texts(200, 3)]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    models = []
    for name in ("a", "b"):
        options = {"fields": Fields(), "vocab_size": 300, "model_type": model_type}
        train_tokenizer([path], tmp_path / name, **options)
        models.append((tmp_path / name).read_bytes())
    assert models[0] == models[1]


def test_identifiers_follow_the_content_not_the_path(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(tokenizer.path.read_bytes())
    assert load_tokenizer(copy).unique_identifiers == tokenizer.unique_identifiers
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in random_texts(200, 4)])
    other = train_tokenizer([path], tmp_path / "other.model", fields=Fields(), vocab_size=330)
    assert other.unique_identifiers != tokenizer.unique_identifiers


def test_survives_pickling(tokenizer: SentencePieceTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize("one plus café") == tokenizer.tokenize("one plus café")
    assert copy.pad == tokenizer.pad


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer("")
    with pytest.raises(ValueError, match=r"missing.model does not exist"):
        load_tokenizer(tmp_path / "missing.model")
    for content in (b"", b"not a model", b"\x00" * 100):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder holds none of tokenizer.json"):
        load_tokenizer(tmp_path / "empty")


def test_training_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "one two"}])
    output = tmp_path / "t.model"
    with pytest.raises(ValueError, match=r"vocab_size=9999, bpe: Vocabulary size too high"):
        train_tokenizer([path], output, fields=Fields(), vocab_size=9999)
    with pytest.raises(ValueError, match="vocab_size=5, bpe"):
        train_tokenizer([path], output, fields=Fields(), vocab_size=5)
    with pytest.raises(ValueError, match=r"t.jsonl:1: no key 'body'"):
        train_tokenizer([path], output, fields=Fields(("body",)))
    write_jsonl(path, [{"text": " "}])
    with pytest.raises(ValueError, match="no text in"):
        train_tokenizer([path], output, fields=Fields())
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(random_texts(100, 5), trainer)
    # A tokenizer that adds <s> by itself, as many do.
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "one plus café ∑ 12  \n x"
    ids = tokenizer.tokenize(text)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.detokenize(ids) == text
    assert (tokenizer.bos, tokenizer.eod) == (0, 1)
    assert tokenizer.pad == -1  # its padding token is the end-of-document token
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert pickle.loads(pickle.dumps(tokenizer)).tokenize(text) == ids
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
