"""Routing statistics as plain functions of integer arrays.

Expert indices are the K experts that each token was assigned to, [T, K], in any order and all
different, tokens in the order of the text. Shares are of 1, entropies and divergences in nats.

Axis letters: T tokens, N routed experts, K experts per token and iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_coe.model.moe.load_stats import entropy

Ints = NDArray[np.integer]
Floats = NDArray[np.floating]


# --- one router -----------------------------------------------------------------------------------


def expert_counts(indices_TK: Ints, experts: int) -> Ints:
    """Count the tokens that each expert receives, [N]."""
    return np.bincount(indices_TK.reshape(-1), minlength=experts)


def overlap(first_TK: Ints, second_TK: Ints) -> float:
    """Return the share of a token's experts in both assignments: the mean of |A ∩ B| / K."""
    return float((first_TK[:, :, None] == second_TK[:, None, :]).any(axis=2).mean())


def chance_overlap(first_N: Ints, second_N: Ints, topk: int) -> float:
    """Return the expected `overlap` of two independent assignments: K Σ_i p_i q_i.

    An expert with the share p_i of all assignments is among a token's K with probability K p_i.

    Args:
        first_N: tokens that each expert receives in the first, [N].
        second_N: in the second, [N].
        topk: K.
    """
    return float(topk * (first_N / first_N.sum()) @ (second_N / second_N.sum()))


def local_consistency(indices_TK: Ints, sequence_T: Ints, distance: int = 1) -> float:
    """Return the `overlap` of the experts of tokens `distance` apart in the same sequence.

    NaN if no sequence is long enough.

    Args:
        indices_TK: expert indices, [T, K].
        sequence_T: number of the sequence that each token is of, [T].
        distance: in tokens.
    """
    together = sequence_T[distance:] == sequence_T[:-distance]
    if not together.any():
        return float("nan")
    return overlap(indices_TK[:-distance][together], indices_TK[distance:][together])


# --- from one iteration to the next ---------------------------------------------------------------


def coactivation(first_TK: Ints, second_TK: Ints, experts: int) -> Ints:
    """Return the paper's co-activation matrix M [N, N].

    M_ij counts the tokens whose experts are i, among others, at iteration t (rows) and j, among
    others, at t + 1 (columns); its sum is T K².
    """
    return contingency(first_TK, second_TK, (experts, experts))


def expected_coactivation(matrix_NN: Ints) -> Floats:
    """Return the expectation of M for independent assignments at t and t + 1 of the same load."""
    rows, columns = matrix_NN.sum(axis=1), matrix_NN.sum(axis=0)
    return np.outer(rows, columns) / matrix_NN.sum()


def contingency(first_TA: Ints, second_TB: Ints, sizes: tuple[int, int]) -> Ints:
    """Count how often each pair of a first and a second label belongs to one token."""
    rows, columns = sizes
    pairs = first_TA[:, :, None].astype(np.int64) * columns + second_TB[:, None, :]
    return np.bincount(pairs.reshape(-1), minlength=rows * columns).reshape(rows, columns)


@dataclass(frozen=True)
class Transition:
    """Statistics of a co-activation matrix; q = M / ΣM, with row sums p and column sums p'.

    Attributes:
        entropy: H(q) - H(p) = Σ_i p_i H(q_i· / p_i), divided by log N: the entropy of a token's
            expert at the next iteration, given one at this. 1: uniform.
        asymmetry: Σ |M - Mᵀ| / (2 ΣM). 0: i leads to j as often as j to i; 1: never both.
        diagonal: Σ_i q_ii, the share of pairs that are twice the same expert.
        diagonal_by_chance: Σ_i p_i p'_i, that of independent assignments of the same load.
        top_tenth: share of all pairs in the fullest tenth of the N² cells.
    """

    entropy: float
    asymmetry: float
    diagonal: float
    diagonal_by_chance: float
    top_tenth: float


def transition(matrix_NN: Ints) -> Transition:
    """Compute the statistics of a co-activation matrix [N, N]."""
    N, total = len(matrix_NN), matrix_NN.sum()
    rows, columns = matrix_NN.sum(axis=1), matrix_NN.sum(axis=0)
    most = np.sort(matrix_NN, axis=None)[::-1][: max(1, N * N // 10)]
    given = entropy(matrix_NN) - entropy(rows)
    return Transition(
        entropy=given / np.log(N) if N > 1 else 0.0,
        asymmetry=float(np.abs(matrix_NN - matrix_NN.T).sum() / (2 * total)),
        diagonal=float(np.trace(matrix_NN) / total),
        diagonal_by_chance=float((rows / total) @ (columns / total)),
        top_tenth=float(most.sum() / total),
    )


# --- from one checkpoint to the next --------------------------------------------------------------


def divergence(first_N: Ints, second_N: Ints) -> float:
    """Return the Jensen-Shannon divergence of two loads [N]: H((p + q) / 2) - (H(p) + H(q)) / 2.

    0 where they are equal, log 2 where no expert is used in both.
    """
    middle = first_N / first_N.sum() + second_N / second_N.sum()
    return max(0.0, entropy(middle) - (entropy(first_N) + entropy(second_N)) / 2)
