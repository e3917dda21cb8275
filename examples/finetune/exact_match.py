"""Ask models held-out questions, and count the answers whose last number is the true one.

python examples/finetune/exact_match.py --input chats.jsonl --samples 256 before-model after-model
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # from a clone that is not installed

import megatron_coe.hf.auto  # noqa: F401 - registers the model with the Auto classes

BATCH = 128


Conversation = list[dict[str, str]]
"""Messages: the role of each, and its content."""


def main() -> None:
    options = parse()
    questions, answers = read(options.input, options.samples)
    for folder in options.models:
        started_s = time.perf_counter()
        replies = ask(folder, questions, options.max_new_tokens)
        report(str(folder), questions, replies, answers, time.perf_counter() - started_s)


def read(path: Path, samples: int) -> tuple[list[Conversation], list[str]]:
    """Return the first conversations of a file without their last message, and those messages."""
    with path.open(encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"] for line in islice(lines, samples)]
    return [chat[:-1] for chat in chats], [chat[-1]["content"] for chat in chats]


def report(
    model: str,
    questions: list[Conversation],
    replies: list[str],
    answers: list[str],
    seconds: float,
) -> None:
    """Print how many of the replies are right, and the first of them."""
    right = sum(final(a) == final(b) for a, b in zip(replies, answers, strict=True))
    print(
        f"{model}: {right} of {len(replies)} right, exact match {right / len(replies):.3f} "
        f"({seconds:.0f} s)"
    )
    print(f"  question: {questions[0][-1]['content']}")
    print(f"  answer:   {replies[0]}\n  true:     {answers[0]}", flush=True)


@torch.no_grad()
def ask(folder: Path, questions: list[Conversation], max_new_tokens: int) -> list[str]:
    """Return the likeliest reply to each conversation, by its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    replies = []
    for start in range(0, len(questions), BATCH):
        texts = [
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            for question in questions[start : start + BATCH]
        ]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        ids = model.to(device).generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
        )
        asked = inputs["input_ids"].shape[1]
        replies += [tokenizer.decode(row[asked:], skip_special_tokens=True).strip() for row in ids]
    return replies


def final(answer: str) -> str:
    """Return what follows `####`, or the whole answer without it."""
    return answer.rsplit("####", 1)[-1].strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="Hugging Face folder")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with `messages`")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    return parser.parse_args()


if __name__ == "__main__":
    main()
