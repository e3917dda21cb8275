"""Megatron's `GPTModel`, whose losses come from hidden states without logits in between.

Axis letters: S sequence (of this rank under sequence parallelism), B micro-batch, H hidden,
T = S * B tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from torch import Tensor

from megatron_coe.model.linear_cross_entropy import VocabShard, linear_cross_entropy


class LinearCrossEntropyModel(GPTModel):
    """A `GPTModel` with `cross_entropy_fusion_impl="linear"`.

    Where labels are given, `forward` returns the losses [B, S] as Megatron's does, and its output
    layer is not called; `loss_mask`, where it is given, must be what the losses' gradient is a
    multiple of (see `linear_cross_entropy`). Without labels it is Megatron's, with all logits.

    Megatron's own record of MTP losses and acceptance rates (`MTPLossLoggingHelper`) is not kept:
    the latter need logits.
    """

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None,
        loss_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        # An adapter around the output layer has weights of its own.
        adapted = self.post_process and type(self.output_layer) is not ColumnParallelLinear
        processed = others.get("output_processor") is not None
        if labels is None or not self.post_process or adapted or processed:
            others |= {"labels": labels, "loss_mask": loss_mask}
            return super()._postprocess(hidden_states, *args, **others)
        with self._without_output_layer():  # only the MTP layers, where this stage has them
            hidden_states = super()._postprocess(
                hidden_states, *args, labels=labels, loss_mask=loss_mask, **others
            )
        main_SBH, *later = hidden_states.chunk(1 + (self.config.mtp_num_layers or 0))
        if later:
            packed = others.get("packed_seq_params")
            main_SBH = self._attach_mtp_losses(main_SBH, later, labels, loss_mask, packed)
        return self._losses(main_SBH, labels, loss_mask)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the losses [B, S] of logits, where something else than this class made them.

        Raises:
            ValueError: the fused loss is asked for by name.
        """
        if self.config.cross_entropy_loss_fusion:
            raise ValueError(
                "cross_entropy_fusion_impl='linear' fuses Megatron's output layer only, and this "
                f"one is a {type(self.output_layer).__name__}. Leave cross_entropy_loss_fusion out"
            )
        return super().compute_language_model_loss(labels, logits)

    @contextmanager
    def _without_output_layer(self) -> Iterator[None]:
        """Let Megatron's `_postprocess` return hidden states, as on any other stage."""
        self.post_process = False
        try:
            yield
        finally:
            self.post_process = True

    def _losses(
        self, x_SBH: Tensor, labels_BS: Tensor, mask_BS: Tensor | None, detach: bool = False
    ) -> Tensor:
        """Compute the cross-entropy [B, S] of hidden states."""
        layer, group = self.output_layer, self.pg_collection.tp
        if layer.sequence_parallel:
            x_SBH = gather_from_sequence_parallel_region(x_SBH, group=group)
        elif group.size() > 1:
            x_SBH = copy_to_tensor_model_parallel_region(x_SBH, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else layer.weight
        if detach:
            weight = weight.detach()
        shard = VocabShard.of(self.config.vocab_size, len(weight), group)
        losses_T = linear_cross_entropy(
            x_SBH.flatten(0, 1),
            weight,
            labels_BS.t().flatten(),
            shard,
            None if mask_BS is None else mask_BS.t().flatten(),
        )
        return losses_T.view(x_SBH.shape[:2]).t().contiguous()

    def _attach_mtp_losses(
        self,
        main_SBH: Tensor,
        later: list[Tensor],
        labels_BS: Tensor,
        mask_BS: Tensor | None,
        packed: Any,
    ) -> Tensor:
        """Attach the losses of later tokens to the hidden states, as Megatron weighs them.

        Per token they are not scaled by the tokens of this rank and micro-batch, as 0.19 does; see
        `megatron_coe.megatron_compat.mtp`.
        """
        config = self.config
        if mask_BS is None:
            mask_BS = torch.ones_like(labels_BS, dtype=torch.float32)
        scale = config.mtp_loss_scaling_factor / config.mtp_num_layers
        detach = getattr(config, "mtp_detach_heads", False)
        where: dict[str, Any] = {"cp_group": self.cp_group, "packed_seq_params": packed}
        for x_SBH in later:
            labels_BS, _ = roll_tensor(labels_BS, shifts=-1, dims=-1, **where)
            mask_BS, count = roll_tensor(mask_BS, shifts=-1, dims=-1, **where)
            losses_BS = mask_BS * self._losses(x_SBH, labels_BS, mask_BS, detach) * scale
            if not config.calculate_per_token_loss:
                losses_BS = losses_BS / count.clamp(min=1)
            main_SBH = MTPLossAutoScaler.apply(main_SBH, losses_BS)
        return main_SBH
