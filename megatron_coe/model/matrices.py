"""The weights that Muon updates, each of them one matrix or several.

A matrix is a weight of the table of names: an expert's gate projection, the queries, a latent's up
projection. Embedding, output layer, routers, norms, biases and iteration scales are AdamW's.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.gpt.gpt_model import GPTModel
from torch.nn import Parameter

from megatron_coe.hf.weight_names import ModelShape, Weight
from megatron_coe.model.freezing import global_names, trained_weights


def matrix_weights(config: ModelShape, frozen: Sequence[str] = ()) -> dict[str, Weight]:
    """Return the trained weights that consist of matrices, by name."""
    return {
        name: weight
        for name, weight in trained_weights(config, frozen).items()
        if not weight.padded  # a row per token id
        and ".router." not in name
        and all(len(shape) == 2 for shape in weight.parts.values())
    }


def matrix_parameters(model: GPTModel, config: ModelShape) -> dict[Parameter, Weight]:
    """Return the trained parameters of a stage's part of a model that consist of matrices."""
    known = matrix_weights(config)
    named = global_names(model).items()
    return {p: known[name] for p, name in named if name in known and p.requires_grad}
