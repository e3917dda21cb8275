from __future__ import annotations

from pathlib import Path

import pytest

from megatron_coe.benchmark.scale import SCALES, preset_settings
from megatron_coe.benchmark.subjects import Bench, layer, step

PRESETS = Path(__file__).parents[3] / "examples/paper"


def make_bench(device, *variants: str) -> Bench:
    return Bench(
        presets=PRESETS,
        scale=SCALES["tiny"],
        device=device,
        rounds=2,
        warmup=0,
        clock="wall",
        profiles=0,
        variants=tuple((variant,) for variant in variants),
    )


@pytest.mark.parametrize("subject", [layer, step])
def test_a_setting_is_compared_with_itself_changed(single_rank, subject):
    bench = make_bench(
        single_rank, "model.coe_own_dispatchers=true", "model.coe_own_dispatchers=false"
    )
    outcome = subject(bench)
    names = [f"coe-2_4-64 model.coe_own_dispatchers={value}" for value in ("true", "false")]
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
