"""A stored model as a checkpoint at step 0, from which training starts.

What Megatron has no field for (special ids and other keys of `config.json`) is kept in the folder
`hf` of the checkpoint and of those that are trained from it; an export takes it from there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from megatron_coe.checkpoint.assets import documents_content, tokenizer_content, write_content
from megatron_coe.checkpoint.manifest import add_manifest
from megatron_coe.checkpoint.safe_unpickle import FORMAT
from megatron_coe.checkpoint.state import MODEL_ONLY
from megatron_coe.checkpoint.versions import VERSIONS_FILE, versions_text
from megatron_coe.config.locations import run_folder
from megatron_coe.conversion.distcp import CheckpointWriter
from megatron_coe.conversion.folders import GENERATION_CONFIG, check_absent
from megatron_coe.conversion.stored_model import StoredModel
from megatron_coe.hf.weight_names import LAYERS
from megatron_coe.utils.files import atomic_folder
from megatron_coe.utils.run_files import (
    COMMON_FILE,
    CONFIG_FILE,
    FORMAT_FILE,
    HF_FOLDER,
    LATEST_FILE,
    own_tokenizer,
    step_name,
)

STEP_0 = step_name(0)


def write_initial_checkpoint(model: StoredModel, checkpoint: Path) -> Path:
    """Write a model as a checkpoint at step 0 into a new folder.

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
            content[f"{HF_FOLDER}/{path.name}"] = path.read_bytes()
    if model.prepends_bos is not None:
        content |= documents_content(model.prepends_bos)
    with atomic_folder(checkpoint) as partial:
        partial_step = partial / STEP_0
        partial_step.mkdir()
        _write_weights(partial_step, model)
        write_content(partial_step, content)
        if copy := own_tokenizer(partial_step):
            settings.data.tokenizer = str(step / copy.name)
        (partial_step / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
        add_manifest(partial_step, 0)
        (partial / LATEST_FILE).write_text(STEP_0 + "\n", encoding="utf-8")
    return step


def _write_weights(step: Path, model: StoredModel) -> None:
    """Write a model's weights, one at a time, and the files of Megatron's format around them."""
    layers = model.provider.num_layers
    # Megatron stacks the layers of a model whose `moe_layer_freq` makes them all alike.
    stacked = model.provider.moe_layer_freq == 1
    writer = CheckpointWriter(step)
    try:
        for weight in model.table:
            key = weight.keys[0]
            place: tuple[int, ...] = ()
            grid: tuple[int, ...] = ()
            if weight.layer is not None and stacked:
                writer.write(key, model.read(weight), weight.layer, layers)
                place, grid = (weight.layer,), (layers,)
            else:
                key = key.replace(LAYERS, f"{LAYERS}{weight.layer}.", 1)
                writer.write(key, model.read(weight))
            _write_extra_states(writer, key, place, grid, weight.experts)
        writer.close()
    finally:
        writer.abandon()
    torch.save(MODEL_ONLY, step / COMMON_FILE)
    (step / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
    (step / VERSIONS_FILE).write_text(versions_text(), encoding="utf-8")


def _write_extra_states(
    writer: CheckpointWriter,
    key: str,
    place: tuple[int, ...],
    grid: tuple[int, ...],
    experts: int,
) -> None:
    """Write the empty extra state of a linear layer, which Megatron's modules load.

    Args:
        place: of the layer in a `grid` of stacked layers; both are empty without stacking.
    """
    module, _, parameter = key.rpartition(".")
    is_linear = module.rpartition(".")[2].startswith(("linear_", "eh_proj"))
    if parameter != "weight" or not is_linear:
        return
    key = f"{module}._extra_state"
    if not experts:
        return writer.write_extra_state(key, place or (0,), grid or (1,))
    for expert in range(experts):
        writer.write_extra_state(key, (*place, expert), (*grid, experts))
