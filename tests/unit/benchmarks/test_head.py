"""The ways to compute the output head's loss agree, and leave out the padding of the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.head import CHUNKS, MEGATRON, PRODUCTS, RECOMPUTED, TORCH, random_head
from megatron_coe.model import linear_cross_entropy
from tests.builders import tiny_provider


@pytest.mark.parametrize("name", [MEGATRON, CHUNKS, RECOMPUTED, TORCH])
@pytest.mark.parametrize("vocab_size", [90, 128])
def test_gradients_are_those_of_plain_cross_entropy(single_rank, name, vocab_size):
    torch.manual_seed(1)
    provider = tiny_provider(
        vocab_size=vocab_size, make_vocab_size_divisible_by=64, init_method_std=0.5
    )
    head = random_head(provider, 24, single_rank)
    if name not in head.losses():
        pytest.skip("linear_cross_entropy came with torch 2.13")
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (head.x, head.weight))
    loss = F.cross_entropy(x @ weight[:vocab_size].T, head.labels)
    loss.backward()
    found = head.result(name)
    assert found["dweight"].shape == (128, 32)
    torch.testing.assert_close(found["loss"].double(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["dx"].double(), x.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["dweight"].double(), weight.grad, rtol=1e-4, atol=1e-7)


def test_memory_is_that_of_all_logits_or_of_a_chunk(single_rank, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_BYTES", {"cpu": 1})
    head = random_head(tiny_provider(vocab_size=4096), 1024, single_rank)
    peaks = {variant.name: head.peak_bytes(variant) for variant in head.variants()}
    logits, gradients = 1024 * 4096 * 4, (1024 + 4096) * 32 * 4
    assert peaks[PRODUCTS] >= logits and peaks[MEGATRON] >= logits
    for name in (CHUNKS, RECOMPUTED):
        assert gradients < peaks[name] < logits / 4
