"""Claims about variants of an experiment, each with its criterion, stated beforehand.

A claim about losses is a linear contrast of the variants' validation losses, seed by seed (variants
of a seed read the same sequences in the same order), and a bound. It holds if the 95% interval of
the mean contrast is below the bound, fails if it is above, and is undecided otherwise. Claims are
judged one by one, without a correction for multiple comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from megatron_coe.analysis.intervals import Interval

MARGIN = 1 / 60
"""The largest difference that counts as none, as a share of the reference's loss: a quarter of the
gain in the paper's main experiment (1.20 to 1.12)."""

MEMORY_TOLERANCE = 0.03
"""The largest shortfall of a saving from the paper's, as a share of the larger model's memory."""


class Verdict(Enum):
    HOLDS = "holds"
    FAILS = "does not hold"
    UNKNOWN = "cannot be told at this size"


@dataclass(frozen=True)
class Results:
    """The measured losses and memory of an experiment's variants."""

    losses: Mapping[str, Sequence[float]]
    """Last validation losses, nats per token, by variant; seeds in the same order for all."""
    state: Mapping[str, int]
    """Bytes of weights, gradients and optimizer state on a rank, by variant."""
    memory: Mapping[str, int]
    """Bytes of these, activations and workspace on a rank, by variant."""


@dataclass(frozen=True)
class Finding:
    """The judgment of a claim."""

    claim: str
    criterion: str
    measured: str
    verdict: Verdict
    control: bool
    figures: dict[str, object] = field(default_factory=dict)


class Claim(Protocol):
    """A statement that results decide."""

    @property
    def text(self) -> str: ...

    @property
    def control(self) -> bool:
        """Whether it only helps to understand the paper's claims and has no part in the verdict."""
        ...

    @property
    def variants(self) -> set[str]:
        """Names of the variants that it is about."""
        ...

    def judge(self, results: Results) -> Finding:
        """Judge the claim by its criterion."""
        ...


@dataclass(frozen=True)
class Contrast:
    """The claim that a weighted sum of the variants' losses is below a bound.

    Attributes:
        text: the claim.
        weights: of each variant's loss in the sum.
        reference: the variant whose loss times `MARGIN` is the bound; None: the bound is 0.
        control: see `Claim`.
    """

    text: str
    weights: Mapping[str, float]
    reference: str | None = None
    control: bool = False

    @property
    def variants(self) -> set[str]:
        return set(self.weights)

    def values(self, results: Results) -> list[float]:
        """Return the contrast of each seed."""
        losses = [results.losses[variant] for variant in self.weights]
        weights = self.weights.values()
        return [
            sum(weight * loss for weight, loss in zip(weights, of_seed, strict=True))
            for of_seed in zip(*losses, strict=True)
        ]

    def judge(self, results: Results) -> Finding:
        """Judge by the 95% interval of the mean contrast."""
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
        """The weighted sum, in words of the variants."""
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
    """Make the claim that the loss of a variant is lower than another's."""
    return Contrast(text, {variant: 1, than: -1}, control=control)


def no_worse(text: str, variant: str, than: str, control: bool = False) -> Contrast:
    """Make the claim that a variant's loss exceeds another's by less than `MARGIN`."""
    return Contrast(text, {variant: 1, than: -1}, reference=than, control=control)


@dataclass(frozen=True)
class Mixed:
    """The claim that two contrasts have different signs: each interval on its side of 0."""

    text: str
    first: Contrast
    second: Contrast
    control: bool = False

    @property
    def variants(self) -> set[str]:
        return self.first.variants | self.second.variants

    def judge(self, results: Results) -> Finding:
        """Judge by the 95% intervals of both contrasts."""
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
    """The claim that a variant's training state is smaller than another's by the paper's share.

    The state is weights, gradients and optimizer state. It is what the authors' numbers count:
    their 11.70, 20.21 and 28.71 GB for 4, 8 and 12 layers are 16 bytes per parameter, in GiB.
    """

    text: str
    variant: str
    than: str
    share: float
    control: bool = False

    @property
    def variants(self) -> set[str]:
        return {self.variant, self.than}

    def judge(self, results: Results) -> Finding:
        """Judge by the saved share of the state, within `MEMORY_TOLERANCE`."""
        saved, in_all = (
            1 - sizes[self.variant] / sizes[self.than] for sizes in (results.state, results.memory)
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
    """Return the verdict of an experiment: fails if a claim fails, holds if all hold."""
    verdicts = [finding.verdict for finding in findings if not finding.control]
    if Verdict.FAILS in verdicts:
        return Verdict.FAILS
    return Verdict.UNKNOWN if Verdict.UNKNOWN in verdicts else Verdict.HOLDS


def _describe(interval: Interval) -> str:
    if interval.low == -float("inf"):
        return f"{interval.mean:+.4f}, of one seed: no spread"
    ends = f"{interval.low:+.4f} … {interval.high:+.4f}"
    return f"{interval.mean:+.4f} ± {interval.deviation:.4f}, interval {ends}"
