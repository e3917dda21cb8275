"""Held-out questions: the two forms of a line, and what counts of an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_coe.data.questions import Question, final_answer, read_questions
from megatron_coe.data.records import Fields

CHAT = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5 #### 5"},
]


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_both_forms_are_read_as_training_wrote_them(tmp_path):
    record = {"query": "2 + 3?", "response": "5", "other": 1}
    path = write(tmp_path, record, {"messages": CHAT})
    plain, chat = read_questions(path)
    assert plain == Question("query : 2 + 3? response :", "5")
    (trained,) = Fields(("query", "response"), question_answer=True).texts(
        json.dumps(record).encode()
    )
    assert trained == f"{plain.prompt} {plain.answer}"
    assert chat == Question(CHAT[:1], "2 + 3 = 5 #### 5")
    assert read_questions(path, 1) == [plain]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 2 + 3 = 5 #### 5 ", "5"),
        (" 5\n", "5"),
        ("#### 4 no #### 5", "5"),
        ("", ""),
        ("it is 5", "it is 5"),
    ],
)
def test_what_counts_of_an_answer(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ("7", "a JSON object"),
        ({"text": "x"}, "query"),
        ({"query": "x"}, "response"),
        ({"messages": []}, "no list of messages"),
        ({"messages": CHAT[1:]}, "must be the answer"),
        ({"messages": CHAT[::-1]}, "must be the answer"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, expected):
    path = write(tmp_path, {"query": "a", "response": "b"}, line)
    with pytest.raises(ValueError, match=expected) as raised:
        read_questions(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert len(read_questions(path, 1)) == 1


def test_an_empty_file_holds_no_question(tmp_path):
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(write(tmp_path))
