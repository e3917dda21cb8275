"""Held-out questions with their true answers, for an exact-match score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_coe.data.chat import ASSISTANT, ChatFields, Message
from megatron_coe.data.records import Fields, RecordError, question_prompt

_MESSAGES, _QUERY = ChatFields(), Fields(("query", "response"))
_MARK = "####"


@dataclass(frozen=True)
class Question:
    """A question and its true answer."""

    prompt: str | list[Message]
    """Text to be continued, or the messages before the answer."""
    answer: str


def read_questions(path: Path, count: int | None = None) -> list[Question]:
    """Read the first questions of a file of JSON lines.

    A line holds `messages`, the last of which is the answer, or `query` and `response`, which
    training joins to one text (`Fields.question_answer`).

    Args:
        count: how many; None: all.

    Raises:
        ValueError: naming file and line of one that is none; or there are none.
        OSError: the file cannot be read.
    """
    found = list(islice(_questions(path), count))
    if not found:
        raise ValueError(f"{path}: holds no question")
    return found


def final_answer(text: str) -> str:
    """Return what counts of an answer: what follows its last `####`, or all of it without one."""
    return text.rsplit(_MARK, 1)[-1].strip()


def _questions(path: Path) -> Iterator[Question]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _question(line)
            except RecordError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def _question(line: bytes) -> Question:
    try:
        has_messages = "messages" in json.loads(line)
    except (ValueError, TypeError, RecursionError):
        has_messages = False  # the reader of the fields says what is wrong
    if not has_messages:
        query, response = _QUERY.values(line)
        return Question(question_prompt(query), response)
    messages = _MESSAGES.messages(line)
    if len(messages) < 2 or messages[-1]["role"] != ASSISTANT:
        raise RecordError(f"the last of several messages must be the answer ({ASSISTANT!r})")
    return Question(messages[:-1], messages[-1]["content"])
