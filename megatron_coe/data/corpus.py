"""The generated math corpus: word problems with worked solutions, and short exercises.

Made by `reasoning-gym` (extra `data`), so that a first training run needs no download. Its
generators are seeded per example, and their text does not depend on Python's hash seed: the same
arguments and the same reasoning-gym give the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_coe.utils.files import atomic_path

# Share of the corpus per task. The word problems carry their solution step by step; the exercises
# (arithmetic and algebra) only the answer.
TASKS = {
    "gsm_symbolic": 0.80,
    "chain_sum": 0.04,
    "products": 0.03,
    "gcd": 0.03,
    "fraction_simplification": 0.04,
    "simple_equations": 0.03,
    "complex_arithmetic": 0.03,
}

# A generator repeats itself now and then, so more is drawn than is kept, up to this many times.
MAX_DRAWS_PER_EXAMPLE = 4


@dataclass(frozen=True)
class Example:
    query: str
    response: str


def make_corpus(
    output_dir: Path, *, train_size: int = 20_000, valid_size: int = 500, seed: int = 1234
) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `valid.jsonl` with the keys `query` and `response`.

    No query stands twice, neither in one file nor in both. The validation file depends on
    `valid_size` and `seed` alone, so that a larger training set is measured on the same problems.

    Returns: the two paths.
    Raises: ValueError for sizes below 1 or beyond what a task can give; OSError when writing fails.
    """
    for name, size in (("train_size", train_size), ("valid_size", valid_size)):
        if size < 1:
            raise ValueError(f"{name}={size}: ask for at least 1 example")
    seen: set[str] = set()
    paths = []
    # Validation first: training examples then give way to it.
    for split, size in (("valid", valid_size), ("train", train_size)):
        path = output_dir / f"{split}.jsonl"
        _write(path, _split(split, size, seed, seen))
        paths.append(path)
    return paths[1], paths[0]


def _split(split: str, size: int, seed: int, seen: set[str]) -> list[Example]:
    """`size` examples with queries not in `seen` (to which they are added), in random order."""
    examples = []
    for task, count in _counts(size).items():
        # reasoning-gym makes example i from seed + i: neighboring seeds would give nearly the same
        # examples, hence seeds far apart per split and task.
        task_seed = random.Random(f"{seed}/{split}/{task}").getrandbits(48)
        examples += _distinct(task, count, task_seed, seen)
    random.Random(f"{seed}/{split}/order").shuffle(examples)
    return examples


def _counts(size: int) -> dict[str, int]:
    """Examples per task, summing to `size`; what rounding leaves goes to the word problems."""
    counts = {task: int(size * share) for task, share in TASKS.items()}
    counts["gsm_symbolic"] += size - sum(counts.values())
    return counts


def _distinct(task: str, count: int, seed: int, seen: set[str]) -> list[Example]:
    examples: list[Example] = []
    for example in _generate(task, count * MAX_DRAWS_PER_EXAMPLE, seed):
        if len(examples) == count:
            break
        if example.query not in seen:
            seen.add(example.query)
            examples.append(example)
    if len(examples) < count:
        raise ValueError(f"{task} gives only {len(examples)} new problems of {count}: ask for less")
    return examples


def _generate(task: str, size: int, seed: int) -> Iterator[Example]:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ValueError(
            "making the corpus needs the package reasoning-gym: `pip install reasoning-gym`"
        ) from error
    for entry in reasoning_gym.create_dataset(task, size=max(size, 1), seed=seed):
        response = entry["metadata"].get("answer_cot") or entry["answer"]
        yield Example(entry["question"].strip(), response.strip())


def _write(path: Path, examples: list[Example]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as out:
        for example in examples:
            line = {"query": example.query, "response": example.response}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
