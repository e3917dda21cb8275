"""Figures of a step in every kind of layout, against one process: nothing twice, nothing left out.

Counts are exact; confidences and norms of gradients agree to fp32.
"""

from __future__ import annotations

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
    2: {
        "C=2": ("DP2", "TP2·ETP1", "TP2·EP2·ETP1·DO", "PP2·VPP2", "CP2·EP2·DO·MB2"),
        "recompute": ("DP2", "TP2·ETP2"),
        "recomputed parts": ("EP2·MB4", "PP2"),
        "plain attention": ("TP2·EP1·ETP1", "PP2"),
        "mtp": ("TP2·ETP2", "PP2", "DP2·DO"),
        "tied": ("DP2", "PP2", "TP2·ETP2·DO"),
        "upcycled": ("TP2·ETP1", "EP2·DO"),
    },
    4: {
        "C=2": ("DP2·TP2·EP2·ETP1", "TP2·PP2·EP2·ETP1·DO", "PP2·EP2", "DP2·CP2·EP2·DO"),
        "C=3": ("TP2·CP2·ETP1", "TP2·EP2·ETP2", "DP2·PP2·VPP2·DO"),
        "tied": ("TP2·PP2·ETP1", "DP2·PP2·DO"),
    },
}
ALL = [
    (world, variant, layout)
    for world, of_world in CASES.items()
    for variant, layouts in of_world.items()
    for layout in layouts
]
EXACT = ("load", "load_entropy", "load_max_over_mean", "dead_experts")


def figures(layout: str, variant: str) -> dict[str, float | list[float]]:
    """Of the first step; a collective of the layout's ranks."""
    with setup_groups(layout_settings(layout, variant)):
        trainer = make_parity_trainer(layout, variant)
        return trainer.figures(trainer.step())


def measure(cases: dict[str, list[str]]) -> dict[str, dict]:
    """Runs on each rank."""
    return {
        f"{variant} {layout}": figures(layout, variant)
        for variant, layouts in cases.items()
        for layout in layouts
    }


@pytest.fixture(scope="module")
def alone(single_rank) -> dict[str, dict]:
    """What one process reports of each variant; no choice hangs on rounding."""
    variants = {variant for _, variant, _ in ALL}
    with counted_near_ties() as ties:
        found = {variant: figures("", variant) for variant in sorted(variants)}
    assert sum(ties) == 0
    return found


@pytest.fixture(scope="module", params=CASES)
def ranks(request) -> dict[str, list[dict]]:
    """What each rank of a world reports, by case."""
    of_ranks = launch("tests.distributed.test_metrics:measure", request.param, CASES[request.param])
    return request.param, of_ranks


def test_a_layout_reports_what_one_process_does(alone, ranks) -> None:
    world, of_ranks = ranks
    for _, variant, layout in (case for case in ALL if case[0] == world):
        expected = alone[variant]
        for found in (of_rank[f"{variant} {layout}"] for of_rank in of_ranks):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                kind, where = name.split("/")[0], f"{variant} {layout}: {name}"
                if kind in EXACT:
                    assert found[name] == value, where
                elif kind in ("router_confidence", "balance", "grad_norm"):
                    assert found[name] == pytest.approx(value, rel=1e-5), where
            groups = [norm for name, norm in found.items() if name.startswith("grad_norm/")]
            total = torch.tensor(groups).double().norm().item()
            assert total == pytest.approx(found["grad_norm"], rel=1e-5), f"{variant} {layout}"


def test_every_token_was_counted(alone) -> None:
    """Or the layouts could agree on too little."""
    for variant, found in alone.items():
        loads = [value for name, value in found.items() if name.startswith("load/")]
        assert loads and all(len(load) == 8 for load in loads), variant
        for load in loads:
            assert sum(load) == pytest.approx(1, abs=1e-5)
            counts = [share * 16 * 16 * 2 for share in load]  # sequences, positions, K
            assert all(abs(count - round(count)) < 1e-3 for count in counts), (variant, load)
