"""Parameters that training leaves as they are, chosen by patterns of their names.

A name is a weight's in the whole model (`decoder.layers.3.mlp.router.0.weight`), a pattern a
shell's; one that begins with `!` excepts what it matches from those before it. Frozen parameters
have no gradient buffer, no main weight and no moments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_coe.hf.weight_names import LAYERS, MTP_MODEL_LAYER, ModelShape, Weight, weights

_ONE_EXPERT = re.compile(r"\.experts\.(?:local_experts\.\d+\.)?(linear_fc[12]\.weight)\d*$")
"""A weight of the experts, of which other modules than ours have one for each expert."""


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Return whether the last pattern that matches a name is no exception."""
    matching = [p for p in patterns if fnmatchcase(name, p.removeprefix("!"))]
    return bool(matching) and not matching[-1].startswith("!")


def frozen_weights(config: ModelShape, patterns: Sequence[str]) -> list[Weight]:
    """List the weights of a model that are frozen, as the table of its names has them."""
    return [w for w in _parameters(config) if is_frozen(weight_name(w), patterns)]


def check_patterns(config: ModelShape, patterns: Sequence[str]) -> None:
    """Raise ValueError for a pattern that matches nothing, or for a choice that cannot be.

    Nothing may be left to train, or layers are told apart that checkpoints store in one tensor.
    """
    names = [weight_name(weight) for weight in _parameters(config)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            raise ValueError(
                f"train.freeze: {pattern!r} matches no weight of the model; their names are like "
                f"{names[len(names) // 2]}"
            )
    if patterns and all(is_frozen(name, patterns) for name in names):
        raise ValueError(
            f"train.freeze={list(patterns)}: leaves nothing to train; except some weights by a "
            "pattern that begins with '!'"
        )
    of_layers: dict[str, set[bool]] = {}
    for weight in _parameters(config) if config.moe_layer_freq == 1 else ():
        of_layers.setdefault(weight.keys[0], set()).add(is_frozen(weight_name(weight), patterns))
    for key, choices in of_layers.items():
        if len(choices) > 1:
            raise ValueError(
                f"train.freeze={list(patterns)}: freezes {key} of some layers alone, and where all "
                "layers are alike Megatron stores them in one tensor; freeze it in all of them, or "
                "start from a model whose model.moe_layer_freq is a list"
            )


def freeze(model: GPTModel, patterns: Sequence[str]) -> None:
    """Freeze the matching parameters of a pipeline stage's part of a model, before DDP wraps it."""
    for parameter, name in global_names(model).items():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)
    embedding = getattr(model, "embedding", None)
    if embedding is not None and not any(p.requires_grad for p in embedding.parameters()):
        # Recomputed layers pass no gradient on to their weights unless their input has one.
        embedding.register_forward_hook(
            lambda _module, _args, output: (
                output.detach().requires_grad_() if torch.is_grad_enabled() else output
            )
        )


def global_names(model: GPTModel) -> dict[torch.nn.Parameter, str]:
    """Return each parameter of a pipeline stage's part of a model, and its name in the whole."""
    return {p: _global_name(model, name) for name, p in model.named_parameters()}


def trained_weights(config: ModelShape, frozen: Sequence[str] = ()) -> dict[str, Weight]:
    """Return the weights of a model that are trained, by name."""
    named = {weight_name(weight): weight for weight in _parameters(config)}
    return {name: weight for name, weight in named.items() if not is_frozen(name, frozen)}


def _parameters(config: ModelShape) -> list[Weight]:
    return [weight for weight in weights(config) if not weight.keys[0].endswith(".expert_bias")]


def weight_name(weight: Weight) -> str:
    """Return the name of a weight of the table in Megatron's modules, with its layer."""
    name = weight.keys[0].replace(LAYERS, f"{LAYERS}{weight.layer}.", 1)
    return name.replace(".experts.experts.", ".experts.")


def _global_name(model: GPTModel, name: str) -> str:
    """Return a parameter's name with the number of its layer in the whole model."""
    name = name.replace(MTP_MODEL_LAYER, ".transformer_layer.")
    name = _ONE_EXPERT.sub(r".experts.\1", name)
    found = re.match(rf"{re.escape(LAYERS)}(\d+)\.", name)
    if found is None:
        return name
    layer = model.decoder.layers[int(found[1])].layer_number - 1
    return f"{LAYERS}{layer}.{name[found.end() :]}"
