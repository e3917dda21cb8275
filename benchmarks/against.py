"""Benchmarks of several checkouts, or of one in several environments, in alternating processes.

Two commits cannot be imported into one process, so each runs the benchmarks in processes of its
own, on the same device: A B B A A B B A …, which cancels a drift of the machine's speed to first
order. Ratios are formed of neighbors: the median of one process over that of the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.timing import TOTAL, Spread
from megatron_coe.utils.tables import markdown_table

PEAK = "peak"
TOOL = Path("tools/benchmark.py")

Document = dict[str, Any]
"""What `--output` writes."""

Figures = dict[tuple[str, str, str], float]
"""(benchmark, variant, what) -> the median of its seconds, or the bytes of its peak memory."""


@dataclass(frozen=True)
class Side:
    """A checkout and the folders before all others on its path."""

    name: str
    checkout: Path
    path: tuple[Path, ...] = ()

    def environment(self, here: Path) -> dict[str, str]:
        """Return the environment of its processes; `here` is the checkout of this process."""
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        kept = [entry for entry in inherited if entry and Path(entry).resolve() != here]
        path = [str(self.checkout), *map(str, self.path), *kept]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run_side(side: Side, arguments: Sequence[str], here: Path, timeout: float | None) -> Document:
    """Run a side's benchmarks in a process of its own.

    Args:
        arguments: of its `tools/benchmark.py`, without `--output`.
        here: the checkout of this process, which is not on the path of another's.
        timeout: seconds; None: no limit.

    Raises:
        ValueError: it fails, or takes longer; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-W", "ignore", str(TOOL), *arguments, "--output", str(output)]
        try:
            result = subprocess.run(
                command,
                cwd=side.checkout,
                env=side.environment(here),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{side.name}: took more than {timeout:.0f} s") from None
        if result.returncode:
            told = "\n".join(result.stdout.strip().splitlines()[-5:])
            raise ValueError(f"{side.name}: status {result.returncode}: {told}")
        return json.loads(output.read_text(encoding="utf-8"))


def figures_of(document: Document) -> Figures:
    """Return the median seconds of every variant, and the peaks of the benchmark `memory`."""
    found: Figures = {}
    for outcome in document["outcomes"]:
        # Before version 0.2.0 a benchmark was called a subject.
        benchmark = outcome.get("benchmark") or outcome["subject"]
        for variant, parts in outcome["samples"].items():
            found[benchmark, variant, TOTAL] = median(parts[TOTAL])
        for variant, sizes in outcome["details"].items() if benchmark == "memory" else ():
            found[benchmark, variant, PEAK] = sizes[PEAK]
    return found


@dataclass(frozen=True)
class Comparison:
    """The documents of two sides, a pair for each turn: (the other's, this one's)."""

    names: tuple[str, str]
    pairs: tuple[tuple[Document, Document], ...]

    def ratios(self) -> dict[tuple[str, str, str], Spread]:
        """Return this side's figures over the other's, of what both have measured."""
        pairs = [(figures_of(other), figures_of(this)) for other, this in self.pairs]
        common = [key for key in pairs[0][0] if all(key in side for pair in pairs for side in pair)]
        return {key: Spread.of([this[key] / other[key] for other, this in pairs]) for key in common}

    def markdown(self) -> str:
        """Render a row for each figure: both medians over the turns, and the ratio's spread."""
        sides = [
            [figures_of(document) for document in side] for side in zip(*self.pairs, strict=True)
        ]
        rows = []
        for key, ratio in self.ratios().items():
            shown = [_shown(key[2], median(figures[key] for figures in side)) for side in sides]
            rows.append([*key[:2], *shown, ratio.text()])
        other, this = self.names
        return markdown_table(["benchmark", "variant", other, this, f"{this} / {other}"], rows)


def _shown(what: str, value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if what == PEAK else f"{value:.4f} s"


def compare(
    other: Side, this: Side, arguments: Sequence[str], here: Path, turns: int, timeout: float | None
) -> Comparison:
    """Run both sides' benchmarks `turns` times, in alternating processes.

    Raises:
        ValueError: as `run_side`.
    """
    pairs = []
    for turn in range(turns):
        order = (other, this) if turn % 2 == 0 else (this, other)
        documents = {side.name: run_side(side, arguments, here, timeout) for side in order}
        pairs.append((documents[other.name], documents[this.name]))
    return Comparison((other.name, this.name), tuple(pairs))
