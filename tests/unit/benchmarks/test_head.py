"""The ways to compute the output head's loss leave out the padding of the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.head import FUSED, MEGATRON, random_head
from tests.builders import tiny_provider

pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="linear_cross_entropy came with torch 2.13"
)


@pytest.mark.parametrize("name", [MEGATRON, FUSED])
@pytest.mark.parametrize("vocab_size", [90, 128])
def test_gradients_are_those_of_plain_cross_entropy(single_rank, name, vocab_size):
    torch.manual_seed(1)
    provider = tiny_provider(
        vocab_size=vocab_size, make_vocab_size_divisible_by=64, init_method_std=0.5
    )
    head = random_head(provider, 24, single_rank)
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (head.x, head.weight))
    F.cross_entropy(x @ weight[:vocab_size].T, head.labels).backward()
    found = head.result(name)
    assert found["dweight"].shape == (128, 32)
    torch.testing.assert_close(found["dx"].double(), x.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["dweight"].double(), weight.grad, rtol=1e-4, atol=1e-7)
