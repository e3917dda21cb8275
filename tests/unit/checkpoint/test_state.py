"""A run that is stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import Progress, load_checkpoint
from megatron_coe.config.loader import load_settings
from megatron_coe.distributed import train_state
from megatron_coe.utils.run_files import CONFIG_FILE, LATEST_FILE
from tests.unit.training import runs
from tests.unit.training.runs import make_settings, make_trainer, weights

# Dropout draws from the generators at each step: a lost RNG state shows. (`outer`, because the
# default mode has no residual that dropout could act on.)
DROPOUT = {"coe_residual": "outer", "hidden_dropout": 0.2}


def losses_of(trainer, until: int) -> list[float]:
    losses = []
    while trainer.progress.step < until:
        losses.append(trainer.metrics(trainer.step())["train_loss"])
    return losses


def optimizer_state(trainer) -> dict[str, torch.Tensor]:
    state = {}
    for number, optimizer in enumerate(trainer.train_state.optimizer.chained_optimizers):
        for index, values in enumerate(optimizer.optimizer.state.values()):
            for name, value in values.items():
                state[f"{number}.{index}.{name}"] = torch.as_tensor(value).clone()
    return state


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    ("parallel", "decay_style"),
    [({}, "cosine"), ({"use_distributed_optimizer": True}, "linear")],
    ids=["plain", "distributed_optimizer"],
)
def test_ten_steps_and_ten_more_are_twenty(single_rank, tmp_path, parallel, decay_style):
    train = {"lr_decay_style": decay_style, "micro_batch_size": 2}
    settings = make_settings(tmp_path, train=train, parallel=parallel, model=DROPOUT)
    unbroken = make_trainer(settings, single_rank)
    expected = losses_of(unbroken, until=20)
    assert len(set(expected)) == 20

    first = make_trainer(settings, single_rank)
    losses = losses_of(first, until=10)
    first.save()
    (path,) = find_checkpoints(tmp_path)

    settings.train.seed += 1  # a second process starts with other weights and generators
    second = make_trainer(settings, single_rank)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights(first).values(), weights(second).values(), strict=True)
    )
    second.progress = load_checkpoint(path, second.train_state)
    assert (second.progress.step, second.progress.samples) == (10, 40)
    losses += losses_of(second, until=20)

    assert losses == expected
    assert_same(weights(second), weights(unbroken))
    assert_same(optimizer_state(second), optimizer_state(unbroken))


def test_the_same_run_twice_has_the_same_bits(single_rank):
    settings = make_settings(model=DROPOUT)
    losses, ends = [], []
    for _ in range(2):
        run = make_trainer(settings, single_rank)
        losses.append(losses_of(run, until=3))
        ends.append(weights(run))
    assert losses[0] == losses[1]
    assert_same(*ends)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_before_the_first_step_resumes_too(single_rank, tmp_path, distributed):
    settings = make_settings(tmp_path, parallel={"use_distributed_optimizer": distributed})
    first = make_trainer(settings, single_rank)
    first.save()
    expected = losses_of(first, until=3)
    settings.train.seed += 1
    second = make_trainer(settings, single_rank)
    second.progress = load_checkpoint(find_checkpoints(tmp_path)[0], second.train_state)
    assert losses_of(second, until=3) == expected
    assert_same(weights(first), weights(second))


def test_generators_come_back(single_rank, tmp_path):
    trainer = make_trainer(make_settings(tmp_path), single_rank)
    trainer.save()
    drawn = [torch.rand(3)]
    with get_cuda_rng_tracker().fork():
        drawn.append(torch.rand(3, device=single_rank))
    load_checkpoint(find_checkpoints(tmp_path)[0], trainer.train_state)
    assert torch.equal(torch.rand(3), drawn[0])
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(3, device=single_rank), drawn[1])


def test_the_newest_are_kept_and_those_past_them_are_left_alone(single_rank, tmp_path):
    settings = make_settings(
        tmp_path, checkpoint={"keep_latest": 2, "keep_every": 50}, model={"num_layers": 1}
    )
    trainer = make_trainer(settings, single_rank)
    for step in (5, 50, 70, 300, 100, 120):  # 300 was bad, say, and the run went back to 70
        trainer.progress.step = step
        trainer.save()
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == [f"step_{step:08d}" for step in (300, 120, 100, 50)]
    assert (tmp_path / LATEST_FILE).read_text() == "step_00000120\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, LATEST_FILE])
    (tmp_path / "step_x").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == names
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_holds_the_settings_it_was_made_with(single_rank, tmp_path):
    settings = make_settings(tmp_path, train={"lr": 0.125}, model={"num_layers": 1})
    make_trainer(settings, single_rank).save()
    (path,) = find_checkpoints(tmp_path)
    settings.checkpoint.load = str(path)  # where a run with these settings starts
    assert load_settings(path / CONFIG_FILE) == settings


def test_present_hyperparameters_win_over_saved_ones(single_rank, tmp_path):
    first = make_trainer(make_settings(tmp_path, model={"num_layers": 1}), single_rank)
    losses_of(first, until=3)
    first.save()
    changed = make_settings(
        tmp_path,
        model={"num_layers": 1},
        train={"lr": 0.5, "lr_warmup_fraction": 0.0, "weight_decay": 0.25, "adam_beta2": 0.5},
    )
    second = make_trainer(changed, single_rank)
    load_checkpoint(find_checkpoints(tmp_path)[0], second.train_state)
    for group in second.train_state.optimizer.param_groups:
        assert group["lr"] == 0.5
        assert group["weight_decay"] == 0.25 * group["wd_mult"]
        assert group["betas"] == (0.9, 0.5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed_first", [False, True])
def test_the_kind_of_optimizer_may_change(single_rank, tmp_path, distributed_first, bf16):
    """Both kinds compute the same; they sum the gradients' norm in different orders."""

    def run(folder, distributed):
        train = {"precision": "bf16" if bf16 else "fp32"}
        parallel = {"use_distributed_optimizer": distributed}
        model = {"num_layers": 1, "coe_iterations": 1}
        return make_trainer(
            make_settings(folder, model=model, parallel=parallel, train=train), single_rank
        )

    first = run(tmp_path, distributed_first)
    losses_of(first, until=3)
    first.save()
    second = run(None, not distributed_first)
    second.progress = load_checkpoint(find_checkpoints(tmp_path)[0], second.train_state)
    assert_same(weights(first), weights(second))
    losses = losses_of(first, until=6)
    assert losses_of(second, until=6) == pytest.approx(losses, rel=1e-3 if bf16 else 1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_alone_begin_a_new_run(single_rank, tmp_path, bf16):
    """Its first batch is the data's first, and an update by 0 leaves the weights that it loaded."""
    changes = {"precision": "bf16" if bf16 else "fp32", "lr_decay_style": "cosine"}
    first = make_trainer(make_settings(tmp_path, train=changes), single_rank)
    losses_of(first, until=3)
    first.save()
    (path,) = find_checkpoints(tmp_path)

    settings = make_settings(train={**changes, "lr": 0.0, "lr_warmup_fraction": 0.0})
    tuned, new = (make_trainer(settings, single_rank) for _ in range(2))
    tuned.progress = load_checkpoint(path, tuned.train_state, weights_only=True)
    assert tuned.progress == Progress()
    assert tuned.train_state.schedule.num_steps == 0
    assert_same(optimizer_state(tuned), optimizer_state(new))
    first.progress = Progress()
    assert losses_of(tuned, until=1) == losses_of(first, until=1)
    assert load_checkpoint(path, first.train_state).step == 3
    assert_same(weights(tuned), weights(first))


def test_a_checkpoint_of_another_model_is_refused(single_rank, tmp_path):
    make_trainer(make_settings(tmp_path, model={"num_layers": 1}), single_rank).save()
    (path,) = find_checkpoints(tmp_path)
    other = make_trainer(make_settings(model={"num_layers": 1, "hidden_size": 40}), single_rank)
    with pytest.raises(ValueError, match=f"checkpoint {Path(path)} does not fit this model"):
        load_checkpoint(path, other.train_state)


@pytest.mark.parametrize("distributed", [False, True])
def test_an_evaluation_needs_no_optimizer(single_rank, tmp_path, monkeypatch, distributed):
    settings = make_settings(tmp_path, parallel={"use_distributed_optimizer": distributed})
    trained = make_trainer(settings, single_rank, held_out=3)
    losses_of(trained, until=2)
    trained.save()
    monkeypatch.setattr(train_state, "build_optimizer", pytest.fail)
    only_model = partial(train_state.build_train_state, trains=False)
    monkeypatch.setattr(runs, "build_train_state", only_model)
    settings.train.seed += 1
    evaluated = make_trainer(settings, single_rank, held_out=3)
    assert evaluated.train_state.optimizer is None
    evaluated.progress = load_checkpoint(find_checkpoints(tmp_path)[0], evaluated.train_state)
    assert evaluated.progress.step == 2
    assert_same(weights(evaluated), weights(trained))
    assert evaluated.validator.run() == trained.validator.run()


def test_an_extra_state_that_a_checkpoint_has_not_is_none(single_rank, tmp_path, monkeypatch):
    """As between the backends: Transformer Engine's norms have one, the torch backend's not."""
    first = make_trainer(make_settings(tmp_path), single_rank)
    first.step()
    first.save()
    second = make_trainer(make_settings(tmp_path), single_rank)
    (model,) = unwrap_model(second.train_state.chunks)
    norm, given = type(model.decoder.final_layernorm), []
    monkeypatch.setattr(norm, "get_extra_state", lambda self: None, raising=False)
    monkeypatch.setattr(
        norm, "set_extra_state", lambda self, state: given.append(state), raising=False
    )
    second.progress = load_checkpoint(find_checkpoints(tmp_path)[0], second.train_state)
    assert given and set(given) == {None}
    assert_same(weights(second), weights(first))
    assert_same(optimizer_state(second), optimizer_state(first))
