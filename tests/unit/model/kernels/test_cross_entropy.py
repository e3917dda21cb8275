"""The Triton kernel, by Triton's interpreter, equals the plain one; it compiles for a GPU.

Whether functions are interpreted Triton decides when it is imported: that half of the file runs in
a process of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_coe.model import linear_cross_entropy as module
from megatron_coe.model.linear_cross_entropy import (
    VocabShard,
    linear_cross_entropy,
    torch_cross_entropy,
    triton_cross_entropy,
)
from tests.interpreter import compiled, interpreted, run_interpreted
from tests.sm90 import MOST_REGISTERS, compiled_launches

pytestmark = pytest.mark.skipif(not module.has_triton(), reason="no triton")
T, V = 7, 200
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # of the largest entry


@compiled
def test_interpreted() -> None:
    run_interpreted(__file__)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_form_compiles_for_sm_90(dtype) -> None:
    """Statistics, gradient, and both: without registers spilled to memory."""
    from megatron_coe.model.kernels import cross_entropy as kernels

    def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, targets = on_meta(4736, 102_400, dtype=dtype), on_meta(4736, dtype=torch.int64)
    weights = on_meta(4736)
    with compiled_launches() as launches:
        kernels.softmax_statistics(logits, targets, 102_400)
        kernels.write_gradient(logits, targets, weights, weights, 102_400)
        kernels.statistics_and_gradient(logits, targets, weights, 102_400)
    assert [launch.grid for launch in launches] == [(4736,)] * 3
    for launch in launches:
        assert launch.spilled == 0
        assert 32 * launch.num_warps * launch.registers <= MOST_REGISTERS / 3  # 3 at a time


@compiled
@pytest.mark.parametrize("known", [True, False], ids=["weighted", "recomputed"])
def test_a_pass_launches_one_kernel_a_chunk(monkeypatch, known) -> None:
    """At the paper's size, where 7 chunks are of 1 GiB of logits at most."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": module._CHUNK_BYTES["cuda"]})
    monkeypatch.setattr(module, "cross_entropy_of", lambda x: triton_cross_entropy)
    shapes = {"x": (32_768, 1024), "weight": (102_400, 1024)}
    x, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for shape in shapes.values()
    )
    labels = torch.empty(32_768, dtype=torch.int64, device="meta")
    weights = torch.empty(32_768, device="meta") if known else None
    with compiled_launches() as launches:
        losses = linear_cross_entropy(x, weight, labels, VocabShard(0, 102_400), weights)
        forward = len(launches)
        losses.sum().backward()
    assert forward == 7 and len(launches) == (7 if known else 14)
    assert x.grad.shape == shapes["x"] and weight.grad.shape == shapes["weight"]


def logits_of(dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(T, V, generator=torch.Generator().manual_seed(2))).to(dtype)


TARGETS = torch.tensor([0, 63, 64, 149, -1, 12, 100])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0, -1.0, 1.0])


def assert_same(ours, theirs, dtype: torch.dtype) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        assert found.dtype == expected.dtype
        gap = (found.float() - expected.float()).abs().max()
        assert gap <= TOLERANCE[dtype] * expected.float().abs().max()


@interpreted
@pytest.mark.parametrize("block", [64, 8192], ids=["many blocks", "one block"])
@pytest.mark.parametrize("columns", [V, 150, 128])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_kernel(monkeypatch, dtype, columns, block) -> None:
    from megatron_coe.model.kernels import cross_entropy as kernels

    monkeypatch.setattr(kernels, "_BLOCK", block)
    shard = VocabShard(0, columns)
    targets = shard.targets(TARGETS)
    logits = logits_of(dtype)
    losses, gradient = triton_cross_entropy(logits, targets, WEIGHTS, shard)
    assert gradient is logits and not gradient[:, columns:].any() and not gradient[2].any()
    expected, d_expected = torch_cross_entropy(logits_of(dtype), targets, WEIGHTS, shard)
    here = targets >= 0
    assert_same((losses[here], gradient), (expected[here], d_expected), dtype)
    assert losses.isfinite().all()
    without, nothing = triton_cross_entropy(logits_of(dtype), targets, None, shard)
    assert torch.equal(without, losses) and nothing is None


class WaitingError(Exception):
    """The rank waits for the others."""


class Rank(VocabShard):
    """One of several ranks that run in turn, again and again until no collective is unanswered.

    `group` is a list of collectives, each what every rank gave.
    """

    calls = 0

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        given = self.group[self.calls : self.calls + 1] or [{}]
        if self.calls == len(self.group):
            self.group.append(given[0])
        object.__setattr__(self, "calls", self.calls + 1)
        given[0][self.first] = values.clone()
        if len(given[0]) < 3:
            raise WaitingError
        parts = torch.stack(list(given[0].values()))
        values.copy_(parts.amax(dim=0) if op == dist.ReduceOp.MAX else parts.sum(dim=0))


@interpreted
@pytest.mark.parametrize("function", [triton_cross_entropy, torch_cross_entropy])
@pytest.mark.parametrize("vocab_size", [150, 128], ids=["part padding", "padding alone"])
def test_a_vocabulary_in_three_parts(function, vocab_size) -> None:
    """64 rows a rank; the last one holds 22 tokens, or none."""
    group: list[dict[int, Tensor]] = []
    logits = logits_of(torch.float32)[:, :192].contiguous()

    def on_rank(first: int) -> tuple[Tensor, Tensor] | None:
        shard = Rank(first, min(max(vocab_size - first, 0), 64), group)
        own = logits[:, first : first + 64].contiguous()
        try:
            return function(own, shard.targets(TARGETS), WEIGHTS, shard)
        except WaitingError:
            return None

    for _ in range(4):  # at most two collectives
        ranks = [on_rank(first) for first in (0, 64, 128)]
    assert len(group) == 2 and None not in ranks
    whole = VocabShard(0, vocab_size)
    targets = whole.targets(TARGETS)
    expected, d_expected = torch_cross_entropy(logits.clone(), targets, WEIGHTS, whole)
    gradient = torch.cat([part for _, part in ranks], dim=1)
    here = targets >= 0
    for losses, _ in ranks:
        assert_same((losses[here], gradient), (expected[here], d_expected), torch.float32)


@interpreted
@pytest.mark.parametrize("weights", [torch.ones(300), None], ids=["weighted", "recomputed"])
def test_a_pass_with_the_kernel_is_one_without(monkeypatch, weights) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": 1})
    labels = torch.randint(150, (300,), generator=generator)
    leaves = [torch.randn(rows, 16, generator=generator) for rows in (300, 160)]
    found = []
    for function in (triton_cross_entropy, torch_cross_entropy):
        monkeypatch.setattr(module, "cross_entropy_of", lambda x, function=function: function)
        x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        losses = linear_cross_entropy(x, weight, labels, VocabShard(0, 150), weights)
        losses.sum().backward()
        found.append((losses.detach(), x.grad, weight.grad))
    assert_same(*found, torch.float32)
