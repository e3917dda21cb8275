"""The loss that training minimizes, the same for every micro-batch size and layout.

    L = (1/N) * sum of cross-entropy over the N valid tokens of the global batch
      + coefficient * mean over its sequences of the aux loss, summed over layers and iterations

With multi-token prediction, the cross-entropy of each later token joins the first sum, weighted by
`mtp_loss_scaling_factor / mtp_num_layers`.

Megatron's own default is a mean of means: it divides by the micro-batches and by the data-parallel
ranks, and a token of a short micro-batch counts for more. With `calculate_per_token_loss` it sums
gradients. They are divided by all P positions of the global batch, valid or not, which is also what
the auxiliary losses are scaled by (`megatron_coe.model.moe.router`), as the backward pass starts or
when it is done (`megatron_coe.training.optimizer_step`); N is counted before the step, and the
cross-entropy is scaled by P / N.

Axis letters: B sequences of the micro-batch, S positions of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def count_valid_tokens(batches: Sequence[Batch], group: dist.ProcessGroup) -> torch.Tensor:
    """Count N, the valid positions in the micro-batches of all ranks of `group`.

    A float64 scalar on the device: nothing on the host has to wait for it.

    `loss_mask` [B, S] is 1 where a position counts, and must cover whole sequences (it is counted
    before they are sharded over context-parallel ranks). One collective.
    """
    count = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches]).sum()
    dist.all_reduce(count, group=group)
    return count


def loss_scale(valid_tokens: torch.Tensor, positions: int) -> torch.Tensor:
    """Return P / N, the scale of summed losses; without any valid token the loss is 0, not 0/0."""
    return positions / valid_tokens.clamp(min=1)


def make_loss_function(loss_mask_BS: torch.Tensor, scale: torch.Tensor) -> LossFunction:
    """Make the loss function of one micro-batch, as Megatron's `forward_backward_func` calls it.

    It takes the cross-entropy of every position [B, S] and returns the scaled sum, a scalar to
    differentiate; the number of positions; and for logging, detached in float64, [plain sum,
    number of valid tokens].
    """

    def loss_function(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # `where`, not a product: what stands at a masked position must not matter, finite or not.
        dtype = torch.promote_types(losses_BS.dtype, torch.float32)
        zero = losses_BS.new_zeros((), dtype=dtype)
        valid_BS = loss_mask_BS > 0
        kept_BS = torch.where(valid_BS, losses_BS.view_as(valid_BS).to(dtype), zero)
        loss_sum = kept_BS.detach().sum(dtype=torch.float64)
        # Filled on the device: a number that is copied there makes the host wait.
        positions = torch.full((), valid_BS.numel(), dtype=torch.int, device=losses_BS.device)
        logged = torch.stack([loss_sum, valid_BS.sum().double()])
        return kept_BS.sum() * scale.to(dtype), positions, logged

    return loss_function
