"""Optimizer and schedule: who decays, and the learning rate of each step."""

from __future__ import annotations

import math

import pytest
import torch

from tests.unit.training.runs import make_settings, make_trainer, weights


def learning_rates(device, **train) -> list[float]:
    trainer = make_trainer(make_settings(model={"num_layers": 1}, train=train), device)
    rates = []
    for _ in range(train["steps"]):
        rates.append(trainer.train_state.optimizer.param_groups[0]["lr"])
        trainer.train_state.schedule.step(1)
    return rates


@pytest.mark.parametrize(
    "length", [{"lr_warmup_fraction": 0.25}, {"lr_warmup_steps": 10}], ids=["fraction", "steps"]
)
@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_learning_rate_of_every_step(single_rank, style, length):
    steps, warmup, top, low = 40, 10, 0.5, 0.1
    rates = learning_rates(
        single_rank,
        steps=steps,
        lr=top,
        min_lr=low,
        lr_decay_style=style,
        **length,
    )
    for step, rate in enumerate(rates):
        done = (step - warmup) / (steps - warmup)
        if step <= warmup:
            expected = top * step / warmup
        elif style == "constant":
            expected = top
        elif style == "linear":
            expected = top - (top - low) * done
        else:
            expected = low + (top - low) * (1 + math.cos(math.pi * done)) / 2
        assert rate == pytest.approx(expected), step


def test_a_run_too_short_to_warm_up_starts_at_full_rate(single_rank):
    assert learning_rates(single_rank, steps=2, lr=0.5, lr_warmup_fraction=0.1) == [0.5, 0.5]
    assert learning_rates(single_rank, steps=2, lr=0.5, lr_warmup_steps=0) == [0.5, 0.5]


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
def test_weight_decay_reaches_every_parameter_or_spares_norms_and_gates(
    single_rank, everything, distributed
):
    """Gradients of zero leave AdamW only the decay: a weight shrinks by lr * weight_decay."""
    lr, decay = 0.5, 0.25
    settings = make_settings(
        model={"num_layers": 1, "coe_upcycled": True, "coe_residual": "outer"},
        train={
            "lr": lr,
            "weight_decay": decay,
            "lr_warmup_fraction": 0.0,
            "decay_all_parameters": everything,
        },
        parallel={"use_distributed_optimizer": distributed},
    )
    trainer = make_trainer(settings, single_rank)
    for chunk in trainer.train_state.chunks:
        chunk.zero_grad_buffer()
        gate = chunk.module.decoder.layers[0].mlp.coe_weights["1"]
        gate.data.fill_(0.5)  # it starts at zero, which cannot decay
    trainer.train_state.optimizer.reload_model_params()
    before = weights(trainer)
    trainer.train_state.optimizer.step()
    after = weights(trainer)
    spared = {name for name in before if torch.equal(before[name], after[name])}
    vectors = {name for name in before if "norm" in name or "coe_weights" in name}
    assert len(vectors) == 5  # norms: two of the layer, the latent one, the final one; one gate
    assert spared == (set() if everything else vectors)
    for name in before.keys() - spared:
        torch.testing.assert_close(after[name], before[name] * (1 - lr * decay))


def test_seeds_decide_the_initial_weights(single_rank):
    def initial(seed):
        return weights(make_trainer(make_settings(train={"seed": seed}), single_rank))

    first, same, other = initial(1), initial(1), initial(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
