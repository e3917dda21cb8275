"""Every parallel layout computes the same model: loss and each gradient, against one process.

Measured in fp64, where they agree to 1e-9 and mostly to 1e-14; a forgotten or doubled sum over a
group shows as 0.1 or more. `parity.py` has what is run, `make parity` writes the whole table.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.distributed import parity
from tests.distributed.launch import launch
from tests.distributed.layouts import ITERATIONS, WORLDS, every_setting
from tests.distributed.parity_table import measure

TOLERANCE = 1e-9
WITH_LOSSES_IN_FP32 = {"mtp": 2e-6}
STEPS, FIRST_STEP, LATER_STEPS = 20, 1e-6, 1e-4

# One launch per number of ranks, which takes most of the time: hence many layouts in each.
CORE = {
    2: [
        "DP2·MB4, C=3",
        "DP2·DO·OVERLAP, C=2",
        "TP2·ETP1, C=2",
        "TP2·ETP1·DO·MB4, plain attention",
        "TP2·ETP1·MB4, one query group",
        "TP2·ETP2·MB4, bias",
        "TP2·EP2·ETP1·DO·MB4, C=3",
        "PP2·MB4, plain attention",
        "PP2·VPP2·DO·MB4, C=2",
        "EP2·DO·MB4, bias",
        "EP2·MB4, allgather",
        "CP2·MB4, C=3",
        "CP2·EP2·DO·MB4, plain attention",
        "CP2·MB4, bias",
        "TP2·ETP1·MB4, recompute",
        "TP2·EP2·ETP1·MB4, recomputed parts",
        "CP2·DO·MB4, recomputed experts",
        "EP2·DO·MB4, shared expert overlapped",
        "TP2·ETP2·MB4, shared expert overlapped",
        "DP2·DO·OVERLAP·MB4, C=3",
        "PP2·VPP2·OVERLAP·MB4, C=3",
        "TP2·ETP1·MB4, upcycled",
        "TP2·EP2·ETP1·DO·MB4, upcycled",
        "PP2·MB4, upcycled",
        "CP2·EP2·MB4, upcycled",
        "TP2·ETP1·MB4, mtp",
        "PP2·DO·MB4, mtp",
        "CP2·MB4, mtp",
        "TP2·ETP1·MB4, linear",
        "PP2·VPP2·DO·MB4, linear",
        "TP2·ETP1·MB4, linear mtp",
        "CP2·DO·OVERLAP·MB4, linear mtp",
        "TP2·ETP1, documents",
        "TP2·EP2·ETP1·DO, documents plain",
        "PP2·VPP2, documents",
        "CP2·EP2, documents",
        "CP2, documents plain",
    ],
    4: [
        "TP2·ETP1·DO, C=2",
        "TP2·EP2·ETP2·MB4, C=2",
        "TP2·CP2·ETP1·MB4, C=2",
        "PP4·MB4, C=1",
        "EP4·DO, C=3",
        "CP2·EP2, C=2",
        "CP2·EP4·DO·MB4, bias",
        "TP2·PP2·EP2·ETP1·MB4, C=2",
    ],
}
ALL = {
    world: [f"{name}, {iterations}" for layout in layouts for name in every_setting(layout, world)
            for iterations in ITERATIONS]
    for world, layouts in WORLDS.items()
}  # fmt: skip
TRAINED = ["DP2", "TP2·ETP1", "PP2·VPP2", "EP2·DO", "CP2"]


def split(cases: list[str]) -> list[list[str]]:
    return [case.split(", ") for case in cases]


@pytest.fixture(scope="module")
def references(single_rank, tmp_path_factory) -> str:
    """What one process computes, for every variant of the model."""
    folder = tmp_path_factory.mktemp("references")
    parity.write_references(list(parity.VARIANTS), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def core(references) -> dict[str, list[float]]:
    return {
        case: errors
        for world_size, cases in CORE.items()
        for case, errors in measure(split(cases), world_size, references).items()
    }


def test_there_is_something_to_compare(references):
    """Each tensor has a gradient well above rounding, and the auxiliary loss is in the routers'."""
    for variant in parity.VARIANTS:
        gradients = torch.load(os.path.join(references, f"{variant}.pt"), weights_only=True)[
            "gradients"
        ]
        assert any("router" in name for name in gradients)
        for chosen, part in (("bias", "expert_bias"), ("upcycled", "coe_weights"), ("mtp", "mtp.")):
            assert variant != chosen or any(part in name for name in gradients)
        for name, gradient in gradients.items():
            assert gradient.isfinite().all() and gradient.abs().max() > 1e-4, name


def test_output_layer_and_loss_in_one_compute_what_all_logits_do(references):
    """In fp64, where the other references are of plain cross-entropy."""
    linear, logits = (
        torch.load(os.path.join(references, f"{variant}.pt"), weights_only=True)
        for variant in ("linear", "C=2")
    )
    assert linear["loss"] == pytest.approx(logits["loss"], rel=1e-12)
    for name, gradient in logits["gradients"].items():
        gap = (linear["gradients"][name] - gradient).abs().max()
        assert gap <= 1e-12 * gradient.abs().max(), name


@pytest.mark.parametrize("case", [case for cases in CORE.values() for case in cases])
def test_a_layout_computes_what_one_process_does(core, case):
    loss, gradients = core[case]
    tolerance = WITH_LOSSES_IN_FP32.get(case.split(", ")[1], TOLERANCE)
    assert loss < tolerance and gradients < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_layout_computes_what_one_process_does(references, world_size):
    errors = measure(split(ALL[world_size]), world_size, references)
    worse = {case: pair for case, pair in errors.items() if not max(pair) < TOLERANCE}
    assert not worse and len(errors) == len(ALL[world_size])


@pytest.mark.slow
def test_training_in_fp32_stays_together(single_rank):
    alone = parity.train("", "C=2", STEPS)
    assert alone[-1] < alone[0] - 0.1, "it learns"
    ranks = launch("tests.distributed.parity:trained", 2, TRAINED, "C=2", STEPS, timeout_s=1200)
    for layout, losses in ranks[0].items():
        assert losses[0] == pytest.approx(alone[0], rel=FIRST_STEP), layout
        assert losses == pytest.approx(alone, rel=LATER_STEPS), layout
