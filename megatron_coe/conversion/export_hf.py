"""A training checkpoint as a Hugging Face folder, exactly.

The export walks over the table of `hf/weight_names.py` and holds one layer's largest tensor and one
file's worth of weights in memory. Every weight is accounted for before the first one is read, and
the folder appears under its name only when it is complete.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from megatron_coe.checkpoint.assets import hf_folder, prepends_bos
from megatron_coe.checkpoint.directory import resolve_checkpoint
from megatron_coe.conversion import hf_config
from megatron_coe.conversion.distcp import CheckpointReader
from megatron_coe.conversion.folders import (
    GENERATION_CONFIG,
    HF_CONFIG,
    check_absent,
    read_json,
    write_json,
)
from megatron_coe.conversion.hf_config.keys import IDENTITY, OTHER_SPELLINGS, OWN, OWN_YARN
from megatron_coe.conversion.model_card import model_card
from megatron_coe.conversion.safetensors_shards import ShardWriter
from megatron_coe.conversion.stored_model import provider_of, settings_of, verify_step
from megatron_coe.conversion.tokenizer import Usage, check_tokenizer, write_tokenizer
from megatron_coe.conversion.weight_transfer import export_weight, match_checkpoint
from megatron_coe.hf.weight_names import MTP, weights
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.files import atomic_folder
from megatron_coe.utils.run_files import step_of

MODEL_CODE = ("configuration_coe.py", "modeling_coe.py")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    family: str = hf_config.MODEL_TYPE,
    tokenizer: Path | None = None,
    averaged: bool = False,
    mtp: bool = True,
) -> Path:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a folder `step_…`, or one that holds them: then the newest.
        dtype: of all weights but the expert biases, which stay fp32; None: as they are stored.
        max_shard_size: bytes of weights per file; a larger weight has a file of its own.
        family: `coe_deepseekv2`, or `deepseek_v2` for transformers' own class, which is a CoE model
            of one iteration with the residual mode `outer`.
        tokenizer: that of a checkpoint without a copy; see `find_tokenizer`.
        averaged: take the moving average of the weights.
        mtp: write the layers of multi-token prediction too, if the model has them.

    Returns: the checkpoint that was converted.

    Raises:
        ValueError: the model cannot be expressed, or a weight is missing, left over, of another
            shape, or an expert's and all zero; the message names it.
        OSError: a file cannot be read or written.
    """
    check_absent(folder)
    step = resolve_checkpoint(checkpoint)
    verify_step(step)
    settings = settings_of(step, tokenizer)
    provider, stored_tokenizer = provider_of(settings), settings.data.tokenizer
    if not mtp:
        provider = provider.with_fields(mtp_num_layers=None)
    native = family == hf_config.DEEPSEEK_V2
    describe = hf_config.to_deepseek_v2_config if native else hf_config.to_hf_config
    config = describe(provider)
    reader = CheckpointReader(step, averaged)
    found = match_checkpoint(reader, weights(provider), ignored=() if mtp else (MTP,))
    # An average is kept in fp32, whatever the weights are trained in.
    stored = dtype or CheckpointReader(step).dtype(next(iter(found.values())))
    dtype = stored if averaged else dtype
    with atomic_folder(folder) as partial:
        config["torch_dtype"] = _DTYPE_NAMES[stored]
        config, usage = _write_description(config, step, stored_tokenizer, provider, partial)
        if stored_tokenizer:
            check_tokenizer(Path(stored_tokenizer), partial, usage)
        for name in () if native else MODEL_CODE:
            shutil.copyfile(Path(__file__).parents[1] / "hf" / name, partial / name)
        card = model_card(
            provider,
            step,
            folder.name,
            usage,
            data=settings.data,
            steps=settings.train.steps,
            run=Path(settings.log.dir),
            remote_code=not native,
        )
        if native:
            card += hf_config.deepseek_v2_notes(provider, stored.itemsize)
        (partial / "README.md").write_text(card, encoding="utf-8")
        writer = ShardWriter(partial, max_shard_size)
        for weight, key in found.items():
            if native:
                weight = replace(weight, parts=_with_one_router(weight.parts))
            export_weight(reader, writer, weight, key, dtype)
        writer.close()
    return step


def describe(checkpoint: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the configuration and tokenizer that `to_hf` would write, into an existing folder.

    It takes no time, so that inputs can be checked before the weights are converted.

    Raises: ValueError, OSError: as `to_hf`.
    """
    step = resolve_checkpoint(checkpoint)
    settings = settings_of(step, tokenizer)
    provider = provider_of(settings)
    config = hf_config.to_hf_config(provider)
    _write_description(config, step, settings.data.tokenizer, provider, folder)


# --- configuration and tokenizer ---------------------------------------------------------------


def _with_one_router(parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the parts as a standard MoE model names them, which does not number its router."""
    return {name.replace(".mlp.gate.0.", ".mlp.gate."): shape for name, shape in parts.items()}


def _write_description(
    config: hf_config.Config,
    step: Path,
    tokenizer: str,
    provider: CoEModelProvider,
    folder: Path,
) -> tuple[hf_config.Config, Usage]:
    """Write configurations and tokenizer.

    Args:
        config: what the model's fields say; the rest is added to it.
        tokenizer: where it is; empty if there is none.

    Returns: the content of `config.json`, and how training used the tokenizer.
    """
    kept = hf_folder(step)
    ids: hf_config.Config = {}
    original = _read_kept(kept / HF_CONFIG)
    length = _trained_length(original, provider, is_trained=bool(step_of(step)))
    usage = Usage(length, prepends_bos(step))
    if tokenizer:
        ids = write_tokenizer(Path(tokenizer), folder, usage)
    config = {"max_position_embeddings": length, **config}
    described = {*config, *IDENTITY, *OWN, *OTHER_SPELLINGS}
    config |= {key: value for key, value in original.items() if key not in described}
    config = ids | config
    if config["model_type"] == hf_config.MODEL_TYPE and config["rope_scaling"]:
        config["rope_scaling"] |= {"rope_type": OWN_YARN}
    write_json(folder / HF_CONFIG, config)
    ids = {key: config[key] for key in _SPECIAL_IDS if config.get(key) is not None}
    write_json(folder / GENERATION_CONFIG, ids | _read_kept(kept / GENERATION_CONFIG))
    return config, usage


def _read_kept(path: Path) -> hf_config.Config:
    """Read a file of the folder a model was imported from; empty if it was not imported."""
    return read_json(path) if path.is_file() else {}


def _trained_length(
    original: hf_config.Config, provider: CoEModelProvider, is_trained: bool
) -> int:
    """Return the positions that the model was trained on, here or before it was imported."""
    before = original.get("max_position_embeddings") or provider.seq_length
    return max(before, provider.seq_length) if is_trained else before
