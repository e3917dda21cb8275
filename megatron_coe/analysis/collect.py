"""Expert assignments of every router of a model on a text.

The model is the Hugging Face one of `generation`, into which a training checkpoint is exported.
Forward hooks read its routers' outputs, so that the model needs no code for this.

Axis letters: B sequences at once, S their tokens, T tokens in all, L layers with routers,
C iterations, K experts per token and iteration.
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
    """The expert assignments of a model's routers on a text.

    Attributes:
        name: of the checkpoint.
        experts: N, routed experts of a layer.
        layers: numbers of the layers with routers, from 1.
        indices: top-k expert indices, from 0, [L, C, T, K].
        probs: top-k probabilities, [L, C, T, K].
    """

    name: str
    experts: int
    layers: tuple[int, ...]
    indices: Ints
    probs: Floats


def find_models(load: Path) -> list[Path]:
    """Find the models under a path, the oldest first.

    A Hugging Face folder or a checkpoint is one model; a run's folder, or its folder of
    checkpoints, holds one for each checkpoint.

    Raises:
        ValueError: there is none.
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
    """Return the `data.mode` that a model was trained in: packed if its folder does not tell."""
    config = model / CONFIG_FILE
    return load_settings(config).data.mode if config.is_file() else "packed"


def random_model(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Build a model of the same shape with initial weights: the control."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model.config).to(model.device).eval()


@torch.inference_mode()
def collect(
    model: PreTrainedModel, sequences: Sequence[Ints], name: str, batch_size: int = 8
) -> Routing:
    """Collect the expert assignments of each token of the sequences, which may differ in length.

    Shorter sequences are padded at the end, which causal attention does not see; the padding's
    assignments are left out.

    Raises:
        ValueError: the model has no routers, or none that can be read.
    """
    routers = _routers(model, name)
    outputs: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for _, layer in routers}
    hooks = [
        module.register_forward_hook(partial(_record, outputs[layer], name))
        for module, layer in routers
    ]
    batches = []
    try:
        for ids_BS, is_token_BS in _batches(sequences, batch_size):
            for calls in outputs.values():
                calls.clear()
            model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)
            batches.append(_of_tokens(outputs, is_token_BS.flatten()))
    finally:
        for hook in hooks:
            hook.remove()
    indices, probs = (torch.cat(parts, dim=2).numpy() for parts in zip(*batches, strict=True))
    experts = int(model.config.n_routed_experts)
    return Routing(name, experts, tuple(layer + 1 for layer in outputs), indices, probs)


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


def _record(calls: list, name: str, module: nn.Module, inputs: tuple, output: object) -> None:
    """Record top-k probabilities [T, K] and expert indices [T, K]; a forward hook."""
    if not isinstance(output, tuple) or len(output) < 3:
        raise ValueError(
            f"{name}: {type(module).__name__} of this version of transformers does not return its "
            "expert indices; convert the model (coe convert from-hf, then to-hf)"
        )
    calls.append((output[1], output[2]))


def _of_tokens(outputs: dict[int, list], is_token_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and probabilities of a batch, [L, C, T, K] each, without padding.

    A router that all iterations share was called once for each.
    """
    parts = [
        torch.stack([torch.stack([call[kind] for call in calls]) for calls in outputs.values()])
        for kind in (1, 0)
    ]
    indices, probs = (part.cpu()[:, :, is_token_T] for part in parts)
    return indices.to(torch.int16), probs.float()


def _batches(sequences: Sequence[Ints], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield padded ids [B, S], and which of them are tokens [B, S]."""
    for first in range(0, len(sequences), size):
        some = [torch.from_numpy(np.asarray(part)) for part in sequences[first : first + size]]
        ids_BS = nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths_B1 = torch.tensor([len(part) for part in some])[:, None]
        yield ids_BS, torch.arange(ids_BS.shape[1]) < lengths_B1
