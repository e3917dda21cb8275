"""A run's `metrics.jsonl`: one record a line, in order of steps."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

Record = dict[str, float | list[float]]
"""Metrics of a step by name: numbers, and the lists of numbers that `LISTS` are."""

LISTS = re.compile(r"load/.*")


def read_records(path: Path) -> list[Record]:
    """All records of a metrics.jsonl; ValueError names file and line of a broken one."""
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                is_record = type(record["step"]) is int and all(
                    _is_figure(name, value) for name, value in record.items()
                )
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                is_record = False
            if not is_record:
                shown = line.strip()[:80].decode(errors="replace")
                raise ValueError(f"{path}:{number}: not a record of a run: {shown!r}")
            records.append(record)
    return records


def _is_figure(name: str, value: object) -> bool:
    if LISTS.fullmatch(name):
        return isinstance(value, list) and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def drop_records_after(path: Path, step: int) -> None:
    """Keeps the records up to and including `step`; a last line cut short by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        kept.append(line + b"\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
