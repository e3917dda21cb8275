"""A model that lies in files, whichever they are, and how it becomes a checkpoint to train from.

What Megatron has no field for (tokenizer, special ids, keys of `config.json`) is kept in the folder
`hf` beside the checkpoints of an imported model, from where an export takes it again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.checkpoints.errors import BadCheckpointError
from megatron_coe.checkpoints.folder import CONFIG_FILE, FORMAT_FILE, LATEST_FILE, find_checkpoints
from megatron_coe.checkpoints.manifest import sign
from megatron_coe.checkpoints.verify import check_checkpoint
from megatron_coe.conversion.config import import_notices, to_model_fields
from megatron_coe.conversion.distcp import CheckpointReader
from megatron_coe.conversion.folders import HF_CONFIG, check_absent, new_folder, read_json
from megatron_coe.conversion.shards import ShardReader
from megatron_coe.conversion.tokenizer import copy_tokenizer
from megatron_coe.conversion.transfer import (
    assemble,
    match_checkpoint,
    match_shards,
    read_stored,
    write_checkpoint,
)
from megatron_coe.data.tokenizer import load_tokenizer
from megatron_coe.hf.names import Weight, weights
from megatron_coe.provider import CoEModelProvider
from megatron_coe.training.model import build_provider
from megatron_coe.training.settings import ParallelSettings, Settings, load_settings

KEPT_FOLDER = "hf"
TOKENIZER_FOLDER = "tokenizer"
STEP_0 = "step_00000000"


@dataclass(frozen=True)
class StoredModel:
    """A model in files, all its weights accounted for and none of them read yet."""

    path: Path
    """What it was read from, for messages."""
    settings: Settings
    provider: CoEModelProvider
    table: list[Weight]
    read: Callable[[Weight], Tensor]
    """A weight of the table, whole, with its vocabulary padded as the provider says."""
    description: Path
    """`config.json`, if there is one."""
    tokenizer: Path
    """Folder of the Hugging Face tokenizer, if there is one."""


def open_folder(folder: Path) -> StoredModel:
    """The model of a Hugging Face folder.

    Raises:
        ValueError: the model cannot be had in Megatron, or a weight is missing, left over or of
            another shape; the message names it.
        OSError: a file cannot be read.
    """
    path = folder / HF_CONFIG
    config = read_json(path)
    settings = Settings(model=to_model_fields(config, path))
    try:
        provider = build_provider(settings, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for notice in import_notices(config):
        print(f"{path}: {notice}", file=sys.stderr, flush=True)
    reader, table = ShardReader(folder), weights(provider)
    match_shards(reader, table)
    return StoredModel(
        path, settings, provider, table, lambda weight: assemble(reader, weight), path, folder
    )


def open_checkpoint(checkpoint: Path) -> StoredModel:
    """The model of a training checkpoint, saved in whatever layout; see `find_step`.

    Raises: ValueError, OSError: as `open_folder`.
    """
    step = find_step(checkpoint)
    verify_step(step)
    settings = load_settings(step / CONFIG_FILE)
    provider = provider_of(settings)
    reader, table = CheckpointReader(step), weights(provider)
    found = match_checkpoint(reader, table)

    def read(weight: Weight) -> Tensor:
        whole = read_stored(reader, weight, found[weight])
        # The layout that it was saved in may have padded it further.
        return weight.join(weight.split(whole)) if weight.padded else whole

    kept = step.parent / KEPT_FOLDER
    tokenizer = kept / TOKENIZER_FOLDER
    if settings.data.tokenizer and Path(settings.data.tokenizer).resolve() == tokenizer.resolve():
        settings.data.tokenizer = ""  # it moves with the model
    return StoredModel(step, settings, provider, table, read, kept / HF_CONFIG, tokenizer)


def write_model(model: StoredModel, checkpoint: Path) -> Path:
    """Write a checkpoint at step 0, which training starts from, into a new folder.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the run that starts there.

    Raises: ValueError for an expert that is all zero; OSError: a file cannot be written.
    """
    check_absent(checkpoint)
    settings = replace(
        model.settings,
        # Transformer Engine's modules would look for the norms under other names.
        model={**model.settings.model, "backend": "torch"},
        data=replace(model.settings.data),
        checkpoint=replace(model.settings.checkpoint, save=str(checkpoint)),
        log=replace(model.settings.log, dir=f"runs/{checkpoint.name}"),
    )
    with new_folder(checkpoint) as partial:
        kept, step = partial / KEPT_FOLDER, partial / STEP_0
        (kept / TOKENIZER_FOLDER).mkdir(parents=True)
        step.mkdir()
        if model.description.is_file():
            shutil.copyfile(model.description, kept / HF_CONFIG)
        if copy_tokenizer(model.tokenizer, kept / TOKENIZER_FOLDER) and not settings.data.tokenizer:
            settings.data.tokenizer = str(checkpoint / KEPT_FOLDER / TOKENIZER_FOLDER)
        write_checkpoint(step, model.table, model.read, model.provider)
        (step / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
        sign(step, 0)
        (partial / LATEST_FILE).write_text(STEP_0 + "\n", encoding="utf-8")
    return checkpoint / STEP_0


def find_step(checkpoint: Path) -> Path:
    """`checkpoint` if it is a folder `step_…`, or the newest of those that it holds.

    Raises: ValueError if it is neither.
    """
    if (checkpoint / FORMAT_FILE).is_file():
        return checkpoint
    found = find_checkpoints(checkpoint)
    if not found:
        raise ValueError(f"{checkpoint}: neither a checkpoint nor a folder of checkpoints")
    return found[0]


def verify_step(step: Path) -> None:
    """Compare a checkpoint with its manifest, and see that reading it executes nothing.

    Raises: ValueError naming what is wrong; OSError: a file cannot be read.
    """
    try:
        check_checkpoint(step)
    except BadCheckpointError as error:
        raise BadCheckpointError(f"checkpoint {step} is {error.verdict}: {error}") from error


def provider_of(settings: Settings) -> CoEModelProvider:
    """The model of a run on one process, whatever layout it was trained in."""
    settings = replace(settings, parallel=ParallelSettings())
    vocab_size = None
    if not settings.model.get("vocab_size"):
        vocab_size = load_tokenizer(settings.data.tokenizer).vocab_size
    return build_provider(settings, torch.device("cpu"), vocab_size)
