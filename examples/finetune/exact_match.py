"""Ask models held-out questions, and count the answers whose last number is the true one.

python examples/finetune/exact_match.py --input chats.jsonl --samples 128 before-model after-model
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

BATCH = 32


def main() -> None:
    options = parse()
    with options.input.open(encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"] for line in islice(lines, options.samples)]
    expected = [final(chat[-1]["content"]) for chat in chats]
    for folder in options.models:
        started_s = time.perf_counter()
        replies = ask(folder, [chat[:-1] for chat in chats], options.max_new_tokens)
        right = sum(final(a) == b for a, b in zip(replies, expected, strict=True))
        print(
            f"{folder}: {right} of {len(chats)} right, exact match {right / len(chats):.3f} "
            f"({time.perf_counter() - started_s:.0f} s)"
        )
        print(f"  question: {chats[0][-2]['content']}")
        print(f"  answer:   {replies[0]}\n  true:     {chats[0][-1]['content']}", flush=True)


@torch.no_grad()
def ask(folder: Path, questions: list[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
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
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    return parser.parse_args()


if __name__ == "__main__":
    main()
