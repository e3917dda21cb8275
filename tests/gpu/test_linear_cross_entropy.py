"""Output layer and loss in one on a GPU: the Triton kernel, fp32 sums of bf16 products, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_coe.model import linear_cross_entropy as module
from megatron_coe.model.linear_cross_entropy import (
    VocabShard,
    cross_entropy_of,
    linear_cross_entropy,
    triton_cross_entropy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
T, H, V, COLUMNS = 3000, 256, 8320, 8300
SHARD = VocabShard(0, COLUMNS)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the norm; TF32 is off
WAYS = pytest.mark.parametrize("known", [True, False], ids=["weighted", "recomputed"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cuda": 2**24})


def problem(device, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.2 * torch.randn(V, H, generator=generator)).to(device, dtype).requires_grad_()
    labels = torch.randint(COLUMNS, (T,), generator=generator).to(device)
    mask = (torch.rand(T, generator=generator) < 0.7).to(device, torch.float32)
    return x, weight, labels, mask


def error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(ours.double() - oracle) / oracle.norm()).item()


@WAYS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_losses_and_gradients_are_those_of_all_logits(device, dtype, known) -> None:
    x, weight, labels, mask = problem(device, dtype)
    assert cross_entropy_of(x) is triton_cross_entropy
    weight.main_grad = torch.zeros(V, H, device=device)
    weight.grad_added_to_main_grad = False
    losses = linear_cross_entropy(x, weight, labels, SHARD, mask if known else None)
    losses.backward(3 * mask)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    logits = (exact[0] @ exact[1].t())[:, :COLUMNS]
    expected = F.cross_entropy(logits, labels, reduction="none")
    expected.backward(3 * mask.double())
    assert losses.dtype == torch.float32 and weight.grad_added_to_main_grad
    for ours, oracle in (
        (losses, expected),
        (x.grad, exact[0].grad),
        (weight.main_grad, exact[1].grad),
    ):
        assert error(ours, oracle) < TOLERANCE[dtype]
    assert not weight.main_grad[COLUMNS:].any()


@WAYS
def test_the_same_bits_and_no_wait(device, known) -> None:
    found = []
    for _ in range(3):
        x, weight, labels, mask = problem(device, torch.bfloat16)
        torch.cuda.synchronize()
        if found:  # the first compiles
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses = linear_cross_entropy(x, weight, labels, SHARD, mask if known else None)
            losses.backward(mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((losses.detach(), x.grad, weight.grad))
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


@WAYS
def test_memory_is_of_a_chunk(device, known) -> None:
    """Of the logits a chunk; of the weights' gradient what stands in fp32 and what is handed on."""
    x, weight, labels, mask = problem(device, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, weight, labels, SHARD, mask if known else None).backward(mask)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2**24 + 2 * T * H * 2 + V * H * (4 + 4 + 2) + 2**21
    assert peak < T * V * 2
