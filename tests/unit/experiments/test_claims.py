"""Verdicts, against values worked out by hand."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch

from experiments.claims import (
    MARGIN,
    Contrast,
    MemorySaving,
    Mixed,
    Results,
    Verdict,
    lower,
    no_worse,
    overall,
)
from experiments.measure import Sizes
from experiments.plans import RESIDUAL, Experiment, Variant
from experiments.report import Outcome, table, table_csv, verdict, verdict_json
from megatron_coe.analysis import intervals
from megatron_coe.analysis.intervals import Interval, spread

HOLDS, FAILS, UNKNOWN = Verdict.HOLDS, Verdict.FAILS, Verdict.UNKNOWN


def results(**losses: list[float]) -> Results:
    return Results(losses, {}, {})


def test_an_interval_by_hand():
    interval = Interval.of([-0.1, -0.2, -0.3])
    assert interval.mean == pytest.approx(-0.2)
    assert interval.deviation == pytest.approx(0.1)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (interval.low, interval.high) == (
        pytest.approx(-0.2 - half, abs=1e-4),
        pytest.approx(-0.2 + half, abs=1e-4),
    )
    assert spread([-0.1, -0.2, -0.3]) == "-0.2000 ± 0.1000"


def test_one_value_says_nothing_of_its_spread():
    interval = Interval.of([0.5])
    assert (interval.mean, interval.low, interval.high) == (0.5, -math.inf, math.inf)
    assert math.isnan(interval.deviation) and spread([0.5]) == "0.5000 ± ?"


@pytest.mark.parametrize("df", range(1, 31))
def test_quantiles_are_students(df):
    """P(|T| < t) by the trapezium rule over T = sqrt(df) tan(a), whose density is cos(a)^(df-1)."""
    t = intervals._T[df - 1]
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    density = torch.cos(angle) ** (df - 1)
    inside = angle <= math.atan(t / math.sqrt(df))
    share = torch.trapezoid(density[inside], angle[inside]) / torch.trapezoid(density, angle)
    assert share == pytest.approx(0.95, abs=2e-4)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = random.Random(3)
    covered = 0
    for _ in range(2000):
        values = [generator.gauss(0.3, 2.0) for _ in range(3)]
        interval = Interval.of(values)
        covered += interval.low < 0.3 < interval.high
    assert 0.93 < covered / 2000 < 0.97


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.1, -0.11, -0.09], HOLDS),  # -0.1 ± 0.025
        ([0.1, 0.11, 0.09], FAILS),
        ([-0.1, -0.2, -0.0], UNKNOWN),  # -0.1 ± 0.248
        ([-5.0], UNKNOWN),
    ],
)
def test_lower_is_decided_by_pairs(differences, verdict):
    bases = [3.0, 5.0, 1.0][: len(differences)]  # seeds differ far more than variants
    variants = [base + difference for base, difference in zip(bases, differences, strict=True)]
    finding = lower("", "a", "b").judge(results(a=variants, b=bases))
    assert finding.verdict is verdict
    assert finding.figures["values"] == pytest.approx(differences)
    assert finding.figures["bound"] == 0


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.5, HOLDS), (0.99, UNKNOWN), (1.5, FAILS), (-9.0, HOLDS)]
)
def test_no_worse_allows_a_sixtieth(difference, verdict):
    base = [1.2, 1.2, 1.2]  # the margin is 0.02
    variant = [1.2 + 0.02 * difference + noise for noise in (-0.001, 0.0, 0.001)]
    finding = no_worse("", "a", "b").judge(results(a=variant, b=base))
    assert finding.verdict is verdict
    assert finding.figures["bound"] == pytest.approx(0.02) == pytest.approx(1.2 * MARGIN)
    assert "0.0200" in finding.criterion


def test_a_contrast_of_gains():
    diminishing = Contrast("", {"c2": 2, "c1": -1, "c3": -1})
    losses = results(c1=[2.0, 2.1, 1.9], c2=[1.5, 1.61, 1.39], c3=[1.3, 1.4, 1.2])
    # Gains: 0.5, 0.49, 0.51 of the second, then 0.2, 0.21, 0.19.
    assert diminishing.values(losses) == pytest.approx([-0.3, -0.28, -0.32])
    assert diminishing.judge(losses).verdict is HOLDS
    assert diminishing.formula == "2 * c2 - c1 - c3"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(-1, 1, HOLDS), (1, -1, HOLDS), (1, 1, FAILS), (-1, -1, FAILS), (0, 1, UNKNOWN)],
)
def test_mixed_wants_two_signs(first, second, verdict):
    noise = [-0.1, 0.0, 0.1]
    mixed = Mixed("", lower("", "a", "zero"), lower("", "b", "zero"))
    losses = results(a=[first + x for x in noise], b=[second + x for x in noise], zero=[0.0] * 3)
    assert mixed.judge(losses).verdict is verdict


@pytest.mark.parametrize(
    ("bytes_", "verdict"), [(80, HOLDS), (85, HOLDS), (90, UNKNOWN), (100, FAILS), (110, FAILS)]
)
def test_memory_is_saved_as_the_paper_says(bytes_, verdict):
    claim = MemorySaving("", "small", "large", share=0.176)
    assert (
        claim.judge(
            Results({}, {"small": bytes_, "large": 100}, {"small": 99, "large": 200})
        ).verdict
        is verdict
    )


def test_controls_do_not_decide():
    held = lower("", "a", "b").judge(results(a=[0.0, 0.01], b=[9.0, 9.0]))
    failed = lower("", "b", "a", control=True).judge(results(a=[0.0, 0.01], b=[9.0, 9.0]))
    unknown = lower("", "a", "b").judge(results(a=[0.0], b=[9.0]))
    assert (held.verdict, failed.verdict, unknown.verdict) == (HOLDS, FAILS, UNKNOWN)
    assert overall([held, failed]) is HOLDS
    assert overall([held, unknown]) is UNKNOWN
    against = lower("", "b", "a").judge(results(a=[0.0, 0.01], b=[9.0, 9.0]))
    assert overall([held, unknown, against]) is FAILS


def outcome(losses: dict[str, list[float]]) -> Outcome:
    experiment = Experiment(
        "it",
        "A is better.",
        (Variant("a", "A(1/2)"), Variant("b", "B(1/2)")),
        (lower("So.", "a", "b"),),
    )
    sizes = {name: Sizes(2_000_000, 1_000_000, 3_000_000, 10, 1 << 20, 1 << 21) for name in losses}
    seeds = range(1, len(losses["a"]) + 1)
    return Outcome(experiment, "tiny", seeds, sizes, {}, losses)


def test_what_is_written():
    held = outcome({"a": [1.0, 1.1], "b": [2.0, 2.1]})
    assert "| A(1/2) | 2.000 M | 1.000 M | 3.00 | 1.0 | 2.0 | 1.0000 | 1.1000 |" in table(held)
    lines = table_csv(held).splitlines()
    assert lines[0].endswith("loss_seed_1,loss_seed_2,loss_mean,loss_std")
    mean, deviation = (float(cell) for cell in lines[1].split(",")[-2:])
    assert (mean, deviation) == (pytest.approx(1.05), pytest.approx(statistics.stdev([1.0, 1.1])))
    assert verdict(held).startswith("**holds**: A is better.")
    assert json.loads(verdict_json(held))["claims"][0]["verdict"] == "holds"


def test_of_one_seed_json_stays_json():
    text = verdict_json(outcome({"a": [1.0], "b": [2.0]}))
    told = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert told["verdict"] == "cannot be told at this size"
    assert told["claims"][0]["figures"]["low"] is None


def test_a_tie_is_no_order():
    losses = {variant.name: [1.0, 1.0, 1.0] for variant in RESIDUAL.variants}
    findings = [claim.judge(Results(losses, {}, {})) for claim in RESIDUAL.claims]
    assert overall(findings) is UNKNOWN
