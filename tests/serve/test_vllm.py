"""Trained models in vLLM, held to transformers: `make test-serve`, which makes the environment.

The oracle is the exported folder's own code, given the tokens that vLLM made: vLLM decodes as it
does if each of them is its likeliest. test_throughput.py compares with its generate.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.serve import engine
from tests.serve.train_models import MODELS

pytestmark = pytest.mark.serve

FP32_BOUND = 1e-4
"""Of log-probabilities, absolute."""
BF16_BOUND = 0.5
BF16_MARGIN = 0.25
"""Of log-probability between two tokens: what bf16 may exchange."""


@cache
def reference(folder: Path, dtype: torch.dtype):
    from megatron_coe.hf import CoeForCausalLM

    return CoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def log_probs(
    folder: Path, prompts: list[list[int]], tokens: list[list[int]], dtype: torch.dtype
) -> torch.Tensor:
    """Log-probabilities [prompts, new tokens, V] of transformers, given vLLM's tokens."""
    whole = [prompt + new for prompt, new in zip(prompts, tokens, strict=True)]
    longest = max(map(len, whole))
    ids = torch.tensor([[0] * (longest - len(w)) + w for w in whole])
    mask = torch.tensor([[0] * (longest - len(w)) + [1] * len(w) for w in whole])
    with torch.no_grad():
        logits = reference(folder, dtype)(
            ids, attention_mask=mask, logits_to_keep=len(tokens[0]) + 1
        ).logits
    return logits[:, :-1].float().log_softmax(dim=-1)


@pytest.fixture(scope="module")
def distinct() -> set[int]:
    """Tokens that vLLM has made, over all models."""
    return set()


@dataclass
class Comparison:
    """vLLM's greedy answers beside transformers'."""

    equal: int
    """Prompts whose every token is the one that transformers finds likeliest after those before
    it: the answers that its own greedy decoding gives."""
    worst: float
    """Largest difference of a log-probability."""
    margins: list[float]
    """Log-probability that transformers gives the likeliest token over the first differing one."""


def compare(
    folder: Path, prompts: list[list[int]], served: engine.Pass, dtype: torch.dtype
) -> Comparison:
    scores_PTV = log_probs(folder, prompts, served.tokens, dtype)
    tokens_PT = torch.tensor(served.tokens)
    best_PT, likeliest_PT = scores_PTV.max(dim=-1)
    own_PT = scores_PTV.gather(2, tokens_PT.unsqueeze(2)).squeeze(2)
    worst = (own_PT - torch.tensor(served.log_probs)).abs().max().item()
    differs_PT = likeliest_PT != tokens_PT
    differing = differs_PT.any(dim=1).nonzero()[:, 0].tolist()
    margins = []
    for prompt in differing:
        first = differs_PT[prompt].nonzero()[0]
        margins.append((best_PT - own_PT)[prompt, first].item())
    return Comparison(len(prompts) - len(differing), worst, margins)


@pytest.mark.parametrize("name", MODELS)
def test_vllm_gives_transformers_tokens_and_log_probabilities(
    name, home, prompts, distinct, tmp_path
):
    """32 prompts of different lengths at once."""
    folder = home / name / "hf"
    (served,) = engine.run(folder, prompts, (engine.TOGETHER,), tmp_path, dtype="float32")
    found = compare(folder, prompts, served, torch.float32)
    made = {token for tokens in served.tokens for token in tokens}
    print(f"\n{name}: fp32, {found}, {len(made)} distinct tokens")
    assert found.equal == len(prompts) and found.worst < FP32_BOUND
    distinct.update(made)


def test_the_answers_are_no_repetition_of_a_few_tokens(distinct):
    """Of the models before, which were trained for minutes."""
    print(f"\n{len(distinct)} distinct tokens over all")
    assert len(distinct) >= 100


@pytest.mark.parametrize("name", ["quickstart", "latent_512", "c3_addinit"])
def test_continuous_batching_gives_the_tokens_of_one_by_one(name, home, prompts, tmp_path):
    together, single = engine.run(
        home / name / "hf", prompts, (engine.TOGETHER, engine.ONE_BY_ONE), tmp_path,
        dtype="float32", enable_prefix_caching=False,
    )  # fmt: skip
    assert len(prompts) == 32 and len({len(prompt) for prompt in prompts}) > 20
    assert together.tokens == single.tokens


@pytest.mark.parametrize("name", ["quickstart", "latent_512"])
def test_bf16_differs_at_near_ties_only(name, home, prompts, tmp_path):
    folder = home / name / "hf"
    (served,) = engine.run(folder, prompts, (engine.TOGETHER,), tmp_path, dtype="bfloat16")
    found = compare(folder, prompts, served, torch.bfloat16)
    print(f"\n{name}: bf16, {found}")
    assert found.worst < BF16_BOUND
    assert max(found.margins, default=0) < BF16_MARGIN


def test_the_prefix_cache_changes_nothing(home, prompts, tmp_path):
    folder, long = home / "quickstart" / "hf", max(prompts, key=len)
    repeated = [long[:70] + prompt[:60] for prompt in prompts[:8]]
    results = {
        cached: engine.run(
            folder, repeated, (engine.ONE_BY_ONE, engine.TOGETHER), tmp_path, max_tokens=8,
            dtype="float32", block_size=32, enable_prefix_caching=cached,
        )
        for cached in (False, True)
    }  # fmt: skip
    (off, _), (on, again) = results[False], results[True]
    assert not any(off.cached) and sum(count > 0 for count in on.cached) >= 7 and all(again.cached)
    assert off.tokens == on.tokens == again.tokens


@pytest.mark.parametrize(
    ("name", "layout"), [("c4_outer", "TP 2"), ("c3_addinit", "TP 2, EP 2"), ("latent_512", "TP 2")]
)
def test_two_processes_give_the_tokens_of_one(name, layout, home, prompts, tmp_path):
    folder, asked = home / name / "hf", prompts[:20]
    (served,) = engine.run(
        folder, asked, (engine.TOGETHER,), tmp_path, dtype="float32",
        tensor_parallel_size=2, enable_expert_parallel="EP" in layout,
    )  # fmt: skip
    found = compare(folder, asked, served, torch.float32)
    print(f"\n{name}: {layout}, fp32, {found}")
    assert found.equal == len(asked) and found.worst < FP32_BOUND


def test_the_model_of_the_mla_kernel_is_the_same_in_padded_heads(
    home, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    folder = home / "latent_512" / "hf"
    (served,) = engine.run(folder, prompts, (engine.TOGETHER,), tmp_path, dtype="float32")
    found = compare(folder, prompts, served, torch.float32)
    assert found.equal == len(prompts) and found.worst < FP32_BOUND


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("v_head_dim", 1024), ("hidden_size", 136)]
)
def test_what_vllm_cannot_run_is_refused_by_name(key, value, home, tmp_path):
    """Before weights are read: there are none."""
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = json.loads((home / "quickstart" / "hf" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"{key}.*transformers"):
        ModelConfig(model=str(tmp_path), skip_tokenizer_init=True)


def test_a_weight_too_many_is_refused_by_name(home, prompts, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(home / "quickstart" / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_igate": False}))
    with pytest.raises(AssertionError, match=r"model.layers.0.mlp.gate.0.weight: config.json"):
        engine.run(folder, prompts[:1], (engine.TOGETHER,), tmp_path)
