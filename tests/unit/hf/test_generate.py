"""`generate(**tokenizer(texts))` writes the same tokens with every cache as without one.

`make test-transformers` runs these with every version of transformers that the model supports.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, DynamicCache

from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from megatron_coe.hf import CoeForCausalLM
from tests.unit.hf.small import KINDS, small_model

TEXTS = ["one two three four five six", "six", "two four"]
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 299}
CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "dynamic, beams": {"num_beams": 3},
    "static, beams": {"num_beams": 3, "cache_implementation": "static"},
}


@pytest.fixture(scope="module", params=["plain", "plain attention"])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, as an export has them."""
    home = tmp_path_factory.mktemp("generate")
    (home / "texts.txt").write_text("one two three\nfour five six\n" * 20)
    train_tokenizer([home / "texts.txt"], home / "t.model", fields=Fields(), vocab_size=285)
    model = small_model(vocab_size=300, pad_token_id=3, **KINDS[request.param])
    with torch.no_grad():
        model.lm_head.weight[299] = 0  # the end comes late
    model.save_pretrained(home / "hf")
    write_tokenizer(home / "t.model", home / "hf")
    return home / "hf"


@pytest.fixture(scope="module")
def model(folder: Path) -> CoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def batch(folder: Path) -> BatchEncoding:
    """Texts of different lengths, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


def written(model: CoeForCausalLM, inputs: dict, **options: object) -> Tensor:
    return model.generate(**inputs, **{**SETTINGS, **options})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_changes_no_token(model, batch, cache, attention):
    options = CACHES[cache]
    if transformers.__version__.startswith("4.") and "static" in cache:
        widths = {model.config.head_dim, model.config.v_head_dim}
        if model.config.attention_type == "mla" and len(widths) > 1:
            pytest.skip("static caches of transformers 4 want values as wide as keys")
    model.set_attn_implementation(attention)
    beams = options.get("num_beams", 1)
    without = written(model, batch, use_cache=False, num_beams=beams)
    assert without.shape[1] > batch["input_ids"].shape[1] + 4
    assert torch.equal(written(model, batch, **options), without)


@pytest.mark.parametrize("cache", ["dynamic", "dynamic, beams"])
def test_a_batch_writes_what_each_text_does_alone(model, folder, batch, cache):
    """By the tokens of a loop over `forward`, where there are no beams."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    together = written(model, batch, **CACHES[cache], max_new_tokens=6)
    for row, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="pt")
        alone = written(model, inputs, use_cache=False, **CACHES[cache], max_new_tokens=6)
        new = alone.shape[1] - inputs["input_ids"].shape[1]
        width = batch["input_ids"].shape[1]
        assert together[row, width : width + new].tolist() == alone[0, -new:].tolist()
        if "num_beams" not in CACHES[cache]:
            ids = inputs["input_ids"]
            for _ in range(new):
                with torch.no_grad():
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(ids, alone)


def test_several_tokens_are_checked_at_once(model, batch):
    """Prompt lookup: several tokens after cached ones, some of which are taken back."""
    inputs = {name: value[:1] for name, value in batch.items()}
    expected = written(model, inputs, use_cache=False)
    assert torch.equal(written(model, inputs, prompt_lookup_num_tokens=3), expected)


def test_a_text_goes_on_from_a_cache(model, batch):
    """A first call's cache is given to a second one, by the name that it came under."""
    inputs = {name: value[:1] for name, value in batch.items()}
    first = model.generate(
        **inputs, **{**SETTINGS, "max_new_tokens": 4}, return_dict_in_generate=True
    )
    cache = getattr(first, "cache", None) or first.past_key_values
    assert isinstance(cache, DynamicCache)
    seen = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    expected = written(model, seen, use_cache=False, max_new_tokens=4)
    name = "cache" if "cache" in first else "past_key_values"
    assert torch.equal(written(model, {**seen, name: cache}, max_new_tokens=4), expected)


def test_types_of_tokens_are_left_aside(model, batch):
    """Tokenizers of transformers 4 give them unless their folder says otherwise."""
    types = torch.zeros_like(batch["input_ids"])
    expected = written(model, batch)
    assert torch.equal(written(model, {**batch, "token_type_ids": types}), expected)
    logits = model(**batch).logits
    assert torch.equal(model(**batch, token_type_ids=types).logits, logits)


def test_gradient_checkpointing_does_not_lose_the_cache(model, batch):
    """As in training with samples now and then: every layer would run on new tokens alone."""
    expected = written(model, batch, use_cache=False)
    model.train().gradient_checkpointing_enable()
    try:
        assert torch.equal(written(model, batch), expected)
    finally:
        model.eval().gradient_checkpointing_disable()
