"""Names of the files and folders that a run and its checkpoints consist of.

    <run>/config.yaml               the settings of the latest start
    <run>/machine.json              what that ran on
    <run>/metrics.jsonl             the metrics, one record a line
    <run>/hf/step_<step>/           an exported checkpoint (`checkpoint.hf_interval`)
    <run>/checkpoints/latest        name of the newest checkpoint, for people and scripts
    <run>/checkpoints/step_<step>/  a checkpoint (see `megatron_coe.checkpoint`)

The module is light to import.
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_FILE = "config.yaml"
MACHINE_FILE = "machine.json"
METRICS_FILE = "metrics.jsonl"
LATEST_FILE = "latest"
EXPORTS_FOLDER = "hf"

# In a checkpoint.
COMMON_FILE = "common.pt"
FORMAT_FILE = "metadata.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_FOLDER = "tokenizer"
DOCUMENTS_FILE = "documents.json"
HF_FOLDER = "hf"

_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for another name."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def own_tokenizer(step: Path) -> Path | None:
    """Return a checkpoint's copy of its tokenizer, for `load_tokenizer`; None if it has none."""
    if (step / TOKENIZER_FOLDER).is_dir():
        return step / TOKENIZER_FOLDER
    return step / TOKENIZER_MODEL if (step / TOKENIZER_MODEL).is_file() else None
