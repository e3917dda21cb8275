"""Variants match in what their experiment says they match in, at any scale."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from experiments.claims import MemorySaving
from experiments.data import Data
from experiments.plans import EXPERIMENTS, MEMORY, Variant
from experiments.scales import PAPER, SCALES, TINY, Scale
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.planning.memory import rank_memory
from megatron_coe.planning.run_summary import plan_of

DATA = Data.at(Path("data"))
PAIRS = [(scale, experiment) for scale in SCALES.values() for experiment in EXPERIMENTS.values()]


@cache  # the tests read the same few hundred settings, and change none
def settings_of(scale: Scale, variant: Variant, seed: int = 1) -> Settings:
    return scale.settings_of(variant, seed, Path("runs") / variant.name, DATA, [])


def models(scale: Scale, experiment: str):
    """The variants' models, by name."""
    return {
        variant.name: build_provider(settings_of(scale, variant), torch.device("cpu"))
        for variant in EXPERIMENTS[experiment].variants
    }


def passes(model) -> int:
    """Experts that a token passes through in a layer, shared ones included."""
    shared = model.moe_shared_expert_intermediate_size is not None
    return model.coe_iterations * (model.moe_router_topk + shared)


def names_and_figures(text) -> set[str]:
    """What a claim is about."""
    contrasts = [text.first, text.second] if hasattr(text, "first") else [text]
    if isinstance(text, MemorySaving):
        return {text.variant, text.than}
    return {name for contrast in contrasts for name in contrast.weights}


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda e: e.name)
def test_claims_are_about_the_variants(experiment):
    variants = [variant.name for variant in experiment.variants]
    assert len(set(variants)) == len(variants)
    named = set.union(*(names_and_figures(claim) for claim in experiment.claims))
    assert named == set(variants)
    assert set(experiment.reported) <= set(variants)
    assert any(not claim.control for claim in experiment.claims)


@pytest.mark.parametrize(("scale", "experiment"), PAIRS, ids=lambda x: x.name)
def test_variants_of_a_seed_differ_by_their_model_alone(scale, experiment):
    """So data, their order, steps and learning rate are the same."""
    described = []
    for variant in experiment.variants:
        settings = asdict(settings_of(scale, variant, seed=7))
        del settings["model"], settings["log"]["dir"], settings["checkpoint"]["save"]
        described.append(settings)
    assert all(settings == described[0] for settings in described)
    assert described[0]["train"]["seed"] == 7
    assert [*described[0]["data"]["train"]] == ["data/train"]
    if scale is PAPER:
        assert described[0]["train"]["steps"] == (
            10_000 if experiment.name == "iterations" else 1000
        )


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_main_variants_are_as_large_and_the_controls_work_as_much(scale):
    main = models(scale, "main")
    size = main["moe_8-64"]
    router = size.num_layers * 63 * size.hidden_size
    assert main["coe-2_4-64"].num_params() - size.num_params() == router
    assert main["coe-2_3-64"].num_params() - main["moe_7-64"].num_params() == router
    assert {name: passes(model) for name, model in main.items()} == {
        "moe_8-64": 9,
        "coe-2_4-64": 10,
        "moe_7-64": 8,
        "coe-2_3-64": 8,
    }
    S = size.seq_length
    more = main["coe-2_3-64"].flops_per_token(S) - main["moe_7-64"].flops_per_token(S)
    assert more == 6 * router  # the second router, and nothing else


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_fair_compares_with_the_standard_moe(scale):
    fair = models(scale, "fair")
    for one, other in (("moe_8-64_outer", "coe-2_4-64"), ("moe_7-64_outer", "coe-2_3-64")):
        size = fair[one]
        assert (size.coe_iterations, size.coe_residual) == (1, "outer")
        router = size.num_layers * 63 * size.hidden_size
        assert fair[other].num_params() - size.num_params() == router
    assert passes(fair["moe_7-64_outer"]) == passes(fair["coe-2_3-64"]) == 8
    (saving,) = (c for c in EXPERIMENTS["fair"].claims if isinstance(c, MemorySaving))
    assert (saving.variant, saving.than) == ("coe-2_4-48", "moe_8-64_outer")
    decides = [claim for claim in EXPERIMENTS["fair"].claims if not claim.control]
    assert all("moe_8-64" not in c.variants and "moe_7-64" not in c.variants for c in decides)


def test_a_part_of_an_experiment_keeps_the_claims_about_it():
    part = EXPERIMENTS["fair"].restricted(["coe-2_4-64", "moe_8-64_outer"])
    assert [variant.name for variant in part.variants] == ["moe_8-64_outer", "coe-2_4-64"]
    assert "less memory" not in part.claim
    (claim,) = part.claims
    assert dict(claim.weights) == {"coe-2_4-64": 1, "moe_8-64_outer": -1}
    for names, told in ((["coe"], "--variants coe: fair has"), (["moe_8-64"], "no claim")):
        with pytest.raises(ValueError, match=told):
            EXPERIMENTS["fair"].restricted(names)


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_other_variants_match_as_named(scale):
    compute = {name: passes(model) for name, model in models(scale, "compute").items()}
    assert compute == {"moe_24-64": 25, "moe_16-64": 17, "coe-2_8-64": 18}
    memory = models(scale, "memory")
    assert {n: m.num_moe_experts + 1 for n, m in memory.items()} == {
        "moe_8-64": 64,
        "moe_8-48": 48,
        "coe-2_4-48": 48,
    }
    layers = [model.num_layers for model in models(scale, "layers").values()]
    assert layers == [3 * layers[-1], 2 * layers[-1], layers[-1]]
    for model in models(scale, "dense").values():
        assert model.moe_router_topk == model.num_moe_experts
    shared = models(scale, "shared")
    experts = [
        m.num_moe_experts + bool(m.moe_shared_expert_intermediate_size) for m in shared.values()
    ]
    assert experts == [64] * 4
    assert [passes(model) for model in shared.values()] == [9, 8, 10, 8]
    residual = [passes(model) for model in models(scale, "residual").values()]
    assert residual == [10, 10, 10, 9, 9]


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
@pytest.mark.parametrize(
    ("experiment", "changes"),
    [
        ("residual", {"coe_residual", "coe_iterations", "moe_router_topk"}),
        ("iterations", {"coe_iterations"}),
        ("ablation", {"coe_residual", "coe_independent_gate", "coe_iterations"}),
    ],
)
def test_variants_differ_in_nothing_else(scale, experiment, changes):
    described = []
    for variant in EXPERIMENTS[experiment].variants:
        model = dict(settings_of(scale, variant).model)
        described.append({key: value for key, value in model.items() if key not in changes})
    assert all(model == described[0] for model in described)
    C = [model.coe_iterations for model in models(scale, experiment).values()]
    assert {"residual": [2, 2, 2, 1, 1], "iterations": [1, 2, 3, 4], "ablation": [2] * 5 + [1]}[
        experiment
    ] == C


def test_smaller_models_keep_the_papers_counts_and_are_small():
    paper, tiny = models(PAPER, "main"), models(TINY, "main")
    for name, model in tiny.items():
        for key in ("coe_iterations", "moe_router_topk", "num_moe_experts", "coe_residual"):
            assert getattr(model, key) == getattr(paper[name], key)
        assert model.num_params() < 5_000_000


def test_the_papers_memory_is_counted_as_its_authors_do():
    """Their figures, in what they call GB; the paper's 17.6% for the smaller number of experts."""
    state = {}
    for variant in (*EXPERIMENTS["layers"].variants, *MEMORY.variants):
        settings = settings_of(PAPER, variant)
        provider = build_provider(settings, torch.device("cpu"))
        memory = rank_memory(plan_of(provider, settings.parallel, settings.train, 1, on_gpu=True))
        state[variant.name] = memory.weights + memory.gradients + memory.optimizer
    for name, reported in EXPERIMENTS["layers"].reported.items():
        assert state[name] / 2**30 == pytest.approx(float(reported.split()[0]), rel=0.01)
    assert 1 - state["coe-2_4-48"] / state["moe_8-64"] == pytest.approx(0.176, abs=0.002)
