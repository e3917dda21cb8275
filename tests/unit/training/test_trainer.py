"""The loop: it trains, and logs and validates when that is due."""

from __future__ import annotations

import math

import pytest

from megatron_coe.training.metrics_logger import NullLogger
from tests.unit.training.runs import SEQ_LENGTH, Sequences, make_settings, make_trainer


def test_training_learns(single_rank):
    """Sequences that repeat are learned by heart, so a wrong update cannot hide."""

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


def test_what_is_due_at_a_step(single_rank):
    class Kept(NullLogger):
        is_enabled = True

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.records, self.steps = {}, 0

        def latest(self, name):
            return 1000.0 if name == "seconds" else None  # as a resumed run

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
