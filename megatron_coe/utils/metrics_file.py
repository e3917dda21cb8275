"""A run's `metrics.jsonl`: one record a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_coe.utils.files import atomic_path

Record = dict[str, Any]
"""Metrics of a step by name: numbers, and the lists of numbers that `LISTS` are."""

LISTS = re.compile(r"load/.*")


def read_records(path: Path) -> list[Record]:
    """Read all records of a `metrics.jsonl`, in order of steps, one for each.

    What became known later than its step is in a line of its own, which joins the step's.

    Raises: ValueError naming file and line of a malformed record; OSError.
    """
    records: dict[int, Record] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                is_record = type(record["step"]) is int and all(
                    _is_metric(name, value) for name, value in record.items()
                )
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                is_record = False
            if not is_record:
                shown = line.strip()[:80].decode(errors="replace")
                raise ValueError(f"{path}:{number}: not a record of a run: {shown!r}")
            records[record["step"]] = records.get(record["step"], {}) | record
    return [records[step] for step in sorted(records)]


def _is_metric(name: str, value: object) -> bool:
    if LISTS.fullmatch(name):
        return isinstance(value, list) and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def drop_records_after(path: Path, step: int) -> list[Record]:
    """Drop the records of steps after `step`, and a last line that a crash cut short.

    Returns: the records dropped.

    Raises: OSError.
    """
    if not path.exists():
        return []
    kept, dropped = [], []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            is_later = record["step"] > step
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        if is_later:
            dropped.append(record)
        else:
            kept.append(line + b"\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return dropped
