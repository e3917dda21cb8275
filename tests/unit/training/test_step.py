"""A step: its gradient is that of the loss, whatever the micro-batch, and its metrics are true."""

from __future__ import annotations

import math

import psutil
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

from megatron_coe.megatron_compat.versions import clear_aux_losses
from tests.unit.training.runs import (
    SEQ_LENGTH,
    Sequences,
    make_settings,
    make_trainer,
    with_one_sync,
)

GLOBAL_BATCH = 4


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.main_grad.clone()
        for chunk in trainer.train_state.chunks
        for name, parameter in chunk.named_parameters()
    }


RAMP = {"global_batch_size": 12, "rampup_batch_size": [GLOBAL_BATCH, 4, 100]}


def run_one_step(
    device, micro_batch_size: int, sequences: Sequences, train=None, one_sync=False, **model
):
    """Return a trainer after one step at learning rate 0: weights stay, gradients show."""
    train = {"micro_batch_size": micro_batch_size, "clip_grad": 0.0, **(train or {})}
    settings = make_settings(train=train, model=model)
    trainer = make_trainer(settings, device, sequences)
    if one_sync:
        with_one_sync(trainer)
    metrics = trainer.metrics(trainer.step())
    return trainer, gradients(trainer), metrics


def objective_by_autograd(trainer, sequences: Sequences) -> tuple[float, dict]:
    """Loss and gradient of the stated loss: one micro-batch, one backward, no Megatron loop.

    Cross-entropy is computed here from the model's logits; the auxiliary loss enters as it does in
    the layer (held against the reference in tests/unit/model/moe), with weight 1.
    """
    (chunk,) = trainer.train_state.chunks
    items = [sequences[number] for number in range(GLOBAL_BATCH)]
    tokens, labels, mask, positions = (
        torch.stack([item[name] for item in items])
        for name in ("tokens", "labels", "loss_mask", "position_ids")
    )
    model = chunk.module
    model.train()
    # The layer weighs it by the positions, by which Megatron's loop divides in the end.
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1 / tokens.numel()))
    logits_BSV = model(tokens, positions, None)
    losses = F.cross_entropy(logits_BSV.flatten(0, 1), labels.flatten(), reduction="none")
    valid = mask.flatten() > 0
    loss = losses[valid].sum() / max(int(valid.sum()), 1)
    parameters = dict(chunk.named_parameters())
    chunk.zero_grad_buffer()
    trainer.train_state.optimizer.zero_grad()
    loss.backward()
    clear_aux_losses()
    return loss.item(), {name: parameters[name].main_grad.clone() for name in parameters}


@pytest.mark.parametrize(
    ("micro_batch_size", "train"),
    [(1, {}), (2, {}), (4, {}), (2, RAMP)],
    ids=["1", "2", "4", "first of a ramp"],
)
@pytest.mark.parametrize("balance", ["seq_aux_loss", "none"])
@pytest.mark.parametrize("one_sync", [False, True])
def test_the_gradient_is_the_objectives_whatever_the_micro_batch(
    single_rank, micro_batch_size, train, balance, one_sync
):
    sequences = Sequences(seed=3)
    assert len({float(sequences[n]["loss_mask"].sum()) for n in range(GLOBAL_BATCH)}) > 2
    kind = {"moe_router_load_balancing_type": balance}
    trainer, measured, metrics = run_one_step(
        single_rank, micro_batch_size, sequences, train, one_sync, **kind
    )
    assert metrics["global_batch_size"] == trainer.progress.samples == GLOBAL_BATCH
    loss, expected = objective_by_autograd(trainer, sequences)
    assert metrics["train_loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        rounding = 1e-6 * gradient.abs().max().item()  # of sums in fp32, in an entry near 0
        torch.testing.assert_close(measured[name], gradient, rtol=1e-4, atol=rounding, msg=name)
    routers = [gradient for name, gradient in expected.items() if "router" in name]
    assert len(routers) == 4 and all(gradient.abs().max() > 1e-6 for gradient in routers)


def test_the_aux_loss_is_in_the_gradient_and_not_in_the_reported_loss(single_rank):
    sequences = Sequences(seed=3)
    _, with_balance, metrics = run_one_step(single_rank, 2, sequences)
    _, without, plain = run_one_step(
        single_rank, 2, sequences, moe_router_load_balancing_type="none"
    )
    assert metrics["train_loss"] == plain["train_loss"]
    router = next(name for name in with_balance if "router" in name)
    assert (with_balance[router] - without[router]).abs().max() > 1e-5
    assert not any(name.startswith("balance/") for name in plain)


@pytest.mark.parametrize("empty", [{0}, {0, 1, 2, 3}])
def test_sequences_without_valid_tokens_make_no_nan(single_rank, empty):
    sequences = Sequences(3, frozenset(empty))
    trainer, measured, metrics = run_one_step(single_rank, 1, sequences)
    loss, expected = objective_by_autograd(trainer, sequences)
    assert math.isfinite(metrics["grad_norm"])
    assert metrics["train_loss"] == pytest.approx(loss, rel=1e-6)
    assert (loss == 0.0) == (len(empty) == GLOBAL_BATCH)
    for name, gradient in expected.items():
        torch.testing.assert_close(measured[name], gradient, rtol=1e-4, atol=1e-8, msg=name)


def test_metrics_of_a_step(single_rank):
    trainer, measured, metrics = run_one_step(single_rank, 2, Sequences(3))
    norm = math.sqrt(sum(gradient.double().square().sum() for gradient in measured.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["lr"] == 0.0  # warm-up starts from 0
    assert metrics["tokens_per_second"] == GLOBAL_BATCH * SEQ_LENGTH / metrics["step_seconds"]
    per_token = trainer.train_state.provider.flops_per_token(SEQ_LENGTH)
    assert metrics["flops_per_second"] == pytest.approx(metrics["tokens_per_second"] * per_token)
    if single_rank.type == "cpu":
        assert "mfu" not in metrics, "no peak is known"
        assert metrics["memory_peak_bytes"] >= psutil.Process().memory_info().rss / 2
    means = {k: v for k, v in metrics.items() if k.startswith("balance/") and "layer" not in k}
    assert list(means) == [f"balance/seq_aux_loss/iteration_{t}" for t in (1, 2)]
    for key, mean in means.items():
        layers = [metrics[f"{key}/layer_{layer}"] for layer in (1, 2)]
        assert mean == pytest.approx(sum(layers) / 2)
        assert 0.5 < mean < 7  # 1 is perfect balance; 7 experts


def test_clipping_holds_the_norm(single_rank):
    settings = make_settings(train={"clip_grad": 1e-3, "lr": 1.0, "lr_warmup_fraction": 0.0})
    trainer = make_trainer(settings, single_rank)
    assert trainer.metrics(trainer.step())["grad_norm"] > 1e-2  # the norm before clipping
    clipped = math.sqrt(sum(g.double().square().sum() for g in gradients(trainer).values()))
    assert clipped == pytest.approx(1e-3, rel=1e-3)
