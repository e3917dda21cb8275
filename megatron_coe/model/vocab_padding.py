"""Padding of the vocabulary: rows of the embedding tables that belong to no token.

Megatron pads the tables to a multiple that suits kernels and tensor parallelism, and its
cross-entropy takes every column of the logits for a token. The share of the probability that the
padding gets is then missing elsewhere, and differs with the layout.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup


def mask_vocab_padding(
    output_layer: torch.nn.Module, vocab_size: int, padded_vocab_size: int, tp_group: ProcessGroup
) -> None:
    """Give padding no probability, in all that is computed from an output layer's logits.

    Args:
        output_layer: a column-parallel linear layer with `padded_vocab_size` rows over all ranks of
            `tp_group`; those from `vocab_size` on are padding.
    """
    width = padded_vocab_size // get_pg_size(tp_group)
    first_id = get_pg_rank(tp_group) * width
    # The layer returns this rank's columns, or those of all ranks.
    starts = {padded_vocab_size: vocab_size, width: max(vocab_size - first_id, 0)}
    output_layer.register_forward_hook(partial(_mask_output, starts))


def _mask_output(
    starts: dict[int, int],
    _layer: torch.nn.Module,
    _inputs: tuple,
    output: tuple[Tensor, Tensor | None],
) -> None:
    logits, _ = output
    fill_padding(logits, starts[logits.shape[-1]])


def fill_padding(logits: Tensor, start: int) -> None:
    """Write the least number of their type into the logits from column `start` on, in place.

    Not an infinity: on a rank that holds padding alone, one less another would be NaN in a softmax
    that starts from each rank's own maximum. And past autograd, which would copy the gradient of
    all logits to clear these columns: a softmax hands exactly 0 back to them.
    """
    logits.data[..., start:].fill_(torch.finfo(logits.dtype).min)
