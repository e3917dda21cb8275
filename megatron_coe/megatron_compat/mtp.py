"""Multi-token prediction (MTP): keep the current line from scaling its losses by layout.

With `calculate_per_token_loss`, 0.19 multiplies each MTP loss by (sum of the loss mask before
rolling) / max(sum after rolling, 1). Both sums are of one rank and one micro-batch, so that the
gradient depends on the layout and on how a batch is split; a mask that carries a scale is caught by
the 1. 0.16 has no such factor, nor has the objective of `megatron_coe.training.loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import gpt_model
from torch import Tensor

from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS


def install() -> None:
    """Take the factor out of the gradients of every `GPTModel`. Idempotent; nothing on 0.16."""
    if PARTS_ARE_PARTIALS and not hasattr(gpt_model.process_mtp_loss, "__wrapped__"):
        gpt_model.process_mtp_loss = _without_local_factor(gpt_model.process_mtp_loss)


def _without_local_factor(process_mtp_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's function with gradients divided by the factor that it multiplies them by.

    The losses themselves stay as they are: Megatron logs them before they meet the factor.
    """

    @functools.wraps(process_mtp_loss)
    def process(
        *,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **others: Any,
    ) -> Tensor:
        compute = compute_language_model_loss
        # Without labels Megatron shifts the mask once more: that form is left to it.
        if (
            labels is not None
            and loss_mask is not None
            and others["config"].calculate_per_token_loss
        ):
            compute = _dividing(compute, loss_mask, others["cp_group"], others["packed_seq_params"])
        return process_mtp_loss(
            labels=labels, loss_mask=loss_mask, compute_language_model_loss=compute, **others
        )

    return process


def _dividing(
    compute: Callable[[Tensor, Tensor], Tensor],
    loss_mask: Tensor,
    cp_group: object,
    packed_seq_params: object,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`compute`, called once per MTP layer in turn, with its losses' gradients over the factor."""
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    before = loss_mask.sum()
    rolled = loss_mask

    def compute_divided(labels: Tensor, logits: Tensor) -> Tensor:
        nonlocal rolled
        rolled, after = roll_tensor(
            rolled, shifts=-1, dims=-1, cp_group=cp_group, packed_seq_params=packed_seq_params
        )
        factor = before / after.clamp(min=1)
        factor = factor.where(before > 0, 1.0)  # nothing counts here: 0, not 0/0
        losses = compute(labels, logits)
        if losses.requires_grad:
            losses.register_hook(lambda gradient: gradient / factor)
        return losses

    return compute_divided
