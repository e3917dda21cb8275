"""`train.lr_mult`: whose learning rate is multiplied, by how much, and after a resume."""

from __future__ import annotations

import pytest
import torch

from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.model.learning_rates import check_factors, lr_factor
from tests.builders import tiny_provider
from tests.unit.training.runs import make_settings, make_trainer, weights

FACTORS = {"*.router.*": 0.25, "*.router.1.*": 2.0, "embedding.*": 1.0}


def trainer_of(device, folder=None, *, distributed=False, **train):
    settings = make_settings(
        folder,
        model={"num_layers": 2},
        train={"clip_grad": 0.0, "lr_warmup_fraction": 0.25, "min_lr": 1e-3, **train},
        parallel={"use_distributed_optimizer": distributed},
    )
    return make_trainer(settings, device)


def test_the_last_pattern_that_matches_counts() -> None:
    names = ("a.router.0.weight", "a.router.1.weight", "embedding.b", "other")
    assert [lr_factor(name, FACTORS) for name in names] == [0.25, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("factors", "frozen", "told"),
    [
        ({"*.routers.*": 2.0}, [], r"train.lr_mult: '\*.routers.\*' matches no weight that is"),
        ({"*.router.*": 2.0}, ["*.router.*"], "matches no weight that is trained"),
        ({"*": 2.0}, [], "leaves no weight with train.lr itself"),
    ],
)
def test_factors_without_effect_are_refused(factors, frozen, told) -> None:
    with pytest.raises(ValueError, match=told):
        check_factors(tiny_provider(), factors, frozen)


def test_experts_go_by_their_modules_name() -> None:
    check_factors(tiny_provider(), {"decoder.layers.0.mlp.experts.linear_fc1.weight": 2.0})
    check_factors(tiny_provider(mtp_num_layers=1), {"mtp.layers.0.transformer_layer.*": 2.0})


@pytest.mark.parametrize("distributed", [False, True])
def test_the_whole_schedule_is_multiplied(single_rank, distributed) -> None:
    """Each step of the optimizer's own numbers, and the first update of the weights."""
    style = {"lr_decay_style": "cosine", "steps": 12, "distributed": distributed}
    plain = trainer_of(single_rank, **style)
    scaled = trainer_of(single_rank, lr_mult=FACTORS, **style)
    before = weights(plain)
    plain.step(), scaled.step()  # of a learning rate of 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(scaled).items())
    for _ in range(10):
        (lr,) = {group["lr"] for group in plain.train_state.optimizer.param_groups}
        rates = {group["lr"] for group in scaled.train_state.optimizer.param_groups}
        assert sorted(rates) == pytest.approx([0.25 * lr, lr, 2 * lr], rel=1e-12)
        plain.train_state.schedule.step(1), scaled.train_state.schedule.step(1)
    plain.step(), scaled.step()
    moved, other = weights(plain), weights(scaled)
    for name, tensor in before.items():
        factor = lr_factor(name.removeprefix("module."), FACTORS)
        expected = factor * (moved[name] - tensor)
        assert expected.abs().max() > 0
        torch.testing.assert_close(other[name] - tensor, expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_resumed_run_goes_the_same_way_or_that_of_new_factors(
    single_rank, tmp_path, distributed
) -> None:
    how = {"distributed": distributed, "lr_warmup_fraction": 0.0}
    run = trainer_of(single_rank, tmp_path, lr_mult=FACTORS, **how)
    run.step()
    run.save()
    run.step()
    expected, start = weights(run), None
    moved = {}
    for factors in (FACTORS, {**FACTORS, "*.router.0.*": 4.0}, {}):
        again = trainer_of(single_rank, tmp_path, lr_mult=factors, **how)
        again.progress = load_checkpoint(tmp_path / "step_00000001", again.train_state)
        start = weights(again)
        again.step()
        moved[len(factors)] = weights(again)
    assert all(torch.equal(moved[3][name], expected[name]) for name in expected)
    for name in (n for n in expected if ".router." in n):
        own = expected[name] - start[name]
        others = (16, 4) if ".router.0." in name else (1, 0.5)
        for count, times in zip((4, 0), others, strict=True):
            torch.testing.assert_close(
                moved[count][name] - start[name], times * own, rtol=1e-3, atol=1e-6
            )
