"""Optimizer and schedule: who decays, and the learning rate of each step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_coe.config.run_config import TrainSettings
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.distributed.lr_schedule import LRSchedule
from tests.unit.training.runs import make_settings, make_trainer, weights

TOP, LOW = 0.5, 0.1


def learning_rates(**train) -> list[float]:
    """The rate of each step, from the schedule of a run that consumes its batches."""
    settings = TrainSettings(**{"lr": TOP, "min_lr": LOW, **train})
    group: dict[str, float] = {}
    schedule = LRSchedule(SimpleNamespace(param_groups=[group]), settings)
    rates, samples = [], 0
    for step in range(settings.steps):
        schedule.move_to(step, samples)
        rates.append(group["lr"])
        samples += batch_schedule(settings).size(samples)
    return rates


def fall(style: str, done: float, begin: float) -> float:
    """The rate after a share of the fall, which begins after a number of 40 steps."""
    if style == "inverse-square-root":
        return max(LOW, TOP * (begin / (begin + done * (40 - begin))) ** 0.5)
    return {
        "constant": TOP,
        "linear": TOP - (TOP - LOW) * done,
        "cosine": LOW + (TOP - LOW) * (1 + math.cos(math.pi * done)) / 2,
        "exponential": LOW + (TOP - LOW) * (2 ** (1 - done) - 1),
        "minus_sqrt": LOW + (TOP - LOW) * (1 - done**0.5),
    }[style]


@pytest.mark.parametrize(
    "length",
    [
        {"lr_warmup_fraction": 0.25},
        {"lr_warmup_steps": 10},
        {"lr_warmup_samples": 30, "global_batch_size": 3},
    ],
    ids=["fraction", "steps", "samples"],
)
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
def test_learning_rate_of_every_step(style, length):
    steps, warmup = 40, 10
    rates = learning_rates(steps=steps, lr_decay_style=style, **length)
    for step, rate in enumerate(rates):
        done = (step - warmup) / (steps - warmup)
        expected = TOP * step / warmup if step <= warmup else fall(style, done, warmup)
        assert rate == pytest.approx(expected), step


@pytest.mark.parametrize("unit", ["steps", "samples"])
@pytest.mark.parametrize("style", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_the_rate_stays_and_falls_at_the_end(style, unit):
    steps, warmup, decay, batch = 40, 10, 12, 3
    length = {f"lr_wsd_decay_{unit}": decay * (batch if unit == "samples" else 1)}
    rates = learning_rates(
        steps=steps,
        lr_decay_style="WSD",
        lr_wsd_decay_style=style,
        lr_warmup_steps=warmup,
        global_batch_size=batch,
        **length,
    )
    rise = [TOP * step / warmup for step in range(warmup)]
    assert rates[: steps - decay] == pytest.approx([*rise, *[TOP] * (steps - decay - warmup)])
    for step in range(steps - decay, steps):
        expected = fall(style, (step - steps + decay) / decay, steps - decay)
        assert rates[step] == pytest.approx(expected), step


def test_the_rate_follows_the_samples_of_a_ramp():
    """Batches of 2, 2, 2, 2, 4, 4, 4, 4: the warm-up ends with the fifth, the fall begins with the
    seventh."""
    rates = learning_rates(
        steps=8,
        global_batch_size=4,
        rampup_batch_size=[2, 2, 8],
        lr_decay_style="WSD",
        lr_wsd_decay_style="linear",
        lr_warmup_steps=5,
        lr_wsd_decay_samples=10,
    )
    rise = [TOP * samples / 12 for samples in (0, 2, 4, 6, 8, 12)]
    falls = [TOP - (TOP - LOW) * samples / 10 for samples in (2, 6)]
    assert rates == pytest.approx([*rise, *falls])


def test_a_run_too_short_to_warm_up_starts_at_full_rate():
    assert learning_rates(steps=2, lr_warmup_fraction=0.1) == [TOP, TOP]
    assert learning_rates(steps=2, lr_warmup_steps=0) == [TOP, TOP]


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
