"""Placement of a layer's experts on expert-parallel ranks, by the affinity of iterations.

A token's experts at iteration t and at t + 1 may lie on one rank: then the second all-to-all need
not move it. Which experts share a rank is a quadratic assignment problem, which scipy's solver
takes (after ExFlow, arXiv 2401.08383, which places the experts of consecutive layers).

Axis letters: N routed experts, T tokens, K experts per token and iteration.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_coe.analysis.collect import Routing
from megatron_coe.analysis.routing import Floats, Ints, coactivation, expert_counts
from megatron_coe.utils.tables import markdown_table

LARGEST_EP = 64
STARTS = 8
"""Random starts of the solver; the identity is another."""
_LARGEST_EXCHANGED = 128
"""Experts up to which the solution is improved by exchanges of two, which takes N^4 operations."""


@dataclass(frozen=True)
class Placement:
    """A placement of one layer's experts, and what it gains.

    Attributes:
        layer: its number, from 1.
        ep: ranks; each holds as many experts as the others.
        order: expert at each place [N]; the first N / ep are on the first rank.
        identity: share of pairs (expert at t, expert at t + 1) of a token that lie on one rank,
            experts in their own order; on tokens that the placement was not chosen by.
        placed: the same share in `order`, on the same tokens.
        fitted: the same share in `order`, on the tokens that it was chosen by.
        identity_load: tokens of the busiest rank over the mean, experts in their own order.
        placed_load: the same in `order`.
    """

    layer: int
    ep: int
    order: tuple[int, ...]
    identity: float
    placed: float
    fitted: float
    identity_load: float
    placed_load: float


def check_solver() -> None:
    """Check that the solver is installed.

    Raises: ValueError: it is not.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "placements of experts need the package scipy: `pip install scipy`"
        ) from error


def place_experts(routing: Routing, sequence_T: Ints, seed: int = 0) -> list[Placement]:
    """Place the experts of each layer for every expert-parallel size from 2 to 64 that divides N.

    Even sequences choose, odd ones measure.

    Args:
        routing: of a model with several iterations.
        sequence_T: number of the sequence that each token is of, [T].
        seed: of the solver's random starts.

    Raises:
        ValueError: the model has one iteration, or no size divides its experts.
    """
    N = routing.experts
    if routing.indices.shape[1] < 2:
        raise ValueError(f"{routing.name}: has one iteration, so no affinity to place experts by")
    sizes = [ep for ep in range(2, LARGEST_EP + 1) if N % ep == 0]
    chooses_T = sequence_T % 2 == 0
    if chooses_T.all() or not chooses_T.any():
        raise ValueError(f"{routing.name}: one sequence was read; read more text (--tokens)")
    found = []
    for layer, indices_CTK in zip(routing.layers, routing.indices, strict=True):
        chosen_by = affinity(indices_CTK[:, chooses_T], N)
        measured = affinity(indices_CTK[:, ~chooses_T], N)
        counts_N = expert_counts(indices_CTK[:, ~chooses_T], N)
        own_order = np.arange(N)
        for ep in sizes:
            order = best_order(chosen_by, ep, seed)
            found.append(
                Placement(
                    layer,
                    ep,
                    tuple(order.tolist()),
                    same_rank_share(measured, own_order, ep),
                    same_rank_share(measured, order, ep),
                    same_rank_share(chosen_by, order, ep),
                    load(counts_N, own_order, ep),
                    load(counts_N, order, ep),
                )
            )
    return found


def affinity(indices_CTK: Ints, experts: int) -> Ints:
    """Return the co-activation matrix [N, N] summed over all pairs of consecutive iterations."""
    pairs = itertools.pairwise(indices_CTK)
    return np.sum([coactivation(one, other, experts) for one, other in pairs], axis=0)


def same_rank_share(matrix_NN: Ints, order: Ints, ep: int) -> float:
    """Return the share of a co-activation matrix that lies within ranks."""
    placed = matrix_NN[np.ix_(order, order)]
    return float((placed * _one_rank(len(order), ep)).sum() / matrix_NN.sum())


def load(counts_N: Ints, order: Ints, ep: int) -> float:
    """Return the tokens of the busiest rank over the mean."""
    of_ranks = counts_N[order].reshape(ep, -1).sum(axis=1)
    return float(of_ranks.max() / of_ranks.mean())


def best_order(matrix_NN: Ints, ep: int, seed: int = 0) -> Ints:
    """Return the best order found: the expert at each place [N]; never worse than the identity.

    scipy's `quadratic_assignment` from several starts, by its method `faq`, then by exchanges of
    two experts.
    """
    from scipy.optimize import quadratic_assignment

    N, one_rank = len(matrix_NN), _one_rank(len(matrix_NN), ep)
    generator = np.random.default_rng(seed)
    common = {"maximize": True, "rng": generator}
    best: Ints = np.arange(N)
    for start in range(STARTS):
        options = {**common, "P0": "randomized" if start else "barycenter"}
        place_N = quadratic_assignment(matrix_NN, one_rank, "faq", options).col_ind
        best = _better(matrix_NN, best, np.argsort(place_N), ep)
    if N <= _LARGEST_EXCHANGED and 1 < ep < N:
        guess = np.column_stack([np.arange(N), np.argsort(best)])
        options = {**common, "partial_guess": guess}
        place_N = quadratic_assignment(matrix_NN, one_rank, "2opt", options).col_ind
        best = _better(matrix_NN, best, np.argsort(place_N), ep)
    return best


def _better(matrix_NN: Ints, one: Ints, other: Ints, ep: int) -> Ints:
    shares = [same_rank_share(matrix_NN, order, ep) for order in (one, other)]
    return other if shares[1] > shares[0] else one


def _one_rank(experts: int, ep: int) -> Floats:
    """Return which places are on one rank, [N, N] of 0 and 1."""
    return np.kron(np.eye(ep), np.ones((experts // ep, experts // ep)))


def as_table(placements: Sequence[Placement]) -> str:
    """Return the shares as Markdown, the layers' mean for each expert-parallel size."""
    rows = []
    for ep in sorted({placement.ep for placement in placements}):
        own = [placement for placement in placements if placement.ep == ep]
        means = [
            np.mean([getattr(one, name) for one in own])
            for name in ("identity", "placed", "identity_load", "placed_load")
        ]
        cells = [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{1 / ep:.3f}"]
        rows.append([f"{ep}", *cells, f"{means[2]:.2f}", f"{means[3]:.2f}"])
    head = ["EP", "on one rank", "placed", "1 / EP", "busiest rank / mean", "placed"]
    return markdown_table(head, rows)
