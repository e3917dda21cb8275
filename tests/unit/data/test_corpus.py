from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_coe.data.corpus import make_corpus

pytest.importorskip("reasoning_gym", reason="the corpus needs the extra `data`")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_query_stands_twice_and_sizes_are_exact(tmp_path: Path) -> None:
    # Large enough for the generators to repeat themselves.
    train, valid = make_corpus(tmp_path, train_size=6000, valid_size=400, seed=3)
    examples = read(train) + read(valid)
    assert (len(read(train)), len(read(valid))) == (6000, 400)
    assert len({example["query"] for example in examples}) == 6400
    assert all(set(example) == {"query", "response"} for example in examples)
    assert all(example["query"].strip() and example["response"].strip() for example in examples)


def test_most_examples_are_worked_solutions_that_end_in_their_answer(tmp_path: Path) -> None:
    train, _ = make_corpus(tmp_path, train_size=500, valid_size=10, seed=4)
    worked = [e for e in read(train) if re.search(r"#### -?[\d.,/]+$", e["response"])]
    assert len(worked) >= 400
    assert sum(len(example["response"]) for example in worked) / len(worked) > 100


def test_same_arguments_same_bytes_and_another_seed_other_problems(tmp_path: Path) -> None:
    first = make_corpus(tmp_path / "a", train_size=300, valid_size=50, seed=5)
    again = make_corpus(tmp_path / "b", train_size=300, valid_size=50, seed=5)
    other = make_corpus(tmp_path / "c", train_size=300, valid_size=50, seed=6)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    common = {e["query"] for e in read(first[0])} & {e["query"] for e in read(other[0])}
    assert len(common) < 30


def test_validation_does_not_depend_on_the_training_size(tmp_path: Path) -> None:
    _, small = make_corpus(tmp_path / "a", train_size=20, valid_size=50)
    _, large = make_corpus(tmp_path / "b", train_size=400, valid_size=50)
    assert small.read_bytes() == large.read_bytes()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="valid_size=0"):
        make_corpus(tmp_path, valid_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/valid.jsonl"):
        make_corpus(tmp_path / "file", train_size=1, valid_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_messages_are_the_same_problems_as_conversations(tmp_path: Path) -> None:
    plain = make_corpus(tmp_path / "a", train_size=40, valid_size=10, seed=7)
    chats = make_corpus(tmp_path / "b", train_size=40, valid_size=10, seed=7, messages=True)
    for first, second in zip(plain, chats, strict=True):
        expected = [
            {"messages": [{"role": "user", "content": e["query"]},
                          {"role": "assistant", "content": e["response"]}]}
            for e in read(first)
        ]  # fmt: skip
        assert read(second) == expected
