"""Numerical agreement of variants that must compute the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest ||a - b|| / ||b||. Variants sum in different orders, and sometimes a tie between two
experts falls the other way: a token then differs completely, one of thousands in fp32, one of
hundreds in bf16. (One pass more or less makes a difference of about 1.)"""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return ||ours - theirs|| / ||theirs||; 0 where both are zero."""
    gap = torch.linalg.vector_norm(ours.double() - theirs.double())
    norm = torch.linalg.vector_norm(theirs.double())
    return float(gap / norm) if norm > 0 else float(gap)


def check_agreement(
    names: tuple[str, str],
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Compare the values that both variants name.

    Args:
        names: of the two variants.
        ours: values by name.
        theirs: values by name.
        dtype: that both compute in (their gradients may be kept in a wider one).

    Returns:
        The relative difference of each value.

    Raises:
        ValueError: one is larger than the tolerance of the dtype (fp32: 1e-3, bf16: 0.2), or they
            have no value in common.
    """
    differences = {}
    for name in ours.keys() & theirs.keys():
        value = difference(ours[name], theirs[name])
        tolerance = TOLERANCES[dtype]
        if not value <= tolerance:  # nan too
            raise ValueError(
                f"variants {names[0]!r} and {names[1]!r} do not compute the same: {name} differs "
                f"by {value:.1e} of its norm, allowed is {tolerance:.0e}"
            )
        differences[name] = value
    if not differences:
        raise ValueError(
            f"variants {names[0]!r} and {names[1]!r} have no value in common to compare"
        )
    return differences
