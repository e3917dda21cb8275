"""Routing analysis of a model, or of the checkpoints of a run, on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_coe import generation
from megatron_coe.analysis import routing_tables
from megatron_coe.analysis.collect import (
    Routing,
    collect,
    find_models,
    random_model,
    run_name,
    trained_mode,
)
from megatron_coe.analysis.heldout import Source, sequence_numbers, token_classes
from megatron_coe.analysis.placement import place_experts
from megatron_coe.analysis.results import RANDOM, Analysis
from megatron_coe.analysis.routing import Ints
from megatron_coe.analysis.routing_tables import PermutationTest, Text
from megatron_coe.utils.tables import markdown_table


def analyze(
    load: Path,
    source: Source,
    test: PermutationTest,
    *,
    device: torch.device,
    control: bool = False,
    placed: bool = False,
    batch_size: int = 8,
    tokenizer: Path | None = None,
    log: Callable[[str], object] = print,
) -> Analysis:
    """Run the text through every model under `load` and analyze its routing.

    Args:
        load: a Hugging Face folder, a checkpoint, or a run (see `find_models`).
        source: held-out text.
        test: the permutation test of mutual information.
        control: analyze a model of the last one's shape with initial weights as well.
        placed: place the experts of the last model on ranks as well.
        batch_size: sequences per forward pass.
        tokenizer: for checkpoints without a copy of their own.
        log: receives progress messages.

    Raises:
        ValueError: there is no model or not enough text, or they do not fit together.
        OSError: a file cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 is needed")
    dtype = torch.float32 if device.type == "cpu" else None
    text, sequences, routings = None, [], []
    models = find_models(load)
    for path in models:
        log(f"{path}: running the text through the model")
        generator, _ = generation.load(path, [], dtype=dtype, device=device, tokenizer=tokenizer)
        model = generator.model
        if text is None:
            sequences = source.read(generator.tokenizer, model.config, trained_mode(path))
            ids = np.concatenate(sequences)
            classes = token_classes(ids, generator.tokenizer)
            text = Text(ids, sequence_numbers(sequences), classes)
        routings.append(collect(model, sequences, path.name, batch_size))
    assert text is not None
    analysis = Analysis({"run": run_name(models[-1]), **_about(routings, source, sequences, test)})
    analysis.training = list(routing_tables.training_rows(routings))
    if placed:
        log(f"{routings[-1].name}: placing its experts")
        analysis.placements = place_experts(routings[-1], text.sequences, test.seed)
    if control:
        routings.append(_control(model, sequences, test.seed, batch_size))
    for routing in routings:
        log(f"{routing.name}: measuring {text.ids.size:,} tokens, {test.permutations} shuffles")
        _add_tables(analysis, routing, text, test)
    for routing in routings[len(models) - 1 :]:
        _add_matrices(analysis, routing)
    return analysis


def _add_tables(analysis: Analysis, routing: Routing, text: Text, test: PermutationTest) -> None:
    analysis.routers += routing_tables.router_rows(routing, text, test)
    analysis.transitions += routing_tables.transition_rows(routing, text, test)
    analysis.usage += routing_tables.usage_rows(routing, text)


def _add_matrices(analysis: Analysis, routing: Routing) -> None:
    for place, _, _, matrix in routing_tables.coactivations(routing):
        key = (routing.name, int(place["layer"]))
        analysis.matrices.setdefault(key, []).append(matrix)


def _control(
    model: PreTrainedModel, sequences: Sequence[Ints], seed: int, batch_size: int
) -> Routing:
    return collect(random_model(model, seed), sequences, RANDOM, batch_size)


def _about(
    routings: Sequence[Routing], source: Source, sequences: Sequence[Ints], test: PermutationTest
) -> dict[str, object]:
    last = routings[-1]
    _, C, T, K = last.indices.shape
    return {
        "models": [routing.name for routing in routings],
        "experts": last.experts,
        "topk": K,
        "iterations": C,
        "layers": list(last.layers),
        "data": [str(path) for path in source.paths],
        "tokens": T,
        "sequences": len(sequences),
        "permutations": test.permutations,
        "seed": test.seed,
    }


def as_table(analysis: Analysis) -> str:
    """Return the main results as Markdown.

    They are the mutual information of iterations, or the load of experts where C = 1.
    """
    return _transitions_table(analysis) if analysis.transitions else _routers_table(analysis)


def _routers_table(analysis: Analysis) -> str:
    head = ["model", "layer", "load entropy", "max / mean", "dead", "consistency"]
    rows = [
        [
            f"{row['model']}",
            f"{row['layer']}",
            f"{row['entropy']:.3f}",
            f"{row['max_over_mean']:.2f}",
            f"{row['dead']}",
            f"{row['consistency_1']:.3f} (by chance {row['consistency_by_chance']:.3f})",
        ]
        for row in analysis.routers
    ]
    return markdown_table(head, rows)


def _transitions_table(analysis: Analysis) -> str:
    head = ["model", "layer", "iterations", "information (nats)", "by chance, at most"]
    head += ["p: any token", "shifted", "same token", "beyond the token", "diagonal"]
    rows = [
        [
            f"{row['model']}",
            f"{row['layer']}",
            f"{row['iteration']} → {row['iteration'] + 1}",
            f"{row['information']:.4f}",
            f"{row['any_token_largest_by_chance']:.4f}",
            *(f"{row[f'{name}_p']:.3f}" for name in ("any_token", "shifted", "same_token")),
            f"{row['same_token_excess']:.4f}",
            f"{row['diagonal']:.3f} (by chance {row['diagonal_by_chance']:.3f})",
        ]
        for row in analysis.transitions
    ]
    return markdown_table(head, rows)
