from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.scale import SCALES, preset_settings
from benchmarks.steps import build_step, share_memory
from benchmarks.suite import COE, MOE, Harness, layer, step

PRESETS = Path(__file__).parents[3] / "examples/paper"


def make_bench(device, *setting_variants: str) -> Harness:
    return Harness(
        presets=PRESETS,
        scale=SCALES["tiny"],
        device=device,
        rounds=2,
        warmup=0,
        clock="wall",
        profiles=0,
        setting_variants=tuple((variant,) for variant in setting_variants),
    )


DISPATCHERS = ("alltoall", "megatron_alltoall")


@pytest.mark.parametrize("benchmark", [layer, step])
def test_a_setting_is_compared_with_itself_changed(single_rank, benchmark):
    harness = make_bench(
        single_rank, *(f"model.moe_token_dispatcher_type={kind}" for kind in DISPATCHERS)
    )
    outcome = benchmark(harness)
    names = [f"coe-2_4-64 model.moe_token_dispatcher_type={kind}" for kind in DISPATCHERS]
    assert [row[0] for row in outcome.rows][:2] == names
    assert set(names) <= set(outcome.samples)
    assert all(len(row) == len(outcome.header) for row in outcome.rows)


def test_a_scale_changes_sizes_and_nothing_else(device):
    """The paper's scale is the preset; a smaller one keeps width, experts and their choice."""
    paper = preset_settings(PRESETS / "coe-2_4-64.yaml", SCALES["paper"])
    small = preset_settings(PRESETS / "coe-2_4-64.yaml", SCALES["cpu"], "train.seed=7")
    assert (paper.model["vocab_size"], paper.model["num_layers"]) == (102_400, 4)
    assert paper.train.global_batch_size * paper.model["seq_length"] == SCALES["paper"].tokens
    differing = {name for name in paper.model if paper.model[name] != small.model[name]}
    assert differing == {"num_layers", "vocab_size"}
    assert small.train.seed == 7
    for scale in (SCALES["paper"], SCALES["cpu"]):
        assert scale.vocab_size // scale.num_layers == 25_600


def test_steps_share_memory_and_no_gradients(single_rank):
    """Each variant's update is its own: of its own gradients, on the weights that all share."""
    harness = make_bench(single_rank)
    variants = [build_step(name, harness.settings(name), single_rank) for name in (COE, MOE)]
    share_memory(variants)
    of_coe, of_moe = (dict(variant.model.named_parameters()) for variant in variants)
    shared = {name for name in of_moe if of_coe[name].data_ptr() == of_moe[name].data_ptr()}
    assert set(of_moe) == shared
    assert set(of_coe) - shared == {"module.decoder.layers.0.mlp.router.1.weight"}
    expert = "module.decoder.layers.0.mlp.experts.linear_fc1.weight"
    assert of_coe[expert].main_grad.data_ptr() != of_moe[expert].main_grad.data_ptr()
    before = of_coe[expert].detach().clone()
    variants[0].trainer.step()  # the first has a learning rate of 0
    assert variants[0].trainer.step().grad_norm > 0
    between = of_moe[expert].detach().clone()
    assert not torch.equal(before, between)
    for _ in range(2):
        variants[1].trainer.step()
    assert not torch.equal(between, of_coe[expert].detach())
