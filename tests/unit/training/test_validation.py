"""Validation: the loss of all held-out tokens, and the steps at which it is due."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from megatron_coe.training.validation import HeldOutSet, Validator
from tests.unit.training.runs import Sequences, make_settings, make_trainer, weights


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


def test_sets_are_reported_apart_and_together(single_rank):
    """Together they are what one set of all their sequences is: not the mean of the sets."""
    trainer = make_trainer(make_settings(model={"num_layers": 1}), single_rank, held_out=6)
    together, train = trainer.validator.run(), trainer.settings

    def validator(**sets: range) -> Validator:
        held_out = {
            name: HeldOutSet(
                replace(trainer.source, dataset=Subset(Sequences(2), numbers)), len(numbers)
            )
            for name, numbers in sets.items()
        }
        return Validator(train, trainer.train_state, held_out, trainer.heartbeat)

    short, long = range(1), range(1, 6)
    of_short = validator(short=short).run()
    of_long = validator(long=long).run()
    assert set(of_short) == {"valid_loss", "valid_loss/short"} and set(together) == {"valid_loss"}
    both = validator(short=short, long=long)
    assert both.run() == {
        "valid_loss": pytest.approx(together["valid_loss"], rel=1e-6),
        "valid_loss/short": of_short["valid_loss"],
        "valid_loss/long": of_long["valid_loss"],
    }
    mean = (of_short["valid_loss"] + of_long["valid_loss"]) / 2
    assert abs(mean - together["valid_loss"]) > 1e-4
    entropies = both.final_metrics(train.steps)
    assert (
        entropies["unigram_entropy"]
        == trainer.validator.final_metrics(train.steps)["unigram_entropy"]
    )
    assert entropies["unigram_entropy/long"] < entropies["unigram_entropy"]


@pytest.mark.parametrize(("interval", "expected"), [(0, [5]), (2, [2, 4, 5]), (5, [5])])
def test_a_validation_is_due_at_the_interval_and_the_last_step(single_rank, interval, expected):
    train = {"steps": 5, "eval_interval": interval}
    settings = make_settings(train=train, model={"num_layers": 1})
    validator = make_trainer(settings, single_rank, held_out=2).validator
    assert [step for step in range(1, 6) if validator.is_due(step)] == expected
