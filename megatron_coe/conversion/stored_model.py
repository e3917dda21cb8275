"""A model in files of either format: its settings, its table of weights, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.checkpoint.assets import hf_folder, prepends_bos
from megatron_coe.checkpoint.directory import resolve_checkpoint
from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.tokenizer import find_tokenizer
from megatron_coe.checkpoint.verify import verify_checkpoint
from megatron_coe.config.loader import load_settings
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import ParallelSettings, Settings
from megatron_coe.conversion.distcp import CheckpointReader
from megatron_coe.conversion.folders import HF_CONFIG
from megatron_coe.conversion.weight_transfer import match_checkpoint, read_stored
from megatron_coe.data.tokenizer import load_tokenizer
from megatron_coe.hf.weight_names import Weight, weights
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.run_files import CONFIG_FILE


@dataclass(frozen=True)
class StoredModel:
    """A model in files, all its weights accounted for and none of them read yet."""

    path: Path
    """What it was read from, for messages."""
    settings: Settings
    provider: CoEModelProvider
    table: list[Weight]
    read: Callable[[Weight], Tensor]
    """Reads a weight of the table, its vocabulary padded as the provider requires."""
    description: Path
    """`config.json`, if there is one."""
    tokenizer: Path | None
    """SentencePiece model or Hugging Face folder, for `load_tokenizer`; None if there is none."""
    prepends_bos: bool | None = None
    """Whether it was trained on documents that begin with BOS; None: unknown."""


def open_checkpoint(checkpoint: Path, tokenizer: Path | None = None) -> StoredModel:
    """Open the model of a training checkpoint, whatever layout it was saved in.

    Args:
        checkpoint: a folder `step_…`, or one that holds them: then the newest.
        tokenizer: that of a checkpoint without a copy; see `find_tokenizer`.

    Raises:
        ValueError: a weight is missing, left over or of another shape; the message names it.
        OSError: a file cannot be read.
    """
    step = resolve_checkpoint(checkpoint)
    verify_step(step)
    settings = settings_of(step, tokenizer)
    provider = provider_of(settings)
    reader, table = CheckpointReader(step), weights(provider)
    found = match_checkpoint(reader, table)

    def read(weight: Weight) -> Tensor:
        tensor = read_stored(reader, weight, found[weight])
        # The layout that it was saved in may have padded it further.
        return weight.join(weight.split(tensor)) if weight.padded else tensor

    tokenizer = Path(settings.data.tokenizer) if settings.data.tokenizer else None
    description = hf_folder(step) / HF_CONFIG
    return StoredModel(
        step, settings, provider, table, read, description, tokenizer, prepends_bos(step)
    )


def verify_step(step: Path) -> None:
    """Compare a checkpoint with its manifest, and check that reading it executes nothing.

    Raises: ValueError naming what is wrong; OSError: a file cannot be read.
    """
    try:
        verify_checkpoint(step)
    except BadCheckpointError as error:
        raise BadCheckpointError(f"checkpoint {step} is {error.verdict}: {error}") from error


def settings_of(step: Path, tokenizer: Path | None = None) -> Settings:
    """Load the settings of a checkpoint, with `data.tokenizer` where its tokenizer is now.

    Args:
        tokenizer: named on the command line; see `find_tokenizer`.

    Raises: ValueError: as `find_tokenizer`, or the settings cannot be read.
    """
    settings = load_settings(step / CONFIG_FILE)
    found = find_tokenizer(step, settings.data.tokenizer, tokenizer)
    settings.data.tokenizer = str(found or "")
    return settings


def provider_of(settings: Settings) -> CoEModelProvider:
    """Build the provider of a run's model on one process, whatever layout it was trained in."""
    settings = replace(settings, parallel=ParallelSettings())
    vocab_size = None
    if not settings.model.get("vocab_size"):
        vocab_size = load_tokenizer(settings.data.tokenizer).vocab_size
    return build_provider(settings, torch.device("cpu"), vocab_size)
