"""Mutual information of two labels of a token, with permutation tests.

A token may have several labels on either side, such as its K experts at two iterations. The pair
(I, J) is then one label of each side of a random token, each drawn uniformly, and its information
is a lower bound of the information between the two sets.

Estimated from finitely many tokens, mutual information is biased upward: above 0 even for
independent labels. So it is also computed with the tokens of one side shuffled, many times. The
shuffle defines the null hypothesis:

    any_token    the two sides are independent
    shifted      they are independent, and each has its own order of tokens
    same_label   they are independent given a label, such as the token's id
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_coe.analysis.routing import Ints, contingency

Shuffle = Callable[[np.random.Generator], Ints]
"""A function that draws an order of the T tokens."""


def mutual_information(table: Ints) -> float:
    """Return I = Σ q_ij log(q_ij / (q_i q_j)) in nats, q being a table of counts over its sum."""
    total = table.sum()
    of_pairs, of_rows, of_columns = (
        _sum_of_n_log_n(counts) for counts in (table, table.sum(axis=1), table.sum(axis=0))
    )
    # Rounding may leave it slightly below 0.
    return max(0.0, float((of_pairs - of_rows - of_columns) / total + np.log(total)))


def _sum_of_n_log_n(counts: Ints) -> float:
    counts = counts[counts > 0]
    return float(counts @ np.log(counts))


@dataclass(frozen=True)
class MutualInformation:
    """Mutual information (nats) beside that of shuffled tokens.

    Attributes:
        information: of the tokens in their order.
        by_chance: mean over the shuffles, which is the estimate's bias under the null hypothesis.
        largest_by_chance: the largest of the shuffles.
        p: (1 + shuffles with at least as much) / (1 + shuffles): the p-value under the null
            hypothesis, never below 1 / (1 + shuffles).
    """

    information: float
    by_chance: float
    largest_by_chance: float
    p: float

    @property
    def excess(self) -> float:
        """Information without its bias; may be slightly negative."""
        return self.information - self.by_chance


def permutation_test(
    first_TA: Ints,
    second_TB: Ints,
    sizes: tuple[int, int],
    shuffle: Shuffle,
    permutations: int,
    generator: np.random.Generator,
) -> MutualInformation:
    """Compute the mutual information of labels, and of labels with the second ones shuffled.

    Args:
        first_TA: labels [T, A], numbered from 0.
        second_TB: labels [T, B], numbered from 0.
        sizes: numbers of labels on either side.
        shuffle: the null hypothesis.
        permutations: number of shuffles.
        generator: of the shuffles.
    """
    information = mutual_information(contingency(first_TA, second_TB, sizes))
    shuffled = np.array(
        [
            mutual_information(contingency(first_TA, second_TB[shuffle(generator)], sizes))
            for _ in range(permutations)
        ]
    )
    return MutualInformation(
        information,
        by_chance=float(shuffled.mean()),
        largest_by_chance=float(shuffled.max()),
        p=float((1 + (shuffled >= information).sum()) / (1 + permutations)),
    )


def any_token(tokens: int) -> Shuffle:
    """Return a shuffle that draws every order with the same probability."""
    return lambda generator: generator.permutation(tokens)


def shifted(tokens: int, least: int) -> Shuffle:
    """Return a shuffle that rotates the tokens by at least `least` in either direction."""
    if tokens < 2 * least:
        raise ValueError(f"{tokens} tokens cannot be rotated by {least} or more: use more text")
    order = np.arange(tokens)
    return lambda generator: np.roll(order, generator.integers(least, tokens - least + 1))


def same_label(label_T: Ints) -> Shuffle:
    """Return a shuffle that exchanges only tokens of the same label."""
    order = np.argsort(label_T, kind="stable")
    sorted_T = label_T[order]

    def shuffle(generator: np.random.Generator) -> Ints:
        result = np.empty_like(order)
        result[order] = order[np.lexsort((generator.random(len(order)), sorted_T))]
        return result

    return shuffle
