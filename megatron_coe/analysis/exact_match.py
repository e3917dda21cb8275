"""Exact match: the share of held-out questions that a model answers with the true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_coe.data.questions import Question, final_answer
from megatron_coe.generation import TextGenerator, load

BATCH = 32


@dataclass(frozen=True)
class Score:
    """The replies of a model to some questions."""

    replies: list[str]
    right: int

    @property
    def exact_match(self) -> float:
        """Share of replies whose final answer is the true one."""
        return self.right / len(self.replies)


@torch.no_grad()
def exact_match(
    folder: Path,
    questions: Sequence[Question],
    max_new_tokens: int,
    device: torch.device,
) -> Score:
    """Have a model answer each question, greedily, and compare the final answers.

    Args:
        folder: a Hugging Face model or a checkpoint, as `generation.load` takes it.

    Raises:
        ValueError: the model cannot be loaded, has no chat template for conversations, or no room
            for a question.
        OSError: a file cannot be read.
    """
    generator, _ = load(folder, [], device=device)
    prompts = [_ids(generator.tokenizer, question) for question in questions]
    replies: list[str] = []
    for start in range(0, len(prompts), BATCH):
        replies += _answer(generator, prompts[start : start + BATCH], max_new_tokens, start)
    right = sum(
        final_answer(reply) == final_answer(question.answer)
        for reply, question in zip(replies, questions, strict=True)
    )
    return Score(replies, right)


def _ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    if isinstance(question.prompt, str):
        return tokenizer.encode(question.prompt)
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template, and the questions are chats")
    text = tokenizer.apply_chat_template(
        question.prompt, tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def _answer(
    generator: TextGenerator, prompts: list[list[int]], max_new_tokens: int, first: int
) -> list[str]:
    """Return the likeliest reply to each prompt of a batch, padded on the left to one length."""
    model, tokenizer = generator.model, generator.tokenizer
    longest = max(map(len, prompts))
    positions = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    if longest >= positions:
        number = first + 1 + max(range(len(prompts)), key=lambda n: len(prompts[n]))
        raise ValueError(
            f"question {number} has {longest} tokens, and the model has "
            f"max_position_embeddings={positions}: leave out longer ones"
        )
    padding = tokenizer.pad_token_id
    padding = tokenizer.eos_token_id if padding is None else padding
    rows = [[padding or 0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    ids = model.generate(
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=min(max_new_tokens, positions - longest),
        do_sample=False,
        pad_token_id=padding or 0,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in ids]
