"""Runs text through a model and keeps what every router chose.

The engine is the Hugging Face model of `generation`, into which a training checkpoint is exported;
its routers' outputs are read by forward hooks, so that nothing in the model is there for this.

Axis letters: B sequences at once, S their tokens, T tokens in all, L layers with routers,
C iterations, K experts chosen per token and iteration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_coe.analysis.routing import Floats, Ints
from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.config.loader import load_settings
from megatron_coe.utils.run_files import CONFIG_FILE, FORMAT_FILE

_ROUTER = re.compile(r"layers\.(\d+)\.mlp\.gate(?:\.\d+)?")


@dataclass(frozen=True)
class Routing:
    """The choices of a model's routers on a text.

    Attributes:
        name: of the checkpoint.
        experts: N, routed experts of a layer.
        layers: numbers of the layers with routers, from 1.
        choices: numbers of the chosen experts, from 0, [L, C, T, K].
        weights: their weights in the layer's sum, [L, C, T, K].
    """

    name: str
    experts: int
    layers: tuple[int, ...]
    choices: Ints
    weights: Floats


def find_models(load: Path) -> list[Path]:
    """Find the models under a path, the oldest first.

    A Hugging Face folder or a checkpoint is one; a run's folder or its folder of checkpoints holds
    one for each checkpoint.

    Raises: ValueError if there is none.
    """
    if (load / "config.json").is_file() or (load / FORMAT_FILE).is_file():
        return [load]
    found = find_checkpoints(load) or find_checkpoints(load / "checkpoints")
    if not found:
        raise ValueError(
            f"{load}: neither a Hugging Face folder (with config.json) nor a checkpoint (step_…), "
            "a folder of checkpoints, or a run with checkpoints"
        )
    return found[::-1]


def run_name(model: Path) -> str:
    """Return what people call a model: the name of its run, or of its Hugging Face folder."""
    folder = model.resolve()
    if (folder / "config.json").is_file():
        return folder.name
    return (folder.parents[1] if folder.parent.name == "checkpoints" else folder.parent).name


def trained_mode(model: Path) -> str:
    """Return how a model's training sequences were made; Hugging Face folders do not tell."""
    config = model / CONFIG_FILE
    return load_settings(config).data.mode if config.is_file() else "packed"


def random_model(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a model of the same shape with initial weights: the control."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model.config).to(model.device).eval()


@torch.inference_mode()
def collect(
    model: PreTrainedModel, sequences: Sequence[Ints], name: str, batch_size: int = 8
) -> Routing:
    """Return what the routers choose for each token of the sequences, which may differ in length.

    Shorter ones are padded behind, which causal attention does not see; padding is left out.

    Raises: ValueError for a model that has no routers, or none that can be read.
    """
    routers = _routers(model, name)
    chosen: dict[int, list[list[tuple[Tensor, Tensor]]]] = {layer: [] for _, layer in routers}
    hooks = [
        module.register_forward_hook(partial(_note, chosen[layer], name))
        for module, layer in routers
    ]
    batches = []
    try:
        for ids_BS, is_token_BS in _batches(sequences, batch_size):
            for calls in chosen.values():
                calls.clear()
            model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)
            batches.append(_of_tokens(chosen, is_token_BS.flatten()))
    finally:
        for hook in hooks:
            hook.remove()
    choices, weights = (torch.cat(parts, dim=2).numpy() for parts in zip(*batches, strict=True))
    experts = int(model.config.n_routed_experts)
    return Routing(name, experts, tuple(layer + 1 for layer in chosen), choices, weights)


def _routers(model: PreTrainedModel, name: str) -> list[tuple[nn.Module, int]]:
    """Return every router with the number of its layer, in the order of their calls."""
    found = []
    for path, module in model.base_model.named_modules():
        match = _ROUTER.fullmatch(path)
        if match and not isinstance(module, nn.ModuleList):
            found.append((module, int(match[1])))
    if not found:
        raise ValueError(
            f"{name}: a model of type {model.config.model_type} without routers that are known "
            "here (those of coe_deepseekv2 and deepseek_v2 are)"
        )
    return found


def _note(calls: list, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
    """Record the weights [T, K] and numbers [T, K] of the chosen experts, as a forward hook."""
    if not isinstance(output, tuple) or len(output) < 3:
        raise ValueError(
            f"{name}: {type(module).__name__} of this version of transformers does not return what "
            "it chose; convert the model (coe convert from-hf, then to-hf)"
        )
    calls.append((output[1], output[2]))


def _of_tokens(chosen: dict[int, list], is_token_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the choices and weights of a batch, [L, C, T, K] each, without padding.

    A router that all iterations share was called once for each.
    """
    parts = [
        torch.stack([torch.stack([call[kind] for call in calls]) for calls in chosen.values()])
        for kind in (1, 0)
    ]
    choices, weights = (part.cpu()[:, :, is_token_T] for part in parts)
    return choices.to(torch.int16), weights.float()


def _batches(sequences: Sequence[Ints], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids [B, S], and which of them are tokens [B, S]."""
    for first in range(0, len(sequences), size):
        some = [torch.from_numpy(np.asarray(part)) for part in sequences[first : first + size]]
        ids_BS = nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths_B1 = torch.tensor([len(part) for part in some])[:, None]
        yield ids_BS, torch.arange(ids_BS.shape[1]) < lengths_B1
