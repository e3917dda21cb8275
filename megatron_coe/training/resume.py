"""Which checkpoint a run goes on from: the newest that is good, if the settings still fit it."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_coe.checkpoints.agreement import check_together
from megatron_coe.checkpoints.errors import BadCheckpointError
from megatron_coe.checkpoints.folder import (
    CONFIG_FILE,
    LATEST_FILE,
    doubts_about_pointer,
    find_checkpoints,
    restore,
    step_of,
)
from megatron_coe.checkpoints.trust import read_common
from megatron_coe.checkpoints.verify import check_checkpoint, strange_files
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.training.resume_policy import DATA, changes, data_change, tokenizer_change
from megatron_coe.training.settings import CheckpointSettings, Settings, load_settings


def choose_checkpoint(
    options: CheckpointSettings, must_resume: bool = False, mend: bool = True
) -> Path | None:
    """The newest good checkpoint of a run's folder; None where none was ever written.

    A collective of all ranks, which share the reading. Each that is not good is named on stderr.

    Args:
        must_resume: there has to be one.
        mend: put back what a run that was killed while it replaced a checkpoint left aside.

    Raises:
        ValueError: none of those that are there is good; the run does not start over by itself.
    """
    if options.save is None:
        if must_resume:
            raise ValueError("checkpoint.save=null: there is no checkpoint to start from")
        return None
    folder = Path(options.save)
    found, doubts = _look(folder, mend=mend and not must_resume)
    if doubts:
        _say(doubts)
    for path in found:
        try:
            part = partial(check_checkpoint, path, options.verify)
            check_together(partial(part, dist.get_rank(), dist.get_world_size()))
            if options.verify and (strange := strange_files(path)):
                _say(strange)
            return path
        except BadCheckpointError as error:
            _say(f"checkpoint {path} is {error.verdict} and not used: {error}")
    if found:
        raise ValueError(
            f"checkpoint.save={folder}: none of its {len(found)} checkpoints is good; to start "
            "over from step 0, give another folder or move this one away"
        )
    if doubts:
        raise ValueError(
            f"checkpoint.save={folder}: its checkpoints are gone; to start over from step 0, "
            f"remove {folder / LATEST_FILE}"
        )
    if must_resume:
        raise ValueError(f"checkpoint.save={folder}: holds no complete checkpoint to start from")
    return None


def check_changes(
    path: Path,
    settings: Settings,
    tokenizer: Tokenizer,
    data: list[dict[str, Any]] | None = None,
    model_only: bool = False,
) -> list[str]:
    """Compare a checkpoint's settings, tokenizer and training data with the present ones.

    Args:
        data: what identifies the training sets; None: only their paths are compared.
        model_only: only what makes the model matters, because nothing is trained.

    Returns: changes that are allowed and worth saying.

    Raises: ValueError naming each change that is refused.
    """
    before = load_settings(path / CONFIG_FILE)
    model_only = model_only or step_of(path) == 0
    found = changes(before, settings, model_only)
    recorded = read_common(path).get("data")  # older checkpoints have none
    if data and recorded and not model_only:
        found = [change for change in found if change.key != DATA]
        if change := data_change(recorded, data):
            found.append(change)
    if change := tokenizer_change(path, tokenizer):
        found.append(change)
    accepted = set(settings.checkpoint.accept_changes)
    refused = [change for change in found if change.is_refused and change.key not in accepted]
    if refused:
        keys = ",".join(change.key for change in refused)
        raise ValueError(
            f"checkpoint {path} was made with other settings: {'; '.join(map(str, refused))}. Set "
            "back what was changed, or give another checkpoint.save to start anew; a change that "
            f"is meant is accepted by checkpoint.accept_changes='[{keys}]'"
        )
    return [str(change) for change in found]


def _look(folder: Path, mend: bool) -> tuple[list[Path], str | None]:
    """What rank 0 sees, on every rank: others may see an older state of a network's disk."""
    seen: list[tuple[list[Path], str | None] | str | None] = [None]
    if dist.get_rank() == 0:
        if mend:
            with suppress(OSError):  # of a folder that cannot be changed, but can be read
                restore(folder)
        try:
            found = find_checkpoints(folder)
            seen = [(found, doubts_about_pointer(folder, found))]
        except OSError as error:
            seen = [f"checkpoint.save={folder}: cannot be read ({error.strerror})"]
    dist.broadcast_object_list(seen)
    if not isinstance(seen[0], tuple):
        raise ValueError(seen[0])
    return seen[0]


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)
