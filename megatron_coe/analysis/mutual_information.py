"""Do two labels of a token depend on one another? Mutual information against shuffled tokens.

A token may have several labels on either side, such as its K experts at two iterations: then the
pair (I, J) is one label of each side of a random token, each drawn evenly, and its information is a
lower bound of the information between the whole sets.

Estimated from finitely many tokens, mutual information is too large, and above 0 for independent
labels. So the same is computed with the tokens of one side shuffled, many times; what a shuffle
leaves in place is what the null hypothesis allows for:

    any_token    nothing: the two sides have nothing to do with one another
    shifted      the order: each side has its runs of like tokens, and nothing to do with the other
    same_label   a label, such as the token's id: beyond it, the sides have nothing in common
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_coe.analysis.routing import Ints, contingency

Shuffle = Callable[[np.random.Generator], Ints]
"""Draws an order of the T tokens."""


def mutual_information(table: Ints) -> float:
    """Return Σ q_ij log(q_ij / (q_i q_j)) in nats, of a table of counts; q is its distribution."""
    total = table.sum()
    of_pairs, of_rows, of_columns = (
        _sum_of_n_log_n(counts) for counts in (table, table.sum(axis=1), table.sum(axis=0))
    )
    # Rounding may leave a hair's breadth below 0.
    return max(0.0, float((of_pairs - of_rows - of_columns) / total + np.log(total)))


def _sum_of_n_log_n(counts: Ints) -> float:
    counts = counts[counts > 0]
    return float(counts @ np.log(counts))


@dataclass(frozen=True)
class Dependence:
    """Mutual information (nats) beside that of shuffled tokens.

    Attributes:
        information: of the tokens as they are.
        by_chance: mean over the shuffles, which is the estimate's bias under the null hypothesis.
        largest_by_chance: the largest of the shuffles.
        p: (1 + shuffles with at least as much) / (1 + shuffles): the probability of so much under
            the null hypothesis, never below 1 / (1 + shuffles).
    """

    information: float
    by_chance: float
    largest_by_chance: float
    p: float

    @property
    def excess(self) -> float:
        """Information without its bias; may be slightly negative."""
        return self.information - self.by_chance


def dependence(
    first_TA: Ints,
    second_TB: Ints,
    sizes: tuple[int, int],
    shuffle: Shuffle,
    permutations: int,
    generator: np.random.Generator,
) -> Dependence:
    """Return mutual information of labels [T, A] and [T, B], and with the second ones shuffled.

    Args:
        sizes: how many labels there are on either side; they are numbered from 0.
    """
    information = mutual_information(contingency(first_TA, second_TB, sizes))
    shuffled = np.array(
        [
            mutual_information(contingency(first_TA, second_TB[shuffle(generator)], sizes))
            for _ in range(permutations)
        ]
    )
    return Dependence(
        information,
        by_chance=float(shuffled.mean()),
        largest_by_chance=float(shuffled.max()),
        p=float((1 + (shuffled >= information).sum()) / (1 + permutations)),
    )


def any_token(tokens: int) -> Shuffle:
    """Return every order alike."""
    return lambda generator: generator.permutation(tokens)


def shifted(tokens: int, least: int) -> Shuffle:
    """Return the same order begun elsewhere: rotated by at least `least` tokens."""
    if tokens < 2 * least:
        raise ValueError(f"{tokens} tokens cannot be moved on by {least} or more: use more text")
    order = np.arange(tokens)
    return lambda generator: np.roll(order, generator.integers(least, tokens - least + 1))


def same_label(label_T: Ints) -> Shuffle:
    """Return every order that puts a token only where one of the same label stood."""
    order = np.argsort(label_T, kind="stable")
    sorted_T = label_T[order]

    def shuffle(generator: np.random.Generator) -> Ints:
        result = np.empty_like(order)
        result[order] = order[np.lexsort((generator.random(len(order)), sorted_T))]
        return result

    return shuffle
