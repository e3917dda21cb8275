"""A SentencePiece model's Hugging Face form gives the same ids and the same text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_coe.conversion.tokenizer import Usage, check_tokenizer, write_tokenizer
from megatron_coe.data import fast_tokenizer
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import load_tokenizer, train_tokenizer
from tests.unit.data.texts import random_texts, write_jsonl

ALPHABET = "ab12. \n\t∑é𝔸-_</s>"
TRAINED = Usage(max_length=64, prepend_bos=False)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in random_texts(300, 1)])
    output = folder / "t.model"
    train_tokenizer([path], output, fields=Fields(), vocab_size=300, model_type=request.param)
    return output


def test_ids_and_texts_are_the_same(model, tmp_path):
    special = write_tokenizer(model, tmp_path, TRAINED)
    assert special == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    original, converted = load_tokenizer(model), AutoTokenizer.from_pretrained(tmp_path)
    assert len(converted) == original.vocab_size
    assert (converted.bos_token_id, converted.eos_token_id, converted.pad_token_id) == (1, 2, 3)
    rng = random.Random(2)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 60))) for _ in range(300)]
    texts += [*random_texts(100, 3), "  two  spaces  ", "\n\n", "", "</s> <pad> <s>"]
    for text in texts:
        ids = original.tokenize(text)
        spelled = {"split_special_tokens": True}
        assert converted.encode(text, add_special_tokens=False, **spelled) == ids, text
        assert converted.encode(text, **spelled) == ids, "nothing is added"
        # The space that SentencePiece sets before a text is that between a prompt and what follows.
        assert converted.decode(ids) == (f" {text}" if text else "")
        assert original.detokenize(ids) == text
    assert converted.decode([2, 3, 3], skip_special_tokens=True) == ""


def test_what_was_trained_stands_in_the_folder(model, tmp_path):
    write_tokenizer(model, tmp_path, TRAINED)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    assert list(converted("a b")) == ["input_ids", "attention_mask"], "what the model takes"
    assert converted.model_max_length == 64
    padded = converted(["one", "one plus two"], padding=True)["input_ids"]
    assert padded[0][0] == 3, "a decoder continues on the right"


def test_special_tokens_are_one_id(model, tmp_path):
    """As text, in a chat template, and added by whoever fine-tunes."""
    write_tokenizer(model, tmp_path, TRAINED)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    one = load_tokenizer(model).tokenize("one")
    assert converted.encode("one</s>") == [*one, 2]
    converted.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert converted.encode("<|im_end|>") == [len(converted) - 1]
    converted.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    chat = converted.apply_chat_template([{"role": "user", "content": "one"}], return_dict=True)
    assert chat["input_ids"] == [*one, 2]


def test_begins_a_text_as_training_did(model, tmp_path):
    write_tokenizer(model, tmp_path, Usage(64, prepend_bos=True))
    converted = AutoTokenizer.from_pretrained(tmp_path)
    ids = load_tokenizer(model).tokenize("one plus")
    assert converted.encode("one plus") == converted("one plus")["input_ids"] == [1, *ids]
    assert converted.encode("one plus", add_special_tokens=False) == ids
    check_tokenizer(model, tmp_path, Usage(64, prepend_bos=True))
    with pytest.raises(ValueError, match="in training, and"):
        check_tokenizer(model, tmp_path, TRAINED)


def test_the_package_reads_it_back(model, tmp_path):
    write_tokenizer(model, tmp_path, TRAINED)
    original, converted = load_tokenizer(model), load_tokenizer(tmp_path)
    text = random_texts(1, 4)[0]
    assert converted.tokenize(text) == original.tokenize(text)
    assert (converted.vocab_size, converted.eod) == (original.vocab_size, original.eod)


def byte_level(folder: Path, template: str = "$A") -> Path:
    """A Hugging Face folder whose tokenizer puts around a text what the template says."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(random_texts(100, 5), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **names)
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    return folder


def test_files_of_an_imported_folder_stay_as_they_are(tmp_path):
    source, target = byte_level(tmp_path / "a", "<s> $A </s>"), tmp_path / "b"
    target.mkdir()
    special = write_tokenizer(source, target, Usage(64))
    assert special == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for path in source.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    check_tokenizer(source, target, Usage(64))


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_folder_puts_around_a_text_what_training_did(template, prepend_bos, tmp_path):
    source, target = byte_level(tmp_path / "a", template), tmp_path / "b"
    target.mkdir()
    usage = Usage(64, prepend_bos)
    write_tokenizer(source, target, usage)
    check_tokenizer(source, target, usage)
    exported = AutoTokenizer.from_pretrained(target)
    assert exported.encode("one") == [0] * prepend_bos + load_tokenizer(source).tokenize("one")
    assert exported.encode("one</s>")[-1] == 1
    assert exported.model_max_length == 64
    assert exported.chat_template == "{{ messages[0]['content'] }}"
    assert list(exported("a b")) == ["input_ids", "attention_mask"]


def test_a_vocabulary_of_words(tmp_path):
    """BERT's: neither tokenizer.json nor special tokens in a file; its class adds two tokens."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "##s", "a", "b"]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    names = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    write_tokenizer(source, target, TRAINED)
    check_tokenizer(source, target, TRAINED)
    exported = AutoTokenizer.from_pretrained(target)
    assert exported.encode("Ones two") == [5, 7, 6]
    assert exported.encode("[MASK]") == [4]
    assert (target / "vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()


def test_a_folder_of_a_sentencepiece_model_gets_what_every_version_reads_alike(model, tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    shutil.copyfile(model, source / "tokenizer.model")
    names = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    write_tokenizer(source, target, TRAINED)
    check_tokenizer(source, target, TRAINED)
    assert (target / "tokenizer.json").is_file()
    assert (target / "tokenizer.model").read_bytes() == model.read_bytes()
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_other_ids_are_refused(model, tmp_path, monkeypatch):
    """A conversion that loses a rule is caught before anything is written."""
    right = fast_tokenizer._normalizer

    def doubled(model):
        from tokenizers import normalizers

        return normalizers.Sequence([right(model)] * 2)

    monkeypatch.setattr(fast_tokenizer, "_normalizer", doubled)
    with pytest.raises(ValueError, match="no exact Hugging Face form"):
        write_tokenizer(model, tmp_path, TRAINED)
    assert not list(tmp_path.iterdir())
