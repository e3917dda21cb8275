"""The targets of a GPU in four minutes: each part in processes of its own, the shortest way.

A part that fails, or for which no time is left, costs its own rows of the table only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.against import PEAK, Comparison, Document, Side, compare, figures_of, run_side
from benchmarks.report import write_processes
from benchmarks.timing import TOTAL, Spread

COE, MOE = "coe-2_4-64", "moe_8-64"

MATCHED = ("matched", "experts", "head", "host_syncs")
"""Benchmarks that need no other side."""

TE_MODEL = ("model.backend=auto",)
FP8_MODEL = ("model.backend=te", "model.num_moe_experts=64", "model.fp8_recipe=delayed")
"""FP8 pads to multiples of 16, and Transformer Engine shares 64 experts better than 63."""


@dataclass
class Quick:
    """The parts of `--quick`, what they found, and why others found nothing."""

    here: Path
    common: Sequence[str]
    """Arguments of every process: scale, sizes, rounds, overrides."""
    against: Path | None
    te_path: Path | None
    seconds: float
    output: Path | None
    """JSON file, written after every part: an hour on a borrowed GPU may end at any time."""
    figures: dict[str, Spread] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Part -> why it has no figures."""
    documents: dict[str, list[Document]] = field(default_factory=dict)

    def run(self) -> None:
        """Run all parts, the most important first, until the time is over."""
        self._deadline = time.monotonic() + self.seconds
        self._part("against", self._against if self.against else "give --against DIR")
        self._part("this commit", self._alone)
        self._part("deterministic", self._deterministic)
        te = "give --te-path DIR, a folder with Transformer Engine"
        self._part("te", self._te if self.te_path else te)
        self._part("fp8", self._fp8 if self.te_path else te)

    def _part(self, name: str, work: Callable[[], None] | str) -> None:
        if isinstance(work, str):
            self.missing[name] = work
        elif self._left() <= 0:
            self.missing[name] = f"no time was left of {self.seconds:.0f} s"
        else:
            began = time.monotonic()
            try:
                work()
            except ValueError as error:
                self.missing[name] = str(error)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            if self.output:
                write_processes(self.output, self.documents)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _against(self) -> None:
        assert self.against is not None
        other = Side(self.against.name, self.against)
        found = self._compare("against", other, self._this(), "step", "memory", turns=2)
        ratios = found.ratios()
        for name, figure in ((COE, "against coe"), (MOE, "against moe")):
            self.figures[figure] = ratios["step", name, TOTAL]
        self.figures["against memory"] = ratios["memory", COE, PEAK]
        for _, document in found.pairs:
            self._take(document)

    def _alone(self) -> None:
        wanted = MATCHED if "step" in self.figures else (*MATCHED, "step")
        self._take(self._run("this commit", self._this(), *wanted))

    def _deterministic(self) -> None:
        document = self._run(
            *("deterministic", self._this(), "step"), *("--vary", "train.deterministic=off,on")
        )
        plain, deterministic = _medians(document, "step")
        self.figures["deterministic"] = Spread.of([plain / deterministic])

    def _te(self) -> None:
        found = self._compare("te", self._this(), self._with_te(), *_vary(TE_MODEL), turns=2)
        (ratio,) = found.ratios().values()
        self.figures["te"] = ratio.inverse()

    def _fp8(self) -> None:
        varied = ("--vary", "model.fp8=null,hybrid")
        document = self._run("fp8", self._with_te(), "step", *varied, "--set", *FP8_MODEL)
        bf16, fp8 = _medians(document, "step")
        self.figures["fp8"] = Spread.of([bf16 / fp8])

    def _this(self) -> Side:
        return Side("this commit", self.here)

    def _with_te(self) -> Side:
        assert self.te_path is not None
        return Side("with Transformer Engine", self.here, (self.te_path,))

    def _run(self, part: str, side: Side, *what: str) -> Document:
        document = run_side(side, ["--what", *what, *self.common], self.here, self._left())
        self.documents.setdefault(part, []).append(document)
        return document

    def _compare(self, part: str, other: Side, this: Side, *what: str, turns: int) -> Comparison:
        arguments = ["--what", *what, *self.common]
        found = compare(other, this, arguments, self.here, turns, self._left())
        self.documents[part] = [document for pair in found.pairs for document in pair]
        self.tables.append(found.markdown())
        return found

    def _take(self, document: Document) -> None:
        """Take a document's own ratios, and the time of 1,000 steps by its median."""
        for outcome in document["outcomes"]:
            for name, spread in outcome["figures"].items():
                self.figures[name] = Spread(**spread)
        step = figures_of(document).get(("step", COE, TOTAL))
        if step is not None:
            self.figures["long"] = Spread.of([1000 * step])


def _vary(overrides: Sequence[str]) -> list[str]:
    """Return the arguments that time a step of CoE-2(4/64) alone, with these settings."""
    return ["step", *(word for override in overrides for word in ("--vary", override))]


def _medians(document: Document, benchmark: str) -> list[float]:
    """Return the medians of a benchmark's variants, in their order."""
    return [value for key, value in figures_of(document).items() if key[0] == benchmark]
