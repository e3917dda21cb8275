"""Claims about variants of an experiment, with the criterion that decides each, stated beforehand.

A claim about losses is a linear contrast of the variants' validation losses, seed by seed (variants
of a seed read the same sequences in the same order), and a bound. It holds where the 95% interval
of the mean contrast lies below the bound, does not hold where it lies above, and
cannot be told at this size otherwise. Several claims are judged one by one, without a correction
for their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from megatron_coe.analysis.intervals import Interval

MARGIN = 1 / 60
"""What counts as no difference, as a share of the reference's loss: a quarter of the gain that the
paper's main experiment shows (1.20 to 1.12)."""

MEMORY_TOLERANCE = 0.03
"""By how much of the larger model's memory a saving may fall short of the paper's."""


class Verdict(Enum):
    HOLDS = "holds"
    FAILS = "does not hold"
    UNKNOWN = "cannot be told at this size"


@dataclass(frozen=True)
class Results:
    """What the variants of an experiment came to."""

    losses: Mapping[str, Sequence[float]]
    """Last validation losses, nats per token, by variant and, in the same order for all, seed."""
    state: Mapping[str, int]
    """Bytes of weights, gradients and optimizer on a rank, by variant."""
    memory: Mapping[str, int]
    """Of these, activations and workspace together."""


@dataclass(frozen=True)
class Finding:
    """What was found of a claim."""

    claim: str
    criterion: str
    measured: str
    verdict: Verdict
    control: bool
    figures: dict[str, object] = field(default_factory=dict)


class Claim(Protocol):
    """Something that results decide."""

    @property
    def text(self) -> str: ...

    @property
    def control(self) -> bool:
        """Measured beside the paper's claims, to understand them; no part of the verdict."""
        ...

    def judge(self, results: Results) -> Finding: ...


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of the variants' losses lies below a bound.

    Attributes:
        weights: of each variant's loss in the sum.
        reference: the variant of whose loss `MARGIN` is taken as bound; None: the bound is 0.
    """

    text: str
    weights: Mapping[str, float]
    reference: str | None = None
    control: bool = False

    def values(self, results: Results) -> list[float]:
        """Return the contrast of each seed."""
        losses = [results.losses[variant] for variant in self.weights]
        weights = self.weights.values()
        return [
            sum(weight * loss for weight, loss in zip(weights, of_seed, strict=True))
            for of_seed in zip(*losses, strict=True)
        ]

    def judge(self, results: Results) -> Finding:
        values, bound = self.values(results), 0.0
        if self.reference is not None:
            reference = results.losses[self.reference]
            bound = MARGIN * sum(reference) / len(reference)
        interval = Interval.of(values)
        verdict = Verdict.UNKNOWN
        if interval.high < bound:
            verdict = Verdict.HOLDS
        elif interval.low > bound:
            verdict = Verdict.FAILS
        return Finding(
            self.text,
            f"95% interval of {self.formula} below {self._bound_text(bound)}",
            f"{_describe(interval)}; seeds: {', '.join(f'{value:+.4f}' for value in values)}",
            verdict,
            self.control,
            {"values": values, "bound": bound, **vars(interval)},
        )

    @property
    def formula(self) -> str:
        text = ""
        for variant, weight in self.weights.items():
            times = "" if abs(weight) == 1 else f"{abs(weight):g} * "
            text += f" {'-' if weight < 0 else '+'} {times}{variant}"
        return text.removeprefix(" + ")

    def _bound_text(self, bound: float) -> str:
        if self.reference is None:
            return "0"
        return f"{bound:.4f} (a sixtieth of the loss of {self.reference})"


def lower(text: str, variant: str, than: str, control: bool = False) -> Contrast:
    """State the claim that the loss of a variant is lower than another's."""
    return Contrast(text, {variant: 1, than: -1}, control=control)


def no_worse(text: str, variant: str, than: str, control: bool = False) -> Contrast:
    """State the claim that a variant's loss exceeds another's by no more than `MARGIN`."""
    return Contrast(text, {variant: 1, than: -1}, reference=than, control=control)


@dataclass(frozen=True)
class Mixed:
    """Two contrasts have different signs: each interval lies wholly on its side of 0."""

    text: str
    first: Contrast
    second: Contrast
    control: bool = False

    def judge(self, results: Results) -> Finding:
        intervals = [Interval.of(c.values(results)) for c in (self.first, self.second)]
        signs = [(i.low > 0) - (i.high < 0) for i in intervals]
        verdict = Verdict.UNKNOWN
        if all(signs):
            verdict = Verdict.HOLDS if signs[0] != signs[1] else Verdict.FAILS
        formulas = [contrast.formula for contrast in (self.first, self.second)]
        named = zip(formulas, intervals, strict=True)
        return Finding(
            self.text,
            f"95% intervals of {formulas[0]} and of {formulas[1]} on different sides of 0",
            "; ".join(f"{formula}: {_describe(interval)}" for formula, interval in named),
            verdict,
            self.control,
            {formula: vars(i) for formula, i in zip(formulas, intervals, strict=True)},
        )


@dataclass(frozen=True)
class MemorySaving:
    """The state of a variant in training is smaller than another's, by the share the paper names.

    State: weights, gradients and optimizer. It is what the authors' figures count: their 11.70,
    20.21 and 28.71 GB for 4, 8 and 12 layers are 16 bytes for each parameter, in GiB.
    """

    text: str
    variant: str
    than: str
    share: float
    control: bool = False

    def judge(self, results: Results) -> Finding:
        saved, in_all = (
            1 - of_variant[self.variant] / of_variant[self.than]
            for of_variant in (results.state, results.memory)
        )
        less, more = (results.state[name] / 2**20 for name in (self.variant, self.than))
        verdict = Verdict.UNKNOWN
        if saved >= self.share - MEMORY_TOLERANCE:
            verdict = Verdict.HOLDS
        elif saved <= 0:
            verdict = Verdict.FAILS
        return Finding(
            self.text,
            f"weights, gradients and optimizer of {self.variant} take at least "
            f"{self.share - MEMORY_TOLERANCE:.1%} less than those of {self.than} (the paper: "
            f"{self.share:.1%}); does not hold if they take no less",
            f"{saved:.1%} less: {less:,.1f} MiB, not {more:,.1f}; with activations {in_all:.1%} "
            "less",
            verdict,
            self.control,
            {"saved": saved, "saved_with_activations": in_all},
        )


def overall(findings: Sequence[Finding]) -> Verdict:
    """Return an experiment's verdict, that of its claims; a failed one decides for all."""
    verdicts = [finding.verdict for finding in findings if not finding.control]
    if Verdict.FAILS in verdicts:
        return Verdict.FAILS
    return Verdict.UNKNOWN if Verdict.UNKNOWN in verdicts else Verdict.HOLDS


def _describe(interval: Interval) -> str:
    if interval.low == -float("inf"):
        return f"{interval.mean:+.4f}, of one seed: no spread"
    ends = f"{interval.low:+.4f} … {interval.high:+.4f}"
    return f"{interval.mean:+.4f} ± {interval.deviation:.4f}, interval {ends}"
