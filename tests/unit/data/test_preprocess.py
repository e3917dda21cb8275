from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_coe.data import preprocess as module
from megatron_coe.data.indexed import documents_begin_with
from megatron_coe.data.preprocess import output_prefixes, preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.sentences import load_splitter
from megatron_coe.data.tokenizer import SentencePieceTokenizer
from tests.unit.data.texts import random_texts, write_jsonl

QA = Fields(("query", "response"), question_answer=True)
GSM8K = Path(__file__).parents[2] / "data" / "gsm8k"


def documents(prefix: str | Path) -> list[list[list[int]]]:
    """Every document's sequences, read by Megatron."""
    data = IndexedDataset(str(prefix))
    bounds = data.document_indices
    return [
        [data[number].tolist() for number in range(first, end)]
        for first, end in itertools.pairwise(bounds)
    ]


def files(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_documents_are_the_tokens_of_their_texts(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    texts = random_texts(700, 11)
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    for eod in (False, True):
        summary = preprocess(
            [path], tmp_path / "out", tokenizer.path, fields=Fields(), append_eod=eod, quiet=True
        )
        prefix = str(tmp_path / "out_text_document")
        expected = [[tokenizer.tokenize(text) + [2] * eod] for text in texts]
        assert documents(prefix) == expected
        assert summary.documents == {prefix: 700}
        assert summary.tokens == {prefix: sum(len(ids) for (ids,) in expected)}


def test_question_and_answer_are_one_document(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    texts = random_texts(60, 12)
    records = [
        {"query": query, "response": response, "other": 1}
        for query, response in zip(texts[::2], texts[1::2], strict=True)
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    preprocess([path], tmp_path / "qa" / "out", tokenizer.path, fields=QA, quiet=True)
    assert names(tmp_path / "qa") == ["out.bin", "out.idx"]
    assert documents(tmp_path / "qa" / "out") == [
        [tokenizer.tokenize(f"query : {record['query']} response : {record['response']}")]
        for record in records
    ]


def test_each_key_has_its_own_output_and_empty_texts_are_left_out(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    records = [{"a": "one", "b": ""}, {"a": "", "b": ""}, {"a": "two", "b": "ten"}]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    fields = Fields(("a", "b"))
    summary = preprocess(
        [path], tmp_path / "out", tokenizer.path, fields=fields, append_eod=True, quiet=True
    )
    a, b = output_prefixes(tmp_path / "out", fields)
    assert (Path(a).name, Path(b).name) == ("out_a_document", "out_b_document")
    assert documents(a) == [[[*tokenizer.tokenize("one"), 2]], [[*tokenizer.tokenize("two"), 2]]]
    assert documents(b) == [[[*tokenizer.tokenize("ten"), 2]]]
    assert summary.empty == 3
    assert summary.documents == {a: 2, b: 1}


def test_sentences_are_sequences_of_their_document(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    texts = ["One apple. Two pears! Ten?", "Three equals three."]
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    preprocess(
        [path],
        tmp_path / "out",
        tokenizer.path,
        fields=Fields(),
        append_eod=True,
        split_sentences=True,
        quiet=True,
    )
    splitter, _ = load_splitter(texts)
    expected = [[tokenizer.tokenize(s) for s in splitter.tokenize(text)] for text in texts]
    assert len(expected[0]) == 3
    for document in expected:
        document[-1].append(2)
    assert documents(tmp_path / "out_text_sentence") == expected


@pytest.mark.parametrize("split", [False, True])
def test_same_bytes_for_any_number_of_workers(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    split: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_coe.data.records.CHUNK_RECORDS", 16)
    records = [{"text": text} for text in random_texts(900, 13)]
    lines = [json.dumps(record) for record in records]
    lines[50], lines[333] = "broken", '{"text": ""}'
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    first.write_text("\n".join(lines[:400]))
    second.write_bytes(gzip.compress("\n".join(lines[400:]).encode()))
    results = []
    for workers in (1, 2, 4):
        summary = preprocess(
            [first, second],
            tmp_path / f"w{workers}",
            tokenizer.path,
            fields=Fields(),
            workers=workers,
            append_eod=True,
            split_sentences=split,
            skip_bad_lines=True,
            quiet=True,
        )
        (prefix,) = output_prefixes(tmp_path / f"w{workers}", Fields(), split)
        assert (summary.documents[prefix], summary.bad_lines, summary.empty) == (898, 1, 1)
        results.append(files(prefix))
    assert results[1] == results[0]
    assert results[2] == results[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_line_stops_the_run_and_leaves_what_was_there(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, workers: int
) -> None:
    good = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in random_texts(2000, 14)])
    output = tmp_path / "out"
    preprocess([good], output / "x", tokenizer.path, fields=Fields(), quiet=True)
    before = files(output / "x_text_document")
    lines = good.read_text().splitlines()
    lines[1700] = '{"text": 1}'
    lines[1800] = "{"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"{bad}:1701: key 'text' is a int.*--skip-bad-lines"):
        preprocess(
            [good, bad], output / "x", tokenizer.path, fields=Fields(), workers=workers, quiet=True
        )
    assert names(output) == ["x_text_document.bin", "x_text_document.idx"]
    assert files(output / "x_text_document") == before


def test_skipped_lines_are_counted_and_the_first_ones_shown(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one"}\nbroken\n' * 40)
    summary = preprocess(
        [path], tmp_path / "out", tokenizer.path, fields=Fields(), skip_bad_lines=True
    )
    assert summary.bad_lines == 40
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == module.BAD_LINES_SHOWN
    assert shown[0].startswith(f"skipped {path}:2: not JSON")
    assert shown[1].startswith(f"skipped {path}:4: not JSON")


def test_a_log_file_gets_plain_lines_of_progress(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, capfd, monkeypatch
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in random_texts(900, 11)])
    arguments = ([path], tmp_path / "out", tokenizer.path)
    preprocess(*arguments, fields=Fields())
    assert capfd.readouterr().err == "", "a short job has nothing to say"
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    preprocess(*arguments, fields=Fields())
    *_, last = lines = capfd.readouterr().err.split("\n")[:-1]
    assert last.startswith("100%|") and "900 documents" in last
    assert all("%|" in line and line.isprintable() for line in lines)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_ids_are_stored_as_megatron_would(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, vocab_size: int, dtype: type[np.integer]
) -> None:
    assert DType.optimal_dtype(vocab_size) is dtype
    larger = SentencePieceTokenizer(tokenizer.path)
    larger.vocab_size = vocab_size
    assert module._Encoder(larger, Fields(), False, None).dtypes == [dtype]


def test_wrong_arguments_leave_nothing(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    empty = write_jsonl(tmp_path / "in.jsonl", [{"text": ""}])

    def attempt(message: str, **changes: object) -> None:
        options = {
            "inputs": [empty],
            "prefix": tmp_path / "out" / "x",
            "tokenizer_path": tokenizer.path,
            "fields": Fields(),
            "quiet": True,
        }
        with pytest.raises(ValueError, match=message):
            preprocess(**(options | changes))

    attempt("nothing to write to .*x_text_document")
    attempt("workers=0", workers=0)
    attempt("is a folder", prefix=tmp_path)
    attempt("does not exist", tokenizer_path=tmp_path / "none.model")
    attempt("is not a file", inputs=[tmp_path / "none.jsonl"])
    assert names(tmp_path) == ["in.jsonl", "out"]
    assert names(tmp_path / "out") == []


def test_gsm8k_parquet(tmp_path: Path, make_data: Callable[..., str]) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="parquet needs the extra `data`")
    from megatron_coe.data.tokenizer import train_tokenizer

    source = GSM8K / "test.parquet"
    fields = Fields(("question", "answer"), question_answer=True)
    tokenizer = train_tokenizer([source], tmp_path / "t.model", fields=fields, vocab_size=2000)
    preprocess([source], tmp_path / "gsm", tokenizer.path, fields=fields, quiet=True)
    rows = pq.read_table(source).to_pylist()
    read = documents(tmp_path / "gsm")
    assert len(read) == len(rows) == 1319
    for (ids,), row in zip(read, rows, strict=True):
        text = f"query : {row['question']} response : {row['answer']}"
        assert tokenizer.detokenize(ids) == text


def test_documents_begin_with_the_token_for_that(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in random_texts(20, 9)])
    for name, prepend in (("plain", False), ("begun", True)):
        options = {"fields": Fields(), "append_eod": True, "prepend_bos": prepend, "quiet": True}
        preprocess([path], tmp_path / name, tokenizer.path, **options)
    plain, begun = (str(tmp_path / f"{name}_text_document") for name in ("plain", "begun"))
    assert documents(begun) == [
        [[tokenizer.bos, *first], *rest] for first, *rest in documents(plain)
    ]
    assert documents_begin_with([begun], tokenizer.bos)
    assert not documents_begin_with([begun, plain], tokenizer.bos)
    assert not documents_begin_with([begun], -1)


def test_a_tokenizer_that_cannot_be_exported_is_said_before(tmp_path: Path, capsys) -> None:
    content = io.BytesIO()
    texts = random_texts(100, 4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, model_type="word", vocab_size=40,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "words.model").write_bytes(content.getvalue())
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    preprocess([path], tmp_path / "out", tmp_path / "words.model", fields=Fields(), quiet=True)
    assert "words.model: it has no exact Hugging Face form" in capsys.readouterr().err


def test_an_interrupt_waits_until_a_worker_is_started() -> None:
    """Also where another thread, which does not block the signal, is the one that gets it."""
    release, done = threading.Event(), False
    other = threading.Thread(target=release.wait)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), module._interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the handler runs between two instructions of this thread
            done = True
    finally:
        release.set()
        other.join()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
