"""Output layer and loss in chunks: equal to logits first, and no [T, V] left for the backward pass.

Axis letters: T tokens, H hidden, V rows of the weights, of which those from `columns` on are
padding.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_coe.model import linear_cross_entropy as module
from megatron_coe.model.linear_cross_entropy import (
    VocabShard,
    chunk_rows,
    cross_entropy_of,
    linear_cross_entropy,
    torch_cross_entropy,
    weight_gradient,
)

T, H, V, COLUMNS = 300, 24, 192, 150
SHARD = VocabShard(first=0, columns=COLUMNS)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the norm. bf16 rounds the logits and their gradient to 8 bits, as the unfused way does."""

INCOMING = {
    "a constant": lambda draw: torch.full((T,), 0.37),
    "a mask": lambda draw: (draw(T) > 0).float() * 0.25,
    "nothing": lambda draw: torch.zeros(T),
    "any": lambda draw: draw(T),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """Three chunks of a tile each, the last one not full."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": 1})
    assert chunk_rows(T, V, 4, on_gpu=False) == 128


def draw_of(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weights (padding would win nearly all of the probability) and labels."""
    draw = draw_of(seed)
    x, weight = draw(T, H), draw(V, H) * 0.7
    weight[COLUMNS:] *= 10
    labels = torch.randint(COLUMNS, (T,), generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def oracle(x, weight, labels, incoming) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and gradients by autograd over all logits, in fp64."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    losses = F.cross_entropy((x @ weight.t())[:, :COLUMNS], labels, reduction="none")
    losses.backward(incoming.double())
    return losses.detach(), x.grad, weight.grad


def assert_equal(found, expected, tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        gap = torch.linalg.vector_norm(ours.double() - theirs)
        assert gap <= tolerance * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("incoming", INCOMING)
@pytest.mark.parametrize("way", ["weighted", "recomputed"])
def test_losses_and_gradients_are_those_of_all_logits(dtype, incoming, way) -> None:
    x, weight, labels = problem(dtype)
    incoming = INCOMING[incoming](draw_of(5))
    weights = 3.0 * incoming if way == "weighted" else None  # known up to a factor
    losses = linear_cross_entropy(x, weight, labels, SHARD, weights)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    losses.backward(incoming.to(losses.dtype))
    expected = oracle(x, weight, labels, incoming)
    assert_equal((losses, x.grad, weight.grad), expected, TOLERANCES[dtype])
    assert x.grad.dtype == weight.grad.dtype == dtype
    assert not weight.grad[COLUMNS:].any()
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels, SHARD), losses)


def test_the_same_bits_every_time() -> None:
    found = []
    for _ in range(2):
        x, weight, labels = problem(torch.bfloat16)
        linear_cross_entropy(x, weight, labels, SHARD, torch.ones(T)).sum().backward()
        found.append((x.grad, weight.grad))
    assert all(map(torch.equal, *found))


def test_weights_that_were_not_meant_are_refused() -> None:
    x, weight, labels = problem(torch.float32)
    losses = linear_cross_entropy(x, weight, labels, SHARD, torch.ones(T))
    with pytest.raises(RuntimeError, match="cross_entropy_loss_fusion=False"):
        losses[:-1].sum().backward()


def test_a_token_without_weight_does_not_matter() -> None:
    """Neither what its label is, nor that its loss is not finite."""
    x, weight, labels = problem(torch.float32)
    labels[7] = -100
    mask = torch.ones(T).index_fill(0, torch.tensor([7]), 0.0)
    losses = linear_cross_entropy(x, weight, labels, SHARD, mask)
    losses.backward(mask)
    assert losses.isfinite().all() and not x.grad[7].any()
    kept = mask.bool()
    (x_kept, weight_kept, _) = problem(torch.float32)
    expected = oracle(x_kept[kept], weight_kept, labels[kept], torch.ones(T - 1))
    assert_equal((losses[kept], x.grad[kept], weight.grad), expected, 1e-5)


def test_a_loss_that_is_not_finite_is_not_refused() -> None:
    x, weight, labels = problem(torch.float32)
    with torch.no_grad():
        x[3] = float("nan")
    losses = linear_cross_entropy(x, weight, labels, SHARD, torch.ones(T))
    losses.backward(torch.full((T,), float("nan")))
    assert losses[3].isnan() and weight.grad.isnan().any()


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("weights", [torch.ones(T), None], ids=["weighted", "recomputed"])
def test_what_is_frozen_gets_no_gradient(frozen, weights) -> None:
    x, weight, labels = problem(torch.float32)
    expected = dict(zip(("x", "weight"), oracle(x, weight, labels, torch.ones(T))[1:], strict=True))
    leaves = {"x": x, "weight": weight}
    leaves.pop(frozen).requires_grad_(False)
    linear_cross_entropy(x, weight, labels, SHARD, weights).sum().backward()
    ((name, leaf),) = leaves.items()
    assert_equal([leaf.grad], [expected[name]], 1e-5)


# --- what exists ----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("weights", [torch.ones(T), None], ids=["weighted", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_logits_never_exist(weights, dtype) -> None:
    x, weight, labels = problem(dtype)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = linear_cross_entropy(x, weight, labels, SHARD, weights)
        losses.sum().backward()
    assert set(saved) <= {(T, H), (V, H), (T,)}
    assert largest.numel == 128 * V < T * V


@pytest.mark.parametrize("known", [True, False], ids=["weighted", "recomputed"])
def test_the_host_reads_no_value(known) -> None:
    """On tensors without values, where asking for one raises."""
    x, weight, labels = (tensor.to("meta") for tensor in problem(torch.float32))
    weights = torch.ones(T, device="meta") if known else None
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight)]
    losses = linear_cross_entropy(*leaves, labels, SHARD, weights)
    gradients = torch.autograd.grad(losses, leaves, torch.ones(T, device="meta"))
    assert [gradient.shape for gradient in gradients] == [(T, H), (V, H)]


# --- where the weights' gradient goes -------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.ones(T), None], ids=["weighted", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_added_to_megatrons_buffer(weights, dtype) -> None:
    x, weight, labels = problem(dtype)
    weight.main_grad = torch.full((V, H), 0.5)
    weight.grad_added_to_main_grad = False
    for _ in range(2):
        linear_cross_entropy(x, weight, labels, SHARD, weights).mul(0.3).sum().backward()
    expected = 0.5 + 2 * oracle(x, weight, labels, torch.full((T,), 0.3))[2]
    assert weight.grad_added_to_main_grad and weight.main_grad.dtype == torch.float32
    assert_equal([weight.main_grad], [expected], TOLERANCES[dtype])


@pytest.mark.parametrize("mark", ["zero_out_wgrad", "bf16 buffer", "no buffer"])
def test_or_handed_to_autograd(mark) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    dw = torch.arange(12.0).view(4, 3)
    if mark != "no buffer":
        weight.main_grad = torch.zeros(4, 3)
        weight.grad_added_to_main_grad = False
    if mark == "bf16 buffer":
        weight.main_grad = weight.main_grad.bfloat16()
    weight.zero_out_wgrad = mark == "zero_out_wgrad"
    found = weight_gradient(weight, dw, torch.tensor(2.0))
    assert torch.equal(found, (2 * dw).bfloat16())
    assert mark == "no buffer" or not (weight.grad_added_to_main_grad or weight.main_grad.any())


# --- the vocabulary in parts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "rank", "columns"), [(150, 0, 64), (150, 2, 22), (100, 2, 0), (192, 2, 64)]
)
def test_targets_are_columns_of_the_rank(monkeypatch, vocab_size, rank, columns) -> None:
    monkeypatch.setattr(module, "get_pg_rank", lambda group: rank)
    monkeypatch.setattr(module, "get_pg_size", lambda group: 3)
    shard = VocabShard.of(vocab_size, 64, "the group")
    assert (shard.first, shard.columns, shard.group) == (64 * rank, columns, "the group")
    labels = torch.tensor([-100, 0, 63, 64, 127, 128, 149, 150, 191])
    held = [label - 64 * rank if 0 <= label - 64 * rank < columns else -1 for label in labels]
    assert shard.targets(labels).tolist() == held


def test_chunks_are_of_one_size(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cuda": 2**30})
    rows = chunk_rows(32_768, 102_400, 2, on_gpu=True)
    assert rows % 128 == 0 and 32_768 - 6 * rows > 0.9 * rows  # 7 of 4,736 tokens
    assert chunk_rows(48, 320, 2, on_gpu=True) == 128


def test_the_kernel_is_for_a_gpu() -> None:
    assert cross_entropy_of(torch.zeros(1)) is torch_cross_entropy
