"""Model, machine and files of a run, checked before its process groups are made.

Each process looks for itself, so that a mistake is one message and not a rank that others wait for.
A dry run makes the same checks by the same function.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import DataSettings, Settings
from megatron_coe.config.validation import num_microbatches, smallest_world_size, world_size
from megatron_coe.data.datasets import check_datasets
from megatron_coe.data.fast_tokenizer import export_warning
from megatron_coe.data.indexed import IndexedFile
from megatron_coe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_coe.model import backends
from megatron_coe.model.backends.select import refuse_unusable
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.training.metrics_logger import check_wandb
from megatron_coe.utils.environment import refuse_unused_gpus
from megatron_coe.utils.ranks import is_rank_0
from megatron_coe.utils.run_files import METRICS_FILE


@dataclass(frozen=True)
class Preflight:
    """What the checks of a run have loaded and found valid."""

    device: torch.device
    tokenizer: Tokenizer
    provider: CoEModelProvider
    files: list[IndexedFile]
    """The training sets."""
    warnings: list[str]
    """What a user may not know of and should; empty on ranks other than 0."""


def check_run(settings: Settings, saves: bool = True, dry: bool = False) -> Preflight:
    """Check everything about a run that one process can see.

    Args:
        saves: whether the run writes checkpoints.
        dry: nothing is left behind.

    Raises: ValueError, OSError naming the setting or the file.
    """
    idle_gpus = refuse_unused_gpus()
    check_wandb(settings.log)
    device = backends.prepare()
    tokenizer = load_tokenizer(settings.data.tokenizer)
    provider = build_provider(settings, device, tokenizer.vocab_size)
    refuse_unusable(provider)
    files = check_files(settings, tokenizer, provider.seq_length, saves, dry)
    warnings = [idle_gpus] if idle_gpus else []
    if is_rank_0():
        warnings += _warnings(settings, tokenizer, provider)
    return Preflight(device, tokenizer, provider, files, warnings)


def _warnings(settings: Settings, tokenizer: Tokenizer, provider: CoEModelProvider) -> list[str]:
    warnings = [export_warning(tokenizer)]
    kinds = provider.moe_router_load_balancing_type
    # A dry run may be of more processes than there are.
    ranks = max(world_size(), smallest_world_size(settings.parallel))
    count = num_microbatches(settings.parallel, settings.train, ranks)
    if "global_aux_loss" in ([kinds] if isinstance(kinds, str) else kinds) and count > 1:
        warnings.append(
            f"model.moe_router_load_balancing_type={kinds}: with {count} micro-batches per step "
            "global_aux_loss counts those of a step so far, as Megatron defines it, and not the "
            "global batch; a larger train.micro_batch_size comes nearer to that"
        )
    return [warning for warning in warnings if warning]


def training_sets(data: DataSettings) -> list[str]:
    """Return the prefixes that training reads: those whose weight is not 0."""
    weights = data.train_weights or [1.0] * len(data.train)
    return [prefix for prefix, weight in zip(data.train, weights, strict=True) if weight]


def data_arguments(settings: Settings, tokenizer: Tokenizer, seq_length: int) -> dict[str, Any]:
    """Return the arguments of `check_datasets` and `build_datasets`."""
    data, train = settings.data, settings.train
    sources: list[Any] = data.train
    if data.train_weights is not None:
        sources = list(zip(data.train, data.train_weights, strict=True))
    return {
        "train": sources,
        "valid": data.valid,
        "tokenizer": tokenizer,
        "seq_length": seq_length,
        "mode": data.mode,
        "num_samples": (train.steps * train.global_batch_size, train.eval_samples),
        "seed": train.seed,
    }


def check_files(
    settings: Settings,
    tokenizer: Tokenizer,
    seq_length: int,
    saves: bool = True,
    dry: bool = False,
) -> list[IndexedFile]:
    """Check that the data sets are complete and of this tokenizer, and the run's folders writable.

    Args:
        saves: whether the run writes checkpoints.
        dry: folders that are made are removed.

    Returns: the training sets.

    Raises: ValueError naming the file; OSError naming the setting of a folder.
    """
    files, _, _ = check_datasets(**data_arguments(settings, tokenizer, seq_length))
    if is_rank_0():
        _check_folders(settings, saves, dry)
    return files


def _check_folders(settings: Settings, saves: bool, dry: bool) -> None:
    if saves and settings.checkpoint.save:
        _check_folder("checkpoint.save", settings.checkpoint.save, dry)
    _check_folder("log.dir", settings.log.dir, dry)
    metrics = Path(settings.log.dir, METRICS_FILE)
    if metrics.exists() and not metrics.is_file():
        raise ValueError(f"{metrics} is no file: the run writes its metrics there; move it away")


def _check_folder(key: str, folder: str, dry: bool) -> None:
    """Make a folder and a file in it, and remove the file; after a dry run the folder, too."""
    probe = Path(folder, f".writable-{os.getpid()}")
    made = [parent for parent in probe.parents if not parent.exists()]
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for parent in made if dry else ():
            parent.rmdir()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{key}={folder}: cannot be written ({reason}): name another folder"
        ) from error
