"""Tables of a model's routing on a text: per router, per pair of iterations, per checkpoint.

There is one per router, one per pair of iterations, and one per checkpoint and the next.
Every key of a row is a column of a CSV file; docs/analysis.md defines each. Axis letters as in
`collect`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from megatron_coe.analysis import routing as measure
from megatron_coe.analysis.collect import Routing
from megatron_coe.analysis.heldout import CLASSES
from megatron_coe.analysis.mutual_information import (
    MutualInformation,
    Shuffle,
    any_token,
    permutation_test,
    same_label,
    shifted,
)
from megatron_coe.analysis.routing import Ints
from megatron_coe.model.moe.load_stats import load_stats

Row: TypeAlias = dict[str, Any]
"""A row of a table: texts and numbers by column."""

DISTANCES = (1, 2, 4, 8, 16)
"""Distances, in tokens, of the tokens whose experts are compared."""


@dataclass(frozen=True)
class Text:
    """Tokens in order: id, number of the sequence and class of each, all [T]."""

    ids: Ints
    sequences: Ints
    classes: Ints


@dataclass(frozen=True)
class PermutationTest:
    """Parameters of the permutation tests: shuffles per null hypothesis, and their seed."""

    permutations: int = 199
    seed: int = 0

    def __post_init__(self) -> None:
        if self.permutations < 1:
            raise ValueError(f"permutations={self.permutations}: at least 1 is needed")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give 0 or more")

    def run(self, first: Ints, second: Ints, sizes: tuple[int, int], shuffle: Shuffle) -> Row:
        """Run the test of labels [T, A] and [T, B] against one null hypothesis."""
        generator = np.random.default_rng(self.seed)
        found = permutation_test(first, second, sizes, shuffle, self.permutations, generator)
        return _as_row(found)


def router_rows(routing: Routing, text: Text, test: PermutationTest) -> Iterator[Row]:
    """Yield a row per layer and iteration: load, top-k probability mass, neighbors, token's id."""
    known, ids = np.unique(text.ids, return_inverse=True)
    N, shuffle = routing.experts, any_token(len(ids))
    for place, indices, probs in _routers(routing):
        counts = measure.expert_counts(indices, N)
        near = {
            f"consistency_{distance}": measure.local_consistency(indices, text.sequences, distance)
            for distance in DISTANCES
        }
        of_id = test.run(ids[:, None], indices, (len(known), N), shuffle)
        of_class = test.run(text.classes[:, None], indices, (len(CLASSES), N), shuffle)
        yield {
            **place,
            **asdict(load_stats(counts)),
            "weight": float(probs.sum(axis=-1).mean()),
            **near,
            "consistency_by_chance": measure.chance_overlap(counts, counts, indices.shape[1]),
            **_prefixed("token", of_id),
            **_prefixed("class", of_class),
        }


def transition_rows(routing: Routing, text: Text, test: PermutationTest) -> Iterator[Row]:
    """Yield a row per layer and iteration t but the last: assignments at t and t + 1 compared."""
    shuffles = {
        "any_token": any_token(len(text.ids)),
        "shifted": shifted(len(text.ids), least=_longest(text.sequences)),
        "same_token": same_label(text.ids),
    }
    N, K = routing.experts, routing.indices.shape[-1]
    for place, first, second, matrix in coactivations(routing):
        found = {name: test.run(first, second, (N, N), each) for name, each in shuffles.items()}
        of_first, of_second = (measure.expert_counts(indices, N) for indices in (first, second))
        yield {
            **place,
            **asdict(measure.transition(matrix)),
            "overlap": measure.overlap(first, second),
            "overlap_by_chance": measure.chance_overlap(of_first, of_second, K),
            "information": found["any_token"]["information"],
            **{
                f"{name}_{key}": value
                for name, row in found.items()
                for key, value in row.items()
                if key != "information"
            },
        }


def coactivations(routing: Routing) -> Iterator[tuple[Row, Ints, Ints, Ints]]:
    """Yield the co-activation of each layer and pair of iterations.

    Yields:
        Place, expert indices [T, K] at t and at t + 1, and co-activation matrix [N, N].
    """
    for layer, indices_CTK in zip(routing.layers, routing.indices, strict=True):
        for t, (first, second) in enumerate(itertools.pairwise(indices_CTK), start=1):
            place = {"model": routing.name, "layer": layer, "iteration": t}
            yield place, first, second, measure.coactivation(first, second, routing.experts)


def training_rows(routings: Sequence[Routing]) -> Iterator[Row]:
    """Yield a row per checkpoint, layer and iteration: compared with the previous and the last.

    Raises:
        ValueError: the checkpoints are not of one shape.
    """
    for one, other in itertools.pairwise(routings):
        if one.indices.shape != other.indices.shape or one.experts != other.experts:
            raise ValueError(f"{one.name} and {other.name} are not of one model: routers differ")
    for number, current in enumerate(routings):
        earlier, last = routings[max(0, number - 1)], routings[-1]
        places = zip(_routers(earlier), _routers(current), _routers(last), strict=True)
        for (_, before, _), (place, now, _), (_, final, _) in places:
            N, K = current.experts, now.shape[1]
            counts, of_before, of_final = (
                measure.expert_counts(indices, N) for indices in (now, before, final)
            )
            yield {
                **place,
                "divergence": measure.divergence(of_before, counts),
                "agreement": measure.overlap(before, now),
                "agreement_by_chance": measure.chance_overlap(of_before, counts, K),
                "saturation": measure.overlap(now, final),
                "saturation_by_chance": measure.chance_overlap(counts, of_final, K),
            }


def usage_rows(routing: Routing, text: Text) -> Iterator[Row]:
    """Yield a row per layer, iteration and expert: tokens it receives, in all and by class."""
    N = routing.experts
    for place, indices, _ in _routers(routing):
        table = measure.contingency(indices, text.classes[:, None], (N, len(CLASSES)))
        shares = table.sum(axis=1) / table.sum()
        for expert, row in enumerate(table.tolist()):
            yield {
                **place,
                "expert": expert,
                "tokens": sum(row),
                "share": float(shares[expert]),
                **dict(zip(CLASSES, row, strict=True)),
            }


def _routers(routing: Routing) -> Iterator[tuple[Row, Ints, measure.Floats]]:
    """Yield place, expert indices [T, K] and probabilities [T, K] of each router."""
    layers = zip(routing.layers, routing.indices, routing.probs, strict=True)
    for layer, indices_CTK, probs_CTK in layers:
        for t, (indices, probs) in enumerate(zip(indices_CTK, probs_CTK, strict=True), 1):
            yield {"model": routing.name, "layer": layer, "iteration": t}, indices, probs


def _as_row(found: MutualInformation) -> Row:
    return {**asdict(found), "excess": found.excess}


def _prefixed(prefix: str, row: Row) -> Row:
    return {f"{prefix}_{key}": value for key, value in row.items()}


def _longest(sequences: Ints) -> int:
    return int(np.bincount(sequences).max())
