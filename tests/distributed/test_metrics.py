"""Figures of a step in every kind of layout, against one process: nothing twice, nothing left out.

Counts are exact; confidences and norms of gradients agree to fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.parity import (
    counted_near_ties,
    layout_settings,
    make_parity_trainer,
    setup_groups,
)

CASES = {
    "2 ranks": {
        "C=2": ("DP2", "TP2·EP2·ETP1·DO", "PP2·VPP2"),
        "recompute": ("TP2·ETP2",),
        "mtp": ("DP2·DO",),
        "tied": ("PP2",),
    },
    "2 ranks, more": {
        "C=2": ("TP2·ETP1", "CP2·EP2·DO·MB2"),
        "recompute": ("DP2",),
        "recomputed parts": ("EP2·MB4", "PP2"),
        "plain attention": ("TP2·EP1·ETP1", "PP2"),
        "mtp": ("TP2·ETP2", "PP2"),
        "tied": ("DP2", "TP2·ETP2·DO"),
        "upcycled": ("TP2·ETP1", "EP2·DO"),
    },
    "4 ranks": {
        "C=2": ("DP2·TP2·EP2·ETP1", "TP2·PP2·EP2·ETP1·DO", "PP2·EP2", "DP2·CP2·EP2·DO"),
        "C=3": ("TP2·CP2·ETP1", "TP2·EP2·ETP2", "DP2·PP2·VPP2·DO"),
        "tied": ("TP2·PP2·ETP1", "DP2·PP2·DO"),
    },
}
SETS = [next(iter(CASES)), *(pytest.param(name, marks=pytest.mark.slow) for name in [*CASES][1:])]
EXACT = ("load", "load_entropy", "load_max_over_mean", "dead_experts")


def measure_step(layout: str, variant: str) -> dict[str, float | list[float]]:
    """Of the first step; a collective of the layout's ranks."""
    with setup_groups(layout_settings(layout, variant)):
        trainer = make_parity_trainer(layout, variant)
        return trainer.metrics(trainer.step())


def measure(cases: dict[str, list[str]]) -> dict[str, dict]:
    """Runs on each rank."""
    return {
        f"{variant} {layout}": measure_step(layout, variant)
        for variant, layouts in cases.items()
        for layout in layouts
    }


@pytest.fixture(scope="module")
def alone(single_rank) -> Callable[[str], dict]:
    """The metrics of a variant on one process; no expert assignment depends on rounding."""

    @functools.cache
    def measured(variant: str) -> dict[str, float | list[float]]:
        with counted_near_ties() as ties:
            found = measure_step("", variant)
        assert sum(ties) == 0
        return found

    return measured


@pytest.mark.parametrize("cases", SETS)
def test_a_layout_reports_what_one_process_does(alone, cases) -> None:
    of_ranks = launch("tests.distributed.test_metrics:measure", int(cases[0]), CASES[cases])
    for variant, layouts in CASES[cases].items():
        for layout in layouts:
            for of_rank in of_ranks:
                _compare(of_rank[f"{variant} {layout}"], alone(variant), f"{variant} {layout}")


def _compare(found: dict, expected: dict, where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        kind = name.split("/")[0]
        if kind in EXACT:
            assert found[name] == value, f"{where}: {name}"
        elif kind in ("router_confidence", "balance", "grad_norm"):
            assert found[name] == pytest.approx(value, rel=1e-5), f"{where}: {name}"
    groups = [norm for name, norm in found.items() if name.startswith("grad_norm/")]
    total = torch.tensor(groups).double().norm().item()
    assert total == pytest.approx(found["grad_norm"], rel=1e-5), where


@pytest.mark.parametrize("variant", ["C=2", "C=3", "mtp", "tied"])
def test_every_token_was_counted(alone, variant) -> None:
    """Or the layouts could agree on too little."""
    loads = [value for name, value in alone(variant).items() if name.startswith("load/")]
    assert loads and all(len(load) == 8 for load in loads)
    for load in loads:
        assert sum(load) == pytest.approx(1, abs=1e-5)
        counts = [share * 16 * 16 * 2 for share in load]  # sequences, positions, K
        assert all(abs(count - round(count)) < 1e-3 for count in counts), load
