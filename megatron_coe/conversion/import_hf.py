"""A Hugging Face folder as a training checkpoint at step 0."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings, TrainSettings
from megatron_coe.conversion.folders import HF_CONFIG, check_absent, read_json
from megatron_coe.conversion.hf_config import Config, import_notices, to_model_fields
from megatron_coe.conversion.initial_checkpoint import write_initial_checkpoint
from megatron_coe.conversion.safetensors_shards import ShardReader
from megatron_coe.conversion.stored_model import StoredModel
from megatron_coe.conversion.weight_transfer import assemble, match_shards
from megatron_coe.data.tokenizer import tokenizer_files
from megatron_coe.hf.weight_names import mtp_prefixes, weights

MAX_SEQ_LENGTH = 4096
"""Tokens of a sequence where the model has more positions: longer ones need a layout that fits."""
FINE_TUNING = TrainSettings(
    global_batch_size=64,
    lr=2e-5,
    min_lr=2e-6,
    lr_decay_style="cosine",
    lr_warmup_fraction=0.03,
)
"""The first settings of a run that starts from an imported model; its `config.yaml` has them."""


def from_hf(folder: Path, checkpoint: Path, mtp: bool = True) -> Path:
    """Write a Hugging Face folder as a checkpoint at step 0, from which training starts.

    Args:
        folder: `config.json`, weights and tokenizer.
        checkpoint: a new folder.
        mtp: take the layers of multi-token prediction too, if the model has them.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the run that starts there.

    Raises:
        ValueError: the model is not supported, or a weight is missing, left over, of another shape,
            or an expert's and all zero; the message names it.
        OSError: a file cannot be read or written.
    """
    check_absent(checkpoint)
    return write_initial_checkpoint(open_folder(folder, mtp), checkpoint)


def open_folder(folder: Path, mtp: bool = True) -> StoredModel:
    """Open the model of a Hugging Face folder, with or without layers of multi-token prediction.

    Raises:
        ValueError: the model is not supported, or a weight is missing, left over or of another
            shape; the message names it.
        OSError: a file cannot be read.
    """
    path = folder / HF_CONFIG
    config = read_json(path)
    model = to_model_fields(config, path) | {"seq_length": _seq_length(config)}
    settings = Settings(model=model, train=replace(FINE_TUNING))
    try:
        provider = build_provider(settings, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for notice in import_notices(config):
        print(f"{path}: {notice}", file=sys.stderr, flush=True)
    ignored: tuple[str, ...] = ()
    if not mtp:
        ignored = mtp_prefixes(provider)
        settings.model.pop("mtp_num_layers", None)
        provider = provider.with_fields(mtp_num_layers=None)
    reader, table = ShardReader(folder), weights(provider)
    match_shards(reader, table, ignored)
    tokenizer = folder if tokenizer_files(folder) else None
    return StoredModel(
        path, settings, provider, table, lambda weight: assemble(reader, weight), path, tokenizer
    )


def _seq_length(config: Config) -> int:
    """Return the positions trained on before any scaling, `MAX_SEQ_LENGTH` at most."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    lengths = (
        config.get("max_position_embeddings"),
        scaling.get("original_max_position_embeddings") if isinstance(scaling, dict) else None,
    )
    return min([MAX_SEQ_LENGTH, *(n for n in lengths if type(n) is int and n > 1)])
