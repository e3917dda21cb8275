"""The loop: its gradient is the objective's, whatever the micro-batch, and its figures are true."""

from __future__ import annotations

import math

import psutil
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.training.metrics_logger import NullLogger
from tests.unit.training.runs import (
    SEQ_LENGTH,
    Sequences,
    make_settings,
    make_trainer,
    weights,
)

GLOBAL_BATCH = 4


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.main_grad.clone()
        for chunk in trainer.train_state.chunks
        for name, parameter in chunk.named_parameters()
    }


def run_one_step(device, micro_batch_size: int, sequences: Sequences, **model):
    """The trainer after one step with learning rate 0, so that weights stay and gradients show."""
    settings = make_settings(
        train={"micro_batch_size": micro_batch_size, "clip_grad": 0.0}, model=model
    )
    trainer = make_trainer(settings, device, sequences)
    figures = trainer.metrics(trainer.step())
    return trainer, gradients(trainer), figures


def objective_by_autograd(trainer, sequences: Sequences) -> tuple[float, dict]:
    """Loss and gradient of the stated objective: one micro-batch, one backward, no Megatron loop.

    Cross-entropy is computed here from the model's logits; the balance loss enters as it does in
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


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("balance", ["seq_aux_loss", "none"])
def test_the_gradient_is_the_objectives_whatever_the_micro_batch(
    single_rank, micro_batch_size, balance
):
    sequences = Sequences(seed=3)
    assert len({float(sequences[n]["loss_mask"].sum()) for n in range(GLOBAL_BATCH)}) > 2
    trainer, measured, figures = run_one_step(
        single_rank, micro_batch_size, sequences, moe_router_load_balancing_type=balance
    )
    loss, expected = objective_by_autograd(trainer, sequences)
    assert figures["train_loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        rounding = 1e-6 * gradient.abs().max().item()  # of sums in fp32, in an entry near 0
        torch.testing.assert_close(measured[name], gradient, rtol=1e-4, atol=rounding, msg=name)
    routers = [gradient for name, gradient in expected.items() if "router" in name]
    assert len(routers) == 4 and all(gradient.abs().max() > 1e-6 for gradient in routers)


def test_the_balance_loss_is_in_the_gradient_and_not_in_the_reported_loss(single_rank):
    sequences = Sequences(seed=3)
    _, with_balance, figures = run_one_step(single_rank, 2, sequences)
    _, without, plain = run_one_step(
        single_rank, 2, sequences, moe_router_load_balancing_type="none"
    )
    assert figures["train_loss"] == plain["train_loss"]
    router = next(name for name in with_balance if "router" in name)
    assert (with_balance[router] - without[router]).abs().max() > 1e-5
    assert not any(name.startswith("balance/") for name in plain)


@pytest.mark.parametrize("empty", [{0}, {0, 1, 2, 3}])
def test_sequences_without_valid_tokens_make_no_nan(single_rank, empty):
    sequences = Sequences(3, frozenset(empty))
    trainer, measured, figures = run_one_step(single_rank, 1, sequences)
    loss, expected = objective_by_autograd(trainer, sequences)
    assert math.isfinite(figures["grad_norm"])
    assert figures["train_loss"] == pytest.approx(loss, rel=1e-6)
    assert (loss == 0.0) == (len(empty) == GLOBAL_BATCH)
    for name, gradient in expected.items():
        torch.testing.assert_close(measured[name], gradient, rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_validation_is_the_mean_over_all_held_out_tokens(single_rank, micro_batch_size):
    held_out = 6  # not a multiple of 4
    settings = make_settings(train={"micro_batch_size": micro_batch_size})
    trainer = make_trainer(settings, single_rank, held_out=held_out)
    before = weights(trainer)
    measured = trainer.validator.run()["valid_loss"]
    total, tokens = 0.0, 0
    (chunk,) = trainer.train_state.chunks
    for number in range(held_out):
        item = Sequences(2)[number]
        with torch.no_grad():
            logits = chunk.module(item["tokens"][None], item["position_ids"][None], None)[0]
        valid = item["loss_mask"] > 0
        total += F.cross_entropy(logits[valid], item["labels"][valid], reduction="sum").item()
        tokens += int(valid.sum())
    assert measured == pytest.approx(total / tokens, rel=1e-6)
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_figures_of_a_step(single_rank):
    trainer, measured, figures = run_one_step(single_rank, 2, Sequences(3))
    norm = math.sqrt(sum(gradient.double().square().sum() for gradient in measured.values()))
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert figures["lr"] == 0.0  # warm-up starts from 0
    assert figures["tokens_per_second"] == GLOBAL_BATCH * SEQ_LENGTH / figures["step_seconds"]
    per_token = trainer.train_state.provider.flops_per_token(SEQ_LENGTH)
    assert figures["flops_per_second"] == pytest.approx(figures["tokens_per_second"] * per_token)
    if single_rank.type == "cpu":
        assert "mfu" not in figures, "no peak is known"
        assert figures["memory_peak_bytes"] >= psutil.Process().memory_info().rss / 2
    means = {k: v for k, v in figures.items() if k.startswith("balance/") and "layer" not in k}
    assert list(means) == [f"balance/seq_aux_loss/iteration_{t}" for t in (1, 2)]
    for key, mean in means.items():
        layers = [figures[f"{key}/layer_{layer}"] for layer in (1, 2)]
        assert mean == pytest.approx(sum(layers) / 2)
        assert 0.5 < mean < 7  # 1 is perfect balance; 7 experts


def test_clipping_holds_the_norm(single_rank):
    settings = make_settings(train={"clip_grad": 1e-3, "lr": 1.0, "lr_warmup_fraction": 0.0})
    trainer = make_trainer(settings, single_rank)
    assert trainer.metrics(trainer.step())["grad_norm"] > 1e-2  # reported before clipping
    clipped = math.sqrt(sum(g.double().square().sum() for g in gradients(trainer).values()))
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_training_learns(single_rank):
    """Sequences that repeat are learnt by heart, so a wrong update cannot hide."""

    class Few(Sequences):
        def __getitem__(self, number):
            return super().__getitem__(number % 4)

    settings = make_settings(train={"steps": 40, "lr_warmup_fraction": 0.0})
    trainer = make_trainer(settings, single_rank, Few(5))
    first = trainer.metrics(trainer.step())["train_loss"]
    for _ in range(39):
        last = trainer.step()
    assert first == pytest.approx(math.log(96), abs=0.5)
    assert trainer.metrics(last)["train_loss"] < 0.3 * first


def test_the_interval_of_reports(single_rank):
    class Kept(NullLogger):
        is_enabled = True

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.records, self.steps = {}, 0

        def latest(self, name):
            return 1000.0 if name == "seconds" else None  # as a run that goes on

        def record(self, step, values):
            self.records[step] = values

        def advance(self):
            self.steps += 1

    settings = make_settings(
        train={"steps": 5, "eval_interval": 4}, log={"interval": 2}, model={"num_layers": 1}
    )
    kept = Kept(settings.log, 5)
    make_trainer(settings, single_rank, held_out=2, metrics_logger=kept).run()
    assert kept.steps == 5
    shown = {step: ("train_loss" in r, "valid_loss" in r) for step, r in kept.records.items()}
    both, loss = (True, True), (True, False)
    assert shown == {1: loss, 2: loss, 4: both, 5: both}
    entropies = [step for step, record in kept.records.items() if "unigram_entropy" in record]
    assert entropies == [5]
    assert SEQ_LENGTH * 4 / kept.records[5]["tokens_per_second"] < 60
    samples = [record["samples"] for record in kept.records.values()]
    assert samples == [4, 8, 16, 20]
    assert [r["tokens"] for r in kept.records.values()] == [n * SEQ_LENGTH for n in samples]
    counted = {
        step for step, record in kept.records.items() if "load/iteration_1/layer_1" in record
    }
    assert counted == {1, 2, 4, 5}
    seconds = [record["seconds"] for record in kept.records.values()]
    assert seconds == sorted(seconds) and seconds[0] > 1000
    assert seconds[1] - seconds[0] == pytest.approx(kept.records[2]["step_seconds"])
