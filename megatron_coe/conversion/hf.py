"""A training checkpoint as a Hugging Face folder, and back, exactly.

Both directions walk over the table of `names.py` and hold one layer's largest tensor and one file's
worth of weights in memory. Every weight is accounted for before the first one is read, and the
result appears under its name only when it is whole.

What Megatron has no field for (tokenizer, special ids, keys of `config.json`) is kept in the folder
`hf` beside the checkpoints of an imported model, from where an export takes it again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megatron_coe.conversion import config as hf_config
from megatron_coe.conversion.card import model_card
from megatron_coe.conversion.distcp import CheckpointReader, CheckpointWriter
from megatron_coe.conversion.names import LAYERS, Weight, weights
from megatron_coe.conversion.shards import ShardReader, ShardWriter
from megatron_coe.conversion.tokenizer import copy_tokenizer, write_tokenizer
from megatron_coe.data.files import partial_path
from megatron_coe.data.tokenizer import load_tokenizer
from megatron_coe.provider import CoEModelProvider
from megatron_coe.training.checkpoint import (
    CONFIG_FILE,
    LATEST_FILE,
    MODEL_ONLY,
    find_checkpoints,
)
from megatron_coe.training.model import build_provider
from megatron_coe.training.settings import (
    CheckpointSettings,
    DataSettings,
    LogSettings,
    ParallelSettings,
    Settings,
    load_settings,
)

KEPT_FOLDER = "hf"
TOKENIZER_FOLDER = "tokenizer"
STEP_0 = "step_00000000"
HF_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
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
) -> Path:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a folder `step_…`, or one that holds them: then the newest.
        dtype: of all weights but the routers' biases, which stay fp32; None: as they are.
        max_shard_size: bytes of weights per file; a larger weight has a file of its own.
        family: `coe_deepseekv2`, or `deepseek_v2` for transformers' own class, which is a chain of
            one iteration with the residual mode `outer`.

    Returns: the checkpoint that was converted.

    Raises:
        ValueError: the model cannot be expressed, or a weight is missing, left over, of another
            shape, or an expert's and all zero; the message names it.
        OSError: a file cannot be read or written.
    """
    _check_absent(folder)
    step = _find_step(checkpoint)
    settings = load_settings(step / CONFIG_FILE)
    provider = _provider_of(settings)
    native = family == hf_config.DEEPSEEK_V2
    describe = hf_config.to_deepseek_v2_config if native else hf_config.to_hf_config
    config = describe(provider)
    reader = CheckpointReader(step)
    found = _match_checkpoint(reader, weights(provider))
    kept = step.parent / KEPT_FOLDER
    with _new_folder(folder) as partial:
        config["torch_dtype"] = _DTYPE_NAMES[dtype or reader.dtype(next(iter(found.values())))]
        config = _write_description(config, settings, kept, provider, partial)
        ids = {key: config[key] for key in _SPECIAL_IDS if config.get(key) is not None}
        _write_json(partial / GENERATION_CONFIG, ids)
        for name in () if native else MODEL_CODE:
            shutil.copyfile(Path(__file__).parents[1] / "hf" / name, partial / name)
        card = model_card(provider, folder.name, remote_code=not native)
        (partial / "README.md").write_text(card, encoding="utf-8")
        writer = ShardWriter(partial, max_shard_size)
        for weight, key in found.items():
            if native:
                weight = replace(weight, parts=_with_one_gate(weight.parts))
            _export(reader, writer, weight, key, dtype)
        writer.close()
    return step


def describe(checkpoint: Path, folder: Path) -> None:
    """Write the configuration and tokenizer that `to_hf` would write, into a folder that exists:
    at once, to check against before the weights are converted.

    Raises: ValueError, OSError: as `to_hf`.
    """
    step = _find_step(checkpoint)
    settings = load_settings(step / CONFIG_FILE)
    provider = _provider_of(settings)
    config = hf_config.to_hf_config(provider)
    _write_description(config, settings, step.parent / KEPT_FOLDER, provider, folder)


def from_hf(folder: Path, checkpoint: Path) -> Path:
    """Write a Hugging Face folder as a checkpoint at step 0, which training starts from.

    Returns: the folder `step_00000000`, whose `config.yaml` describes the model.

    Raises: ValueError, OSError: as `to_hf`.
    """
    _check_absent(checkpoint)
    path = folder / HF_CONFIG
    config = _read_json(path)
    settings = Settings(
        model=hf_config.to_model_fields(config, path),
        data=DataSettings(),
        checkpoint=CheckpointSettings(save=str(checkpoint)),
        log=LogSettings(dir=f"runs/{checkpoint.name}"),
    )
    try:
        provider = build_provider(settings, torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    reader = ShardReader(folder)
    table = weights(provider)
    _match_shards(reader, table)
    with _new_folder(checkpoint) as partial:
        kept, step = partial / KEPT_FOLDER, partial / STEP_0
        kept.mkdir()
        step.mkdir()
        _write_json(kept / HF_CONFIG, config)
        (kept / TOKENIZER_FOLDER).mkdir()
        if copy_tokenizer(folder, kept / TOKENIZER_FOLDER):
            settings.data.tokenizer = str(checkpoint / KEPT_FOLDER / TOKENIZER_FOLDER)
        _write_checkpoint(step, reader, table, provider)
        (step / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
        (partial / LATEST_FILE).write_text(STEP_0 + "\n", encoding="utf-8")
    return checkpoint / STEP_0


# --- reading and writing weights --------------------------------------------------------------


def _match_checkpoint(reader: CheckpointReader, table: list[Weight]) -> dict[Weight, str]:
    """Under which key each weight stands; all are there, with the right shape, and nothing else."""
    found: dict[Weight, str] = {}
    for weight in table:
        key = reader.find(weight.keys, weight.layer)
        where = _describe(weight)
        if key is None:
            raise ValueError(f"{reader.folder}: lacks {where}")
        shape, expected = reader.shape(key)[_is_stacked(weight, key) :], _shape(weight)
        fits = shape == expected
        if weight.padded:
            rows = next(iter(weight.parts.values()))[0]
            fits = shape[1:] == expected[1:] and shape[0] >= rows
        if not fits:
            raise ValueError(
                f"{reader.folder}: {where} has shape {list(shape)}, the model's configuration says "
                f"{list(expected)}"
            )
        found[weight] = key
    for key in set(reader.keys()) - set(found.values()):
        raise ValueError(f"{reader.folder}: holds {key}, which is no weight of this model")
    return found


def _match_shards(reader: ShardReader, table: list[Weight]) -> None:
    expected = {name: shape for weight in table for name, shape in weight.parts.items()}
    present = reader.names()
    for name in expected.keys() - set(present):
        raise ValueError(f"{reader.folder}: lacks {name}, which its {HF_CONFIG} implies")
    for weight in table:
        types = {reader.dtype(name): name for name in weight.parts}
        if len(types) > 1:
            first, second, *_ = types.values()
            raise ValueError(f"{reader.folder}: {first} and {second} are of different types")
    for name in present:
        if name not in expected:
            raise ValueError(
                f"{reader.file_of(name)}: holds {name}, which is no weight of the model that "
                f"{HF_CONFIG} describes"
            )
        if reader.shape(name) != expected[name]:
            raise ValueError(
                f"{reader.file_of(name)}: {name} has shape {list(reader.shape(name))}, "
                f"{HF_CONFIG} says {list(expected[name])}"
            )


def _export(
    reader: CheckpointReader,
    writer: ShardWriter,
    weight: Weight,
    key: str,
    dtype: torch.dtype | None,
) -> None:
    """A function of its own, so that nothing of one weight is alive when the next is read."""
    whole = reader.read(key, weight.layer if _is_stacked(weight, key) else None)
    for name, tensor in zip(weight.parts, weight.split(whole), strict=True):
        if weight.experts:
            _refuse_zeros(name, tensor, reader.folder)
        stored = tensor.dtype if dtype is None or weight.keeps_fp32 else dtype
        writer.make_room(tensor.numel() * stored.itemsize)
        writer.add(name, _as_own_storage(tensor, stored))


def _with_one_gate(parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A plain mixture of experts does not number its router."""
    return {name.replace(".mlp.gate.0.", ".mlp.gate."): shape for name, shape in parts.items()}


def _assemble(reader: ShardReader, weight: Weight) -> Tensor:
    if not weight.experts:
        return weight.join([reader.read(name) for name in weight.parts])
    # Experts one at a time: together they may be as large as a layer, and lie in several files.
    first = next(iter(weight.parts))
    whole = torch.empty(_shape(weight), dtype=reader.dtype(first))
    for name, view in zip(weight.parts, weight.split(whole), strict=True):
        view.copy_(reader.read(name))
        _refuse_zeros(name, view, reader.folder)
    return whole


def _write_checkpoint(
    step: Path, reader: ShardReader, table: list[Weight], provider: CoEModelProvider
) -> None:
    layers = provider.num_layers
    # Megatron stacks the layers of a model whose `moe_layer_freq` makes them all alike.
    stacked = provider.moe_layer_freq == 1
    writer = CheckpointWriter(step)
    try:
        for weight in table:
            key, place, grid = weight.keys[0], (0,), (1,)
            if weight.layer is not None and stacked:
                writer.write(key, _assemble(reader, weight), weight.layer, layers)
                place, grid = (weight.layer,), (layers,)
            else:
                key = key.replace(LAYERS, f"{LAYERS}{weight.layer}.", 1)
                writer.write(key, _assemble(reader, weight))
            _write_extra_states(writer, key, place, grid, weight.experts)
        writer.close()
    finally:
        writer.abandon()
    torch.save(MODEL_ONLY, step / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(step))


def _write_extra_states(
    writer: CheckpointWriter,
    key: str,
    place: tuple[int, ...],
    grid: tuple[int, ...],
    experts: int,
) -> None:
    """The empty extra state of each linear layer, which Megatron's modules ask for on loading."""
    module, _, parameter = key.rpartition(".")
    if parameter != "weight" or not module.rpartition(".")[2].startswith("linear_"):
        return
    key = f"{module}._extra_state"
    if not experts:
        return writer.write_extra_state(key, place, grid)
    before = (place, grid) if grid != (1,) else ((), ())
    for expert in range(experts):
        writer.write_extra_state(key, (*before[0], expert), (*before[1], experts))


def _refuse_zeros(name: str, tensor: Tensor, source: Path) -> None:
    if not tensor.any():
        raise ValueError(f"{source}: {name} is all zero, an expert that was never filled")


def _as_own_storage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy unless it is one already: a view would keep alive all that it looks into."""
    tensor = tensor.to(dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _shape(weight: Weight) -> tuple[int, ...]:
    parts = [torch.empty(shape, device="meta") for shape in weight.parts.values()]
    return tuple(weight.join(parts).shape)


def _is_stacked(weight: Weight, key: str) -> bool:
    return weight.layer is not None and key in weight.keys


def _describe(weight: Weight) -> str:
    names = list(weight.parts)
    layer = "" if weight.layer is None else f" of layer {weight.layer}"
    several = f" … {names[-1]}" if len(names) > 1 else ""
    return f"{weight.keys[0]}{layer} ({names[0]}{several})"


# --- configuration and folders ----------------------------------------------------------------


def _find_step(checkpoint: Path) -> Path:
    if (checkpoint / "metadata.json").is_file():
        return checkpoint
    found = find_checkpoints(checkpoint)
    if not found:
        raise ValueError(f"{checkpoint}: neither a checkpoint nor a folder of checkpoints")
    return found[0]


def _provider_of(settings: Settings) -> CoEModelProvider:
    """The model of a run on one process, whatever layout it was trained in."""
    settings.parallel = ParallelSettings()
    vocab_size = None
    if "vocab_size" not in settings.model:
        vocab_size = load_tokenizer(settings.data.tokenizer).vocab_size
    return build_provider(settings, torch.device("cpu"), vocab_size)


def _write_description(
    config: hf_config.Config,
    settings: Settings,
    kept: Path,
    provider: CoEModelProvider,
    folder: Path,
) -> hf_config.Config:
    """Write `config.json` and the tokenizer; returns all that is in `config.json`."""
    config = _with_kept_keys(config, kept, provider)
    config |= _write_tokenizer_files(settings, kept, folder)
    _write_json(folder / HF_CONFIG, config)
    return config


def _with_kept_keys(
    config: hf_config.Config, kept: Path, provider: CoEModelProvider
) -> hf_config.Config:
    """The model's keys over those that the imported configuration had besides."""
    config = {"max_position_embeddings": provider.seq_length, **config}
    path = kept / HF_CONFIG
    if not path.is_file():
        return config
    original = _read_json(path)
    described = {*config, *hf_config.IDENTITY, *hf_config.OWN, *hf_config.OTHER_SPELLINGS}
    described -= {"max_position_embeddings"}
    return config | {key: value for key, value in original.items() if key not in described}


def _write_tokenizer_files(settings: Settings, kept: Path, folder: Path) -> dict[str, int]:
    """Returns the special ids of a tokenizer that the imported configuration does not know."""
    path, imported = Path(settings.data.tokenizer), kept / TOKENIZER_FOLDER
    named = bool(settings.data.tokenizer)
    if named and path.exists() and path.resolve() != imported.resolve():
        return write_tokenizer(path, folder)
    if copy_tokenizer(imported, folder) or not named:
        return {}
    raise ValueError(
        f"data.tokenizer={path} of the checkpoint does not exist here: run in the folder that the "
        "model was trained in"
    )


def _check_absent(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: give a new folder")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets its name on success and is removed on any failure."""
    partial = partial_path(folder)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_json(path: Path) -> hf_config.Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object")
    return content


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
