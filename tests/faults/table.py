"""The outcomes of the injected faults, as one Markdown table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_coe.utils.tables import markdown_table


@dataclass(frozen=True)
class Outcome:
    """One injected fault."""

    kind: str
    """The row that it belongs to."""
    name: str
    """What was injected, with all that is needed to repeat it."""
    failures: tuple[str, ...] = ()
    """What went wrong; empty: survived, or caught."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    """What is counted over the row, such as where the fault occurred."""


@dataclass
class Row:
    """One kind of fault."""

    kind: str
    injected: int = 0
    caught: int = 0
    detail: str = ""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def rows(outcomes: Iterable[Outcome]) -> list[Row]:
    """A row per kind, in the order in which they first appear."""
    table: dict[str, Row] = {}
    notes: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        row = table.setdefault(outcome.kind, Row(outcome.kind))
        row.injected += 1
        row.caught += not outcome.failures
        row.seconds += outcome.seconds
        row.failures += [f"{outcome.name}: {failure}" for failure in outcome.failures]
        notes.setdefault(outcome.kind, Counter()).update(outcome.notes)
    for kind, counted in notes.items():
        table[kind].detail = ", ".join(f"{n} {note}" for note, n in sorted(counted.items()))
    return list(table.values())


def render(table: Iterable[Row]) -> str:
    """The table, and below it every fault that was missed."""
    header = ("kind", "injected", "caught or survived", "seconds", "of which")
    rows: list[tuple[str, ...]] = []
    failures: list[str] = []
    injected = caught = 0
    for row in table:
        seconds = f"{row.seconds:.0f}"
        rows.append((row.kind, str(row.injected), str(row.caught), seconds, row.detail))
        failures += [f"- MISSED {row.kind}: {failure}" for failure in row.failures]
        injected, caught = injected + row.injected, caught + row.caught
    rows.append(("**all**", f"**{injected}**", f"**{caught}**", "", ""))
    return "\n".join([markdown_table(header, rows), *(["", *failures] if failures else [])])
