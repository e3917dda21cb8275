"""A NaN or Inf: nothing is updated, the report names where it arose, the run ends or goes on."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from megatron_coe.training.trainer import Trainer
from tests.unit.training.planted import NanBackward, coe_layers, everything, nan_at, planted, same
from tests.unit.training.runs import Sequences, make_settings, make_trainer, weights

PLANTED_STEP = 3
GLOBAL_BATCH = 4


def small(tmp_path=None, **train) -> Trainer:
    device = torch.device("cpu")
    settings = make_settings(tmp_path, train={"micro_batch_size": 2, **train})
    return make_trainer(settings, device)


def steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.step()


# Micro-batches of 2 of a global batch of 4, C = 2: a layer's experts are called 4 times a step.
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_report_names_layer_iteration_and_data_and_nothing_changes(
    single_rank, layer, call, way
):
    trainer = small()
    steps(trainer, PLANTED_STEP - 1)
    before = everything(trainer)
    experts = coe_layers(trainer)[layer].experts
    change = nan_at if way == "forward" else NanBackward.apply
    with (
        planted(experts, change, lambda number: number % 4 == call),
        pytest.raises(NotFiniteError) as stopped,
    ):
        trainer.step()
    assert same(everything(trainer), before)
    report = str(stopped.value)
    assert f"step {PLANTED_STEP} is not finite" in report
    name = f"decoder.layers.{layer}.mlp.experts"
    assert name in report
    assert f"(layer {layer + 1}, iteration {call % 2 + 1})" in report
    first = GLOBAL_BATCH * (PLANTED_STEP - 1) + 2 * (call // 2)
    assert f"micro-batch {call // 2 + 1} of 2, training sequences {first} to {first + 1}" in report
    assert "first on rank 0" in report
    assert f"in the {way} pass" in report
    assert stopped.value.weights_are_finite
    trainer.step()  # the same step, without the fault
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


@pytest.mark.parametrize("layer", [0, 1])
def test_an_infinite_router_weight_is_named_and_never_saved(single_rank, tmp_path, layer):
    trainer = small(tmp_path)
    steps(trainer, 1)
    with torch.no_grad():
        coe_layers(trainer)[layer].router[1].weight[0, 0] = math.inf
    with pytest.raises(NotFiniteError) as stopped:
        trainer.run()
    report = str(stopped.value)
    name = f"decoder.layers.{layer}.mlp.router.1"
    assert f"{name} (layer {layer + 1}, iteration 2)" in report
    assert f"weights that were not finite before: {name}.weight on rank 0" in report
    assert not list(tmp_path.iterdir()), "weights that are not finite replace no checkpoint"


def test_an_expert_with_a_nan_weight_is_named(single_rank):
    """Expert 5 of layer 2 gets tokens in iteration 2 alone."""
    trainer = small()
    layer = coe_layers(trainer)[1]
    with torch.no_grad():
        layer.experts.linear_fc1.weight[5, 0, 0] = math.nan

    def without_expert_5(logits: torch.Tensor) -> torch.Tensor:
        away = torch.zeros_like(logits)
        away[..., 5] = -1e4
        return logits + away

    first, second = layer.router[0], layer.router[1]
    first_gating, second_gating = first.gating, second.gating
    first.gating = lambda x: without_expert_5(first_gating(x))
    second.gating = lambda x: -without_expert_5(-second_gating(x))
    with pytest.raises(NotFiniteError) as stopped:
        trainer.step()
    report = str(stopped.value)
    assert "decoder.layers.1.mlp.experts" in report
    assert "(layer 2, iteration 2)" in report
    assert "experts.linear_fc1.weight, expert 5 (counted from 0) on rank 0" in report


def test_stopping_saves_the_step_before(single_rank, tmp_path):
    trainer = small(tmp_path, steps=10)
    experts = coe_layers(trainer)[0].experts
    due = 4 * (PLANTED_STEP - 1)
    with planted(experts, nan_at, lambda number: number >= due), pytest.raises(NotFiniteError):
        trainer.run()
    saved = [path.name for path in tmp_path.iterdir() if path.name.startswith("step_")]
    assert saved == [f"step_{PLANTED_STEP - 1:08d}"]
    assert trainer.progress.step == PLANTED_STEP - 1


def test_a_skipped_step_uses_its_data_up_and_resumes_exactly(single_rank, tmp_path):
    """Skipped at step 3; saved there, resumed, and trained on: the same as without the resume."""
    from megatron_coe.checkpoint.state import load_checkpoint

    def skipping(folder, exit_step=None) -> Trainer:
        trainer = small(folder, steps=6, on_nonfinite="skip", exit_step=exit_step)
        experts = coe_layers(trainer)[0].experts
        due = range(4 * (PLANTED_STEP - 1), 4 * PLANTED_STEP + 4)  # the step, and its repetition
        with planted(experts, nan_at, lambda number: number in due):
            trainer.run()
        return trainer

    unbroken = skipping(tmp_path / "unbroken")
    assert (unbroken.progress.step, unbroken.progress.samples) == (6, 24)
    assert (unbroken.progress.skipped, unbroken.progress.skipped_in_row) == (1, 0)
    broken = skipping(tmp_path / "broken", exit_step=PLANTED_STEP)
    assert (broken.progress.skipped, broken.progress.skipped_in_row) == (1, 1)
    resumed = small(tmp_path / "broken", steps=6, on_nonfinite="skip")
    resumed.progress = load_checkpoint(tmp_path / "broken" / "step_00000003", resumed.train_state)
    assert resumed.progress == broken.progress
    resumed.run()
    first, second = everything(unbroken), everything(resumed)
    for name in ("weights", "buffers", "moments", "schedule", "progress"):
        assert same(first[name], second[name]), name


def test_no_more_steps_in_a_row_are_skipped_than_allowed(single_rank):
    trainer = small(on_nonfinite="skip", max_skipped_steps=2)
    with planted(coe_layers(trainer)[0].experts, nan_at, lambda number: True):
        assert "step 1 is not finite" in trainer.step().skipped
        assert trainer.step().skipped
        with pytest.raises(NotFiniteError, match="2 steps before it were skipped"):
            trainer.step()
    assert (trainer.progress.step, trainer.progress.skipped) == (2, 2)


def test_what_does_not_come_again_is_called_transient(single_rank):
    trainer = small()
    with (
        planted(coe_layers(trainer)[0].experts, nan_at, lambda number: number == 0),
        pytest.raises(NotFiniteError, match="transient fault"),
    ):
        trainer.step()


def test_no_blame_for_memory_that_nobody_reads(single_rank):
    """Autograd gets an uninitialized stand-in for what is in Megatron's buffer: a NaN."""
    trainer = small()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills such memory with NaN
    try:
        with (
            planted(coe_layers(trainer)[0].experts, nan_at, lambda number: number == 0),
            pytest.raises(NotFiniteError, match="transient fault"),
        ):
            trainer.step()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("clip_grad", [0.0, 100.0, 0.5])
def test_a_step_without_a_fault_is_megatrons_own(single_rank, clip_grad):
    """The same bits as `optimizer.step()`; where it clips, to the rounding of one product."""
    options = {"clip_grad": clip_grad, "lr_warmup_fraction": 0.0}
    ours, theirs = small(**options), small(**options)
    outcome = ours.step()
    count = theirs.source.num_microbatches(theirs.settings.global_batch_size)
    theirs.train_step.compute_gradients(theirs.source.training(0, count))
    _, norm, _ = theirs.train_state.optimizer.step()
    assert outcome.grad_norm == norm
    assert 0.5 < outcome.grad_norm < 100.0
    first, second = everything(ours), everything(theirs)
    if clip_grad == 0.5:
        torch.testing.assert_close(first["weights"], second["weights"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first["moments"], second["moments"], rtol=1e-5, atol=1e-12)
    else:
        assert same(first["weights"], second["weights"])
        assert same(first["moments"], second["moments"])


def test_biases_that_balance_are_put_back(single_rank):
    """Megatron moves them before the gradients' norm is known."""
    model = {
        "moe_router_enable_expert_bias": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.1,
    }
    settings = make_settings(train={"micro_batch_size": 2}, model=model)
    trainer = make_trainer(settings, torch.device("cpu"), Sequences(4))
    trainer.step()
    before = everything(trainer)
    assert any("expert_bias" in name and b.any() for name, b in before["buffers"].items())
    with (
        planted(coe_layers(trainer)[0].experts, nan_at, lambda number: True),
        pytest.raises(NotFiniteError),
    ):
        trainer.step()
    assert same(everything(trainer), before)
