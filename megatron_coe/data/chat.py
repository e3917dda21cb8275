"""Conversations as token ids, and which of them are answers: what a fine-tuned model learns to say.

A record holds either `messages`, a list of objects with `role` and `content` that the tokenizer's
own chat template writes out, or a prompt and its response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_coe.data.records import Fields, RawRecord, RecordError, check_unicode, decode
from megatron_coe.data.tokenizer import HuggingFaceTokenizer, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]
Marked = tuple[list[int], list[int]]
"""Token ids, and for each 1 if it belongs to an answer, else 0."""


def answers_prefix(prefix: str) -> str:
    """Return the prefix of the companion pair: 1 for each token of an answer, 0 for the others.

    It has the sequences and documents of the tokens, as bytes. Only tokens of answers are then
    targets of the loss.
    """
    return f"{prefix}_answers"


@dataclass(frozen=True)
class ChatFields(Fields):
    """The keys of a conversation: that of its messages, or those of a prompt and its response."""

    keys: tuple[str, ...] = ("messages",)

    @property
    def has_messages(self) -> bool:
        """Whether a record is a list of messages."""
        return len(self.keys) == 1

    @property
    def outputs(self) -> int:
        """Number of pairs of files: tokens, and which of them are answers."""
        return 2

    def messages(self, raw: RawRecord) -> list[Message]:
        """Return the messages of one record.

        Raises: RecordError when they are no list of objects with `role` and `content`, or none is
            an answer.
        """
        if not isinstance(raw, bytes):
            raise RecordError(f"key {self.keys[0]!r}: messages are read from JSON lines only")
        (key,) = self.keys
        try:
            record = json.loads(decode(raw))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON ({error}); a line must hold one object") from error
        messages = record.get(key) if isinstance(record, dict) else None
        if not isinstance(messages, list) or not messages:
            raise RecordError(f"no list of messages under {key!r}")
        for number, message in enumerate(messages):
            for part in ("role", "content"):
                text = message.get(part) if isinstance(message, dict) else None
                if not isinstance(text, str):
                    raise RecordError(f"message {number} of {key!r} has no text {part!r}")
                check_unicode(f"{key}[{number}].{part}", text)
        if not any(message["role"] == ASSISTANT for message in messages):
            raise RecordError(f"no message of {key!r} has the role {ASSISTANT!r}: nothing to learn")
        return messages


def check_chat(tokenizer: Tokenizer, fields: ChatFields, prepend_bos: bool) -> None:
    """Check that a tokenizer can write out such conversations.

    Raises: ValueError naming what it lacks.
    """
    if not fields.has_messages:
        if tokenizer.eod < 0:
            raise ValueError(
                f"prompt_keys: tokenizer {tokenizer.path} has no end-of-document token, which ends "
                "a response"
            )
        return
    if prepend_bos:
        raise ValueError("prepend_bos: the chat template decides what a conversation begins with")
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.tokenizer.chat_template:
        raise ValueError(
            f"messages_key: tokenizer {tokenizer.path} has no chat template: give the folder of a "
            "Hugging Face tokenizer that has one (chat_template.jinja in it), or use prompt_keys"
        )
    if not tokenizer.tokenizer.is_fast:
        raise ValueError(
            f"messages_key: tokenizer {tokenizer.path} has no fast form (tokenizer.json), which "
            "tells where a token stands in the text"
        )


def encode_conversation(
    tokenizer: Tokenizer, fields: ChatFields, raw: RawRecord, prefix: Sequence[int] = ()
) -> Marked:
    """Return the tokens of a record and which are answers, the token that ends them included.

    Args:
        prefix: ids before a prompt (BOS).

    Raises: RecordError when the record is invalid, or the chat template fails on it.
    """
    if fields.has_messages:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        return encode_messages(tokenizer.tokenizer, fields.messages(raw))
    prompt, response = fields.values(raw)
    # Each by itself, so that a prompt has the ids that it has where a model is asked.
    asked = [*prefix, *tokenizer.tokenize(prompt)]
    answered = tokenizer.tokenize(response)
    if not answered:
        raise RecordError(f"key {fields.keys[1]!r} is empty: nothing to learn")
    answered.append(tokenizer.eod)
    return asked + answered, [0] * len(asked) + [1] * len(answered)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Marked:
    """Return the ids of a conversation by its chat template, and which are the assistant's.

    Where the template marks answers (`{% generation %}`), these are what it marks. Elsewhere an
    answer begins where the generation prompt ends and ends with its turn; a token that stands on
    such a border belongs to it, as transformers has it.
    """
    try:
        if _GENERATION.search(str(tokenizer.chat_template)):
            found = tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            return list(found["input_ids"]), list(found["assistant_masks"])
        text, spans = _answers(tokenizer, messages)
    except RecordError:
        raise
    except Exception as error:  # whatever a template raises
        raise RecordError(f"the chat template fails: {str(error).splitlines()[0]}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [
        int(any(first < end and start < last for first, last in spans))
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), answers


def _answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and where in it the assistant's answers stand."""

    def write(count: int, asks: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=asks
        )
        assert isinstance(text, str)
        return text

    whole, spans = write(len(messages)), []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before, after = write(number, asks=True) if number else "", write(number + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise RecordError(
                f"the chat template writes message {number} otherwise where others follow it: mark "
                "its answers by {% generation %} … {% endgeneration %}"
            )
        spans.append((len(before), len(after)))
    return whole, spans
