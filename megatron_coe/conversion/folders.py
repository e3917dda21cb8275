"""New folders, and the JSON in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_coe.conversion.hf_config import Config

HF_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def check_absent(folder: Path) -> None:
    """Check that `folder` is new or empty.

    Raises: ValueError if it would be overwritten.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: give a new folder")


def read_json(path: Path) -> Config:
    """Read a JSON object.

    Raises: ValueError for a file that is not JSON or not an object; OSError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object")
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object with sorted keys."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
