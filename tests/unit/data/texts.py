"""Random texts, and files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

WORDS = ["one", "two", "three", "ten", "plus", "minus", "times", "equals", "apples", "pears"]
WORDS += ["café", "naïve", "∑", "12", "3.5", "(x+y)"]


def random_texts(count: int, seed: int, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, longest))
        texts.append(rng.choice(["", " "]).join([" ".join(words), rng.choice(["\n", ".", "  !"])]))
    return texts


def write_jsonl(path: Path, records: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
