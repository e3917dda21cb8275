"""A model that lies in files, whichever they are, and how it becomes a checkpoint to train from.

What Megatron has no field for (special ids and other keys of `config.json`) is kept in the folder
`hf` of the checkpoint and of those that are trained from it, from where an export takes it again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.checkpoint.assets import (
    documents_content,
    kept_folder,
    prepends_bos,
    tokenizer_content,
    write_content,
)
from megatron_coe.checkpoint.directory import find_step
from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.manifest import sign
from megatron_coe.checkpoint.tokenizer import find_tokenizer
from megatron_coe.checkpoint.verify import check_checkpoint
from megatron_coe.config.locations import run_folder
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import ParallelSettings, Settings, TrainSettings, load_settings
from megatron_coe.conversion.distcp import CheckpointReader
from megatron_coe.conversion.folders import (
    GENERATION_CONFIG,
    HF_CONFIG,
    check_absent,
    read_json,
)
from megatron_coe.conversion.hf_config import Config, import_notices, to_model_fields
from megatron_coe.conversion.shards import ShardReader
from megatron_coe.conversion.transfer import (
    assemble,
    match_checkpoint,
    match_shards,
    read_stored,
    write_checkpoint,
)
from megatron_coe.data.tokenizer import load_tokenizer, tokenizer_files
from megatron_coe.hf.weight_names import Weight, weights
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.files import atomic_folder
from megatron_coe.utils.run_files import CONFIG_FILE, KEPT_FOLDER, LATEST_FILE, own_tokenizer

STEP_0 = "step_00000000"
LONGEST = 4096
"""Tokens of a sequence where the model has more positions: more of them need a layout that fits."""
FINE_TUNING = TrainSettings(
    global_batch_size=64,
    lr=2e-5,
    min_lr=2e-6,
    lr_decay_style="cosine",
    lr_warmup_fraction=0.03,
)
"""What a run that starts from a model of others begins with; its `config.yaml` shows it."""


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
    tokenizer: Path | None
    """SentencePiece model or Hugging Face folder, for `load_tokenizer`; None if there is none."""
    prepends_bos: bool | None = None
    """Whether it was trained on documents that begin with the token for that; None: unknown."""


def open_folder(folder: Path) -> StoredModel:
    """The model of a Hugging Face folder.

    Raises:
        ValueError: the model cannot be had in Megatron, or a weight is missing, left over or of
            another shape; the message names it.
        OSError: a file cannot be read.
    """
    path = folder / HF_CONFIG
    config = read_json(path)
    model = to_model_fields(config, path) | {"seq_length": _trained_length(config)}
    settings = Settings(model=model, train=replace(FINE_TUNING))
    try:
        provider = build_provider(settings, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for notice in import_notices(config):
        print(f"{path}: {notice}", file=sys.stderr, flush=True)
    reader, table = ShardReader(folder), weights(provider)
    match_shards(reader, table)
    tokenizer = folder if tokenizer_files(folder) else None
    return StoredModel(
        path, settings, provider, table, lambda weight: assemble(reader, weight), path, tokenizer
    )


def open_checkpoint(checkpoint: Path, tokenizer: Path | None = None) -> StoredModel:
    """The model of a training checkpoint, saved in whatever layout; see `find_step`.

    Args:
        tokenizer: that of a checkpoint without a copy; see `find_tokenizer`.

    Raises: ValueError, OSError: as `open_folder`.
    """
    step = find_step(checkpoint)
    verify_step(step)
    settings = settings_of(step, tokenizer)
    provider = provider_of(settings)
    reader, table = CheckpointReader(step), weights(provider)
    found = match_checkpoint(reader, table)

    def read(weight: Weight) -> Tensor:
        whole = read_stored(reader, weight, found[weight])
        # The layout that it was saved in may have padded it further.
        return weight.join(weight.split(whole)) if weight.padded else whole

    tokenizer = Path(settings.data.tokenizer) if settings.data.tokenizer else None
    description = kept_folder(step) / HF_CONFIG
    return StoredModel(
        step, settings, provider, table, read, description, tokenizer, prepends_bos(step)
    )


def write_model(model: StoredModel, checkpoint: Path) -> Path:
    """Write a checkpoint at step 0, which training starts from, into a new folder.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the run that starts there.

    Raises: ValueError for an expert that is all zero; OSError: a file cannot be written.
    """
    check_absent(checkpoint)
    step = checkpoint / STEP_0
    settings = replace(
        model.settings,
        data=replace(model.settings.data, tokenizer=""),
        checkpoint=replace(model.settings.checkpoint, save=str(checkpoint), load=str(step)),
        log=replace(model.settings.log, dir=str(run_folder(checkpoint))),
    )
    content: dict[str, bytes] = {}
    if model.tokenizer is not None:
        content |= tokenizer_content(model.tokenizer)
    for path in (model.description, model.description.with_name(GENERATION_CONFIG)):
        if path.is_file():
            content[f"{KEPT_FOLDER}/{path.name}"] = path.read_bytes()
    if model.prepends_bos is not None:
        content |= documents_content(model.prepends_bos)
    with atomic_folder(checkpoint) as partial:
        partial_step = partial / STEP_0
        partial_step.mkdir()
        write_checkpoint(partial_step, model.table, model.read, model.provider)
        write_content(partial_step, content)
        if copy := own_tokenizer(partial_step):
            settings.data.tokenizer = str(step / copy.name)
        (partial_step / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
        sign(partial_step, 0)
        (partial / LATEST_FILE).write_text(STEP_0 + "\n", encoding="utf-8")
    return step


def verify_step(step: Path) -> None:
    """Compare a checkpoint with its manifest, and see that reading it executes nothing.

    Raises: ValueError naming what is wrong; OSError: a file cannot be read.
    """
    try:
        check_checkpoint(step)
    except BadCheckpointError as error:
        raise BadCheckpointError(f"checkpoint {step} is {error.verdict}: {error}") from error


def _trained_length(config: Config) -> int:
    """Positions that a model was trained on before they were scaled, up to `LONGEST`."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    lengths = (
        config.get("max_position_embeddings"),
        scaling.get("original_max_position_embeddings") if isinstance(scaling, dict) else None,
    )
    return min([LONGEST, *(n for n in lengths if type(n) is int and n > 1)])


def settings_of(step: Path, tokenizer: Path | None = None) -> Settings:
    """The settings of a checkpoint, `data.tokenizer` being where its tokenizer is now.

    Args:
        tokenizer: named on the command line; see `find_tokenizer`, which may raise ValueError.
    """
    settings = load_settings(step / CONFIG_FILE)
    found = find_tokenizer(step, settings.data.tokenizer, tokenizer)
    settings.data.tokenizer = str(found or "")
    return settings


def provider_of(settings: Settings) -> CoEModelProvider:
    """The model of a run on one process, whatever layout it was trained in."""
    settings = replace(settings, parallel=ParallelSettings())
    vocab_size = None
    if not settings.model.get("vocab_size"):
        vocab_size = load_tokenizer(settings.data.tokenizer).vocab_size
    return build_provider(settings, torch.device("cpu"), vocab_size)
