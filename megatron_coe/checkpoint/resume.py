"""Selection of the checkpoint that a run starts from: its own latest, or the weights of another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_coe.checkpoint.collective import check_on_all_ranks
from megatron_coe.checkpoint.directory import (
    check_latest,
    find_checkpoints,
    resolve_checkpoint,
    restore_replaced,
)
from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.resume_policy import DATA, changes, data_change, tokenizer_change
from megatron_coe.checkpoint.safe_unpickle import read_common
from megatron_coe.checkpoint.verify import unlisted_files, verify_checkpoint
from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import CheckpointSettings, Settings
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.utils.ranks import call_on_rank_0, log_rank_0
from megatron_coe.utils.run_files import CONFIG_FILE, LATEST_FILE, step_of

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from."""

    path: Path
    weights_only: bool
    """The run starts at step 0 with these weights, instead of resuming."""
    skipped: Path | None = None
    """`checkpoint.load`, if the run resumes from one of its own checkpoints instead."""

    def __str__(self) -> str:
        if self.weights_only:
            return f"from the weights of {self.path} and step 0"
        return f"resumed from {self.path}"


def select_start(
    options: CheckpointSettings, must_resume: bool = False, repair: bool = True
) -> Start | None:
    """Select the checkpoint that a run starts from. A collective of all ranks.

    Args:
        options: `save` is the run's own folder, `load` a checkpoint whose weights it starts from.
        must_resume, repair: see `latest_valid_checkpoint`.

    Returns: the run's latest valid checkpoint, else that of `load`; None: initial weights.

    Raises: ValueError: as `latest_valid_checkpoint`; or `options.load` is no valid checkpoint.
    """
    own = latest_valid_checkpoint(
        options, must_resume and options.load is None, repair and not must_resume
    )
    if options.load is None:
        return Start(own, weights_only=False) if own else None
    load = Path(options.load)
    if own:
        is_same = load.resolve() in (own.resolve(), own.parent.resolve())
        return Start(own, weights_only=False, skipped=None if is_same else load)
    path = _from_rank_0(f"checkpoint.load={load}", partial(resolve_checkpoint, load))
    try:
        _verify(path, options.verify)
    except BadCheckpointError as error:
        raise ValueError(f"checkpoint.load={path} is {error.verdict}: {error}") from error
    return Start(path, weights_only=True)


def latest_valid_checkpoint(
    options: CheckpointSettings, must_resume: bool = False, repair: bool = True
) -> Path | None:
    """Select the latest valid checkpoint of a run's folder; None if none was ever written.

    A collective of all ranks, which share the reading. Each invalid one is named on stderr.

    Args:
        must_resume: it is an error if there is none.
        repair: first rename checkpoints back that a run killed during a replacement left aside.

    Raises:
        ValueError: there are checkpoints, and none is valid; the run does not start over by itself.
    """
    if options.save is None:
        if must_resume:
            raise ValueError("checkpoint.save=null: there is no checkpoint to start from")
        return None
    folder = Path(options.save)
    found, problem = _from_rank_0(
        f"checkpoint.save={folder}", partial(_find, folder, repair=repair and not must_resume)
    )
    if problem:
        log_rank_0(problem)
    for path in found:
        try:
            _verify(path, options.verify)
            return path
        except BadCheckpointError as error:
            log_rank_0(f"checkpoint {path} is {error.verdict} and not used: {error}")
    if found:
        raise ValueError(
            f"checkpoint.save={folder}: none of its {len(found)} checkpoints is valid; to start "
            "over from step 0, give another folder or move this one away"
        )
    if problem:
        raise ValueError(
            f"checkpoint.save={folder}: its checkpoints are gone; to start over from step 0, "
            f"remove {folder / LATEST_FILE}"
        )
    if must_resume:
        raise ValueError(f"checkpoint.save={folder}: holds no complete checkpoint to start from")
    return None


def _verify(path: Path, verify: bool) -> None:
    """Verify a checkpoint, all ranks together. Raises: BadCheckpointError."""
    part = partial(verify_checkpoint, path, verify)
    check_on_all_ranks(partial(part, dist.get_rank(), dist.get_world_size()))
    if verify and (warning := unlisted_files(path)):
        log_rank_0(warning)


def check_changes(
    path: Path,
    settings: Settings,
    tokenizer: Tokenizer,
    data: list[dict[str, Any]] | None = None,
    model_only: bool = False,
) -> list[str]:
    """Compare a checkpoint's settings, tokenizer and training data with the present ones.

    Args:
        path: of the checkpoint.
        settings, tokenizer: the present ones.
        data: what identifies the present training sets; None: only their paths are compared.
        model_only: compare only what the model depends on, because nothing is trained.

    Returns: the changes to print; they are allowed.

    Raises: ValueError naming each change that is refused.
    """
    before = load_settings(path / CONFIG_FILE)
    step = step_of(path) or 0
    model_only = model_only or step == 0
    found = changes(before, settings, model_only, step)
    recorded = read_common(path).get("data")  # older checkpoints have none
    if data and recorded and not model_only:
        found = [change for change in found if change.key != DATA]
        if change := data_change(recorded, data):
            found.append(change)
    if change := tokenizer_change(path, tokenizer):
        found.append(change)
    accepted = set(settings.checkpoint.allow_config_changes)
    refused = [change for change in found if change.is_refused and change.key not in accepted]
    if refused:
        keys = ",".join(change.key for change in refused)
        raise ValueError(
            f"checkpoint {path} was made with other settings: {'; '.join(map(str, refused))}. Set "
            "back what was changed, or give another checkpoint.save to start over; a change that "
            f"is meant is accepted by checkpoint.allow_config_changes='[{keys}]'"
        )
    return [str(change) for change in found]


def _find(folder: Path, repair: bool) -> tuple[list[Path], str | None]:
    if repair:
        with suppress(OSError):  # of a folder that cannot be changed, but can be read
            restore_replaced(folder)
    found = find_checkpoints(folder)
    return found, check_latest(folder, found)


def _from_rank_0(what: str, look: Callable[[], T]) -> T:
    """Return what rank 0 sees, on every rank: others may see an older state of a network disk.

    Raises: ValueError on every rank, for an error on rank 0.
    """
    try:
        return call_on_rank_0(look)
    except OSError as error:
        raise ValueError(f"{what}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
