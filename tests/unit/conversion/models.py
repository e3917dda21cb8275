"""Hugging Face folders of random models, and what Megatron computes with a converted one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.config.loader import load_settings
from megatron_coe.conversion.hf_config import to_hf_config
from megatron_coe.hf.weight_names import weights
from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.builders import tiny_provider
from tests.unit.training.runs import make_trainer


def write_random_model(folder: Path, seed: int, **changes) -> dict[str, Tensor]:
    """A folder with `config.json` and weights of the tiny model with changed Megatron fields."""
    provider = tiny_provider(**changes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for weight in weights(provider):
        for name, shape in weight.parts.items():
            tensors[name] = _center(name) + _spread(name) * torch.randn(shape, generator=generator)
        tensors |= {copy: tensors[name].clone() for copy in weight.copies}
    write_folder(folder, {**to_hf_config(provider), "max_position_embeddings": 20}, tensors)
    return tensors


def _center(name: str) -> float:
    return 1.0 if "norm" in name else 0.0


def _spread(name: str) -> float:
    """Large enough for every weight to show, small enough for rounding errors not to grow."""
    return 0.5 if "embed" in name else 0.12


def write_folder(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def megatron_logits(step: Path, ids_BS: Tensor, device: torch.device) -> Tensor:
    """Logits [B, S, V] of a checkpoint, loaded the way training loads it."""
    logits = _run_megatron(step, ids_BS.to(device), device)
    return logits[..., : load_settings(step / CONFIG_FILE).model["vocab_size"]].cpu()


def megatron_loss(step: Path, ids_BS: Tensor, device: torch.device) -> float:
    """Mean loss of each sequence's tokens but the first, of a checkpoint that training loads."""
    tokens, labels = ids_BS[:, :-1].to(device), ids_BS[:, 1:].to(device)
    return _run_megatron(step, tokens, device, labels=labels).mean().item()


def _run_megatron(step: Path, ids_BS: Tensor, device: torch.device, **inputs: Tensor) -> Tensor:
    clear_aux_losses()
    trainer = make_trainer(load_settings(step / CONFIG_FILE), device)
    assert load_checkpoint(step, trainer.train_state).step == int(step.name.removeprefix("step_"))
    (model,) = trainer.train_state.chunks
    positions = torch.arange(ids_BS.shape[1], device=device).expand_as(ids_BS)
    logits: list[Tensor] = []
    if not inputs and model.module.config.mtp_num_layers:
        # 0.16 computes no logits without labels there; the last ones are the model's own. The
        # loss overwrites them.
        inputs = {"labels": ids_BS}
        head = model.module.output_layer
        head.register_forward_hook(lambda _layer, _args, out: logits.append(out[0].clone()))
    with torch.no_grad():
        output = model.eval()(ids_BS, positions, None, **inputs)
    return logits[-1].transpose(0, 1) if logits else output
