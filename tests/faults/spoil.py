"""What the tables of malformed input do to the files of a case."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path], object]


def write(name: str, content: str | bytes) -> Make:
    data = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return make


def append(name: str, content: str) -> Make:
    def make(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(content)

    return make


def remove(name: str) -> Make:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: float) -> Make:
    """Truncate a file to a share of its size."""

    def make(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return make


def patch(name: str, offset: int, form: str, value: int) -> Make:
    """Overwrite a number in a file; a negative offset counts from its end."""

    def make(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        struct.pack_into(form, data, offset % len(data), value)
        (folder / name).write_bytes(data)

    return make


def edit_json(name: str, **changes: object) -> Make:
    """Set keys of a JSON file; None removes one."""

    def make(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return make


def also(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def folder_at(name: str) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)

    return make
