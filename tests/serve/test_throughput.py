"""New tokens per second of vLLM beside transformers' generate, on one CPU in one run: printed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.serve import engine
from tests.serve.conftest import NEW_TOKENS
from tests.serve.test_vllm import reference

pytestmark = pytest.mark.serve

REQUESTS = 16


def greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of transformers' generate, all prompts in one batch padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = reference(folder, torch.float32).generate(
        input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, eos_token_id=None,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    return made[:, longest:].tolist()


@pytest.mark.parametrize("name", ["quickstart", "c4_outer", "latent_512"])
def test_throughput(name, home, prompts, tmp_path):
    folder, asked = home / name / "hf", prompts[-REQUESTS:]
    torch.set_num_threads(int(engine.environment()["OMP_NUM_THREADS"]))
    reference(folder, torch.float32)
    seconds, answers = {}, {}
    for label, calls in (
        ("transformers, one by one", [[prompt] for prompt in asked]),
        (f"transformers, one batch of {REQUESTS}", [asked]),
    ):
        start = time.perf_counter()
        answers[label] = [a for call in calls for a in greedy(folder, call)]
        seconds[label] = time.perf_counter() - start
    # The first pass warms the engine up, as loading and the first prompts did transformers.
    passes = (engine.TOGETHER, engine.TOGETHER, engine.ONE_BY_ONE)
    _, together, single = engine.run(
        folder, asked, passes, tmp_path, dtype="float32", enable_prefix_caching=False
    )
    for label, served in ((f"vLLM, {REQUESTS} at once", together), ("vLLM, one by one", single)):
        seconds[label], answers[label] = served.seconds, served.tokens
    base = seconds["transformers, one by one"]
    print(f"\n{name}: {REQUESTS} requests of {NEW_TOKENS} new tokens, float32")
    for label, spent in seconds.items():
        rate = REQUESTS * NEW_TOKENS / spent
        print(f"  {label:34} {rate:8.1f} tokens/s  {base / spent:6.2f} x")
    assert all(answer == together.tokens for answer in answers.values())
