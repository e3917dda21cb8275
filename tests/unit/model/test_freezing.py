from __future__ import annotations

import pytest
import torch

from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.model.freezing import check_patterns, is_frozen
from tests.builders import tiny_provider
from tests.unit.training.runs import make_settings, make_trainer, weights

CASES = {
    "routers": (["*.router.*"], lambda name: ".router." in name),
    "experts": (["*.experts.*"], lambda name: ".experts." in name),
    "all but iteration scales": (
        ["*", "!*.coe_weights.*"],
        lambda name: ".coe_weights." not in name,
    ),
    "a layer": (["decoder.layers.1.*"], lambda name: name.startswith("decoder.layers.1.")),
}
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_the_last_pattern_that_matches_decides() -> None:
    patterns = ["*", "!*.router.*", "*.router.1.*"]
    names = ("a.experts.b", "a.router.0.weight", "a.router.1.weight")
    assert [is_frozen(name, patterns) for name in names] == [True, False, True]
    assert not is_frozen("a", [])


def test_patterns_without_effect_or_rest_are_refused() -> None:
    model = tiny_provider()
    with pytest.raises(ValueError, match=r"train.freeze: '\*.routers.\*' matches no weight"):
        check_patterns(model, ["*.routers.*"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        check_patterns(model, ["*"])
    with pytest.raises(ValueError, match="of some layers alone"):
        check_patterns(model, ["decoder.layers.1.*"])
    check_patterns(tiny_provider(num_layers=2, moe_layer_freq=[1, 1]), ["decoder.layers.1.*"])
    check_patterns(model, ["*", "!*.router.*"])


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_stay_and_the_others_train_as_without(
    single_rank, tmp_path, case: str, recompute: bool, distributed: bool
) -> None:
    patterns, is_meant = CASES[case]
    model = {"coe_upcycled": True, "coe_residual": "outer", "num_layers": 2}
    model |= RECOMPUTED if recompute else {}
    model |= {"moe_layer_freq": [1, 1]} if case == "a layer" else {}
    parallel = {"use_distributed_optimizer": distributed}

    def trainer_of(folder=None, **train):
        train = {"lr_warmup_fraction": 0.0, "clip_grad": 0.0, **train}
        settings = make_settings(folder, model=model, train=train, parallel=parallel)
        return make_trainer(settings, single_rank)

    free = trainer_of()
    frozen = trainer_of(tmp_path, freeze=patterns)
    before = weights(frozen)
    free.step(), frozen.step()
    after, without = weights(frozen), weights(free)
    chunk = frozen.train_state.chunks[0]
    for name, parameter in chunk.named_parameters():
        is_frozen_one = is_meant(name.removeprefix("module."))
        assert hasattr(parameter, "main_grad") is not is_frozen_one, name
        same = torch.equal(after[name], before[name])
        assert same is is_frozen_one, name
        if not is_frozen_one:  # the first step's gradients do not depend on what is frozen
            torch.testing.assert_close(after[name], without[name], rtol=0, atol=0)
    trained = sum(p.numel() for p in chunk.parameters() if p.requires_grad)
    states = [s for part in frozen.train_state.optimizer.chained_optimizers
              for s in part.optimizer.state.values()]  # fmt: skip
    moments = sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in states)
    assert moments == 2 * trained

    frozen.save()
    frozen.step()
    again = trainer_of(tmp_path, freeze=patterns)
    again.progress = load_checkpoint(tmp_path / "step_00000001", again.train_state)
    again.step()
    resumed, expected = weights(again), weights(frozen)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
