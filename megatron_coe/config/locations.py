"""Settings that a run has written name its folders; moved, they name those that they lie in.

`--config` may be the `config.yaml` of a checkpoint or of a run's folder, which may have been moved,
copied or renamed since, or have been written with paths relative to another folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_coe.utils.run_files import (
    CONFIG_FILE,
    FORMAT_FILE,
    HF_FOLDER,
    MACHINE_FILE,
    TOKENIZER_FOLDER,
    own_tokenizer,
    step_of,
)

Sections = dict[str, dict[str, Any]]


def own_places(path: Path, written: Sections) -> Sections:
    """Return the settings that follow from the folder of a config file; none for most files.

    Args:
        written: the content of the file.
    """
    path = path.resolve()
    folder = path.parent
    if path.name != CONFIG_FILE:
        return {}
    if step_of(folder) is not None or (folder / FORMAT_FILE).is_file():
        return _of_checkpoint(folder, written)
    if (folder / MACHINE_FILE).is_file():
        return _of_run(folder, written)
    return {}


def run_folder(save: Path) -> Path:
    """Return the folder of a run by that of its checkpoints, which is `checkpoints` or the same."""
    return save.parent if save.name == "checkpoints" else save


def _of_checkpoint(step: Path, written: Sections) -> Sections:
    """Return the places of a run that begins in a checkpoint: its tokenizer, its own weights."""
    places: Sections = {"checkpoint": {"load": str(step)}}
    named = _text(written, "data", "tokenizer")
    if tokenizer := own_tokenizer(step) or _imported_tokenizer(step, named):
        places["data"] = {"tokenizer": str(tokenizer)}
    if step_of(step) is None:  # renamed: no longer one of the run's
        places["log"] = {"dir": f"runs/{step.name}"}
        places["checkpoint"]["save"] = f"runs/{step.name}/checkpoints"
    elif not _is_at(_text(written, "checkpoint", "save"), step.parent):
        places["log"] = {"dir": str(run_folder(step.parent))}
        places["checkpoint"]["save"] = str(step.parent)
    return places


def _of_run(folder: Path, written: Sections) -> Sections:
    before, save = _text(written, "log", "dir"), _text(written, "checkpoint", "save")
    if _is_at(before, folder):
        return {}
    places: Sections = {"log": {"dir": str(folder)}}
    if before and save and Path(save).is_relative_to(before):
        places["checkpoint"] = {"save": str(folder / Path(save).relative_to(before))}
    return places


def _imported_tokenizer(step: Path, named: str) -> Path | None:
    """Return the tokenizer beside a model that an earlier version imported, if it is that one."""
    beside = step.parent / HF_FOLDER / TOKENIZER_FOLDER
    is_named = Path(named).parts[-2:] == (HF_FOLDER, TOKENIZER_FOLDER)
    return beside if is_named and beside.is_dir() else None


def _text(written: Sections, section: str, name: str) -> str:
    """Return a text of the settings; empty where there is none, or something else."""
    values = written.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, str) else ""


def _is_at(named: str, folder: Path) -> bool:
    return bool(named) and Path(named).resolve() == folder
