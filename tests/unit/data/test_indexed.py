from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Subset

from megatron_coe.data.datasets import build_datasets
from megatron_coe.data.indexed import (
    check_token_ids,
    count_targets,
    data_summary,
    entropy,
    identify,
    inspect,
    unigram_entropy,
)
from megatron_coe.data.tokenizer import SentencePieceTokenizer
from tests.unit.data.texts import random_texts

MakeData = Callable[..., str]


def test_counts(make_data: MakeData, tokenizer: SentencePieceTokenizer) -> None:
    texts = ["One two. Three ten.", "Ten apples.", "12"]
    plain, split = make_data("a", texts), make_data("b", texts, split_sentences=True)
    tokens = sum(len(tokenizer.tokenize(text)) for text in texts)
    file = inspect(plain)
    assert (file.documents, file.sequences, file.tokens) == (3, 3, tokens)
    assert (inspect(split).documents, inspect(split).sequences) == (3, 4)
    first, _ = data_summary([plain, split]).splitlines()
    assert first == f"{plain}: 3 documents, {tokens} tokens ({tokens / 3:.1f} each)"


def test_every_damage_is_named(make_data: MakeData, tokenizer: SentencePieceTokenizer) -> None:
    prefix = make_data("a", random_texts(20, 1))
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    index, tokens = idx.read_bytes(), bin_.read_bytes()

    def expect(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            inspect(prefix)
        with pytest.raises(ValueError, match=message):
            build_datasets(
                train=[prefix],
                valid=[],
                tokenizer=tokenizer,
                seq_length=8,
                mode="packed",
                num_samples=(1, None),
                seed=1,
            )

    bin_.write_bytes(tokens[:-2])
    expect(r"a_text_document.bin is shorter than .*a_text_document.idx says")
    bin_.write_bytes(tokens + b"xx")
    expect(r"a_text_document.bin is longer than .*a_text_document.idx says")
    bin_.unlink()
    expect(r"a_text_document.bin does not exist")
    bin_.write_bytes(tokens)
    idx.write_bytes(index[:-1])
    expect(r"a_text_document.idx is cut short")
    idx.write_bytes(b"x" + index[1:])
    expect(r"a_text_document.idx is not an index")
    idx.write_bytes(index[:20])
    expect(r"a_text_document.idx is not an index")
    idx.write_bytes(index[:17] + b"\x63" + index[18:])
    expect(r"a_text_document.idx is of an unknown version \(1\) or dtype \(99\)")
    idx.unlink()
    expect(r"a_text_document.idx does not exist")


@pytest.mark.parametrize(
    ("place", "form", "value", "message"),
    [
        ("lengths", "<i4", -3, r"idx is damaged: sequence 7 has the length -3"),
        ("offsets", "<i8", 1 << 40, r"idx is damaged: sequence 7 has the offset 1099511627776"),
        ("offsets", "<i8", -2, r"idx is damaged: sequence 7 has the offset -2"),
        ("documents", "<i8", 3, r"idx is damaged: the documents overlap: document 6 "),
    ],
)
def test_every_entry_of_an_index_is_checked(
    make_data: MakeData, place: str, form: str, value: int, message: str
) -> None:
    prefix = make_data("a", random_texts(20, 1))
    starts = {"lengths": 34, "offsets": 34 + 4 * 20, "documents": 34 + 12 * 20}
    entries = np.memmap(f"{prefix}.idx", form, "r+", offset=starts[place])
    entries[7] = value
    entries.flush()
    with pytest.raises(ValueError, match=message):
        inspect(prefix)


def test_ids_are_looked_at_from_the_first_to_the_last(
    monkeypatch: pytest.MonkeyPatch, make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    monkeypatch.setattr("megatron_coe.data.indexed.CHECKED_TOKENS", 64)
    file = inspect(make_data("a", random_texts(200, 4)))
    assert file.tokens > 640
    for place in (0, file.tokens - 1):
        ids = np.memmap(f"{file.prefix}.bin", file.dtype, "r+")
        kept, ids[place] = ids[place], 60_000
        document = 0 if place == 0 else file.documents - 1
        with pytest.raises(ValueError, match=rf"token id 60000 in document {document}, but"):
            check_token_ids(file, tokenizer)
        ids[place] = kept
    check_token_ids(file, tokenizer)


def test_identity_is_of_the_content_alone(
    monkeypatch: pytest.MonkeyPatch, make_data: MakeData, tmp_path: Path
) -> None:
    monkeypatch.setattr("megatron_coe.data.indexed.DIGESTED_BYTES", 256)
    prefix = make_data("a", random_texts(200, 4))
    for suffix in ("bin", "idx"):
        shutil.copyfile(f"{prefix}.{suffix}", tmp_path / f"moved.{suffix}")
    first, moved = identify(inspect(prefix)), identify(inspect(str(tmp_path / "moved")))
    assert moved == first | {"name": "moved"}
    ids = np.memmap(tmp_path / "moved.bin", "<u2", "r+")
    for place in (0, len(ids) - 1):
        ids[place] += 1
        ids.flush()
        changed = identify(inspect(str(tmp_path / "moved")))
        assert changed["sha256"] != first["sha256"]
        ids[place] -= 1


def test_token_ids_of_another_tokenizer_are_refused(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    file = inspect(make_data("a", random_texts(50, 2)))
    check_token_ids(file, tokenizer)
    smaller = SentencePieceTokenizer(tokenizer.path)
    smaller.vocab_size = 300
    with pytest.raises(
        ValueError, match=r"holds token id 3\d\d in document \d+, but tokenizer .* has 300 tokens"
    ):
        check_token_ids(file, smaller)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_unigram_entropy_is_over_the_loss_targets(
    make_data: MakeData, tokenizer: SentencePieceTokenizer, mode: str
) -> None:
    texts = random_texts(60, 3)
    prefix = make_data("a", texts)
    _, valid = build_datasets(
        train=[prefix],
        valid=[prefix],
        tokenizer=tokenizer,
        seq_length=24,
        mode=mode,
        num_samples=(1, None),
        seed=1,
    )
    if mode == "padded":
        counts = Counter(id_ for text in texts for id_ in tokenizer.tokenize(text)[:24][1:])
    else:
        counts = Counter(id_ for item in valid for id_ in item["labels"].tolist())
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert unigram_entropy(valid) == pytest.approx(expected, rel=1e-12)
    halves = (Subset(valid, range(0, len(valid), 2)), Subset(valid, range(1, len(valid), 2)))
    assert entropy(*map(count_targets, halves)) == pytest.approx(expected, rel=1e-12)
    assert 1 < expected < math.log(360)
