"""The canary of hostile cases, and the check that nothing touched it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.faults.commands import Case
from tests.faults.payloads import Call


def canary(folder: Path) -> Path:
    """The file that every payload of a case touches."""
    return folder / "canary"


def call(folder: Path) -> Call:
    """A payload for the caller to pickle."""
    return Call(os.system, (f"touch {canary(folder)}",))


@dataclass(frozen=True)
class HostileCase(Case):
    """A command line on hostile input: it may print several lines, but must execute nothing."""

    lines: int | None = None

    def check(self, folder: Path) -> str | None:
        return "the payload was executed" if canary(folder).exists() else None
