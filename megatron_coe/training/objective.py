"""What training minimises, whatever the micro-batch size or the layout.

    L = (1/N) * sum of cross-entropy over the N valid tokens of the global batch
      + coefficient * mean over its sequences of the balance loss, summed over layers and iterations

Megatron divides what a loss function returns by the number of micro-batches, and DDP divides
gradients by the number of replicas: a mean of means, in which a token of a short micro-batch counts
for more. N is therefore counted before the step, and each micro-batch returns

    (num_microbatches * data_parallel_size / N) * (sum of its cross-entropy),

from which Megatron's two divisions leave exactly the first term. The balance loss is a mean over
sequences, of which all micro-batches hold equally many, and it enters through Megatron's
`MoEAuxLossAutoScaler` under the same two divisions: it needs no correction here.

Axis letters: B sequences of the micro-batch, S positions of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def count_valid_tokens(batches: Sequence[Batch], group: dist.ProcessGroup) -> int:
    """N: the positions that count in the loss, over the micro-batches of all replicas of `group`.

    `loss_mask` [B, S] is 1 where a position counts, and must cover whole sequences (it is counted
    before they are shared between context-parallel ranks). One collective.
    """
    count = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches]).sum()
    dist.all_reduce(count, group=group)
    return round(count.item())


def loss_scale(valid_tokens: int, num_microbatches: int, data_parallel_size: int) -> float:
    """Factor of a micro-batch's summed loss; without any valid token the loss is 0, not 0/0."""
    return num_microbatches * data_parallel_size / max(valid_tokens, 1)


def make_loss_function(loss_mask_BS: torch.Tensor, scale: float) -> LossFunction:
    """The loss function of one micro-batch, as Megatron's `forward_backward_func` calls it.

    It takes the cross-entropy of every position [B, S] and returns the scaled loss, a scalar to
    differentiate, and for the report, detached in float64, [plain sum, number of valid tokens].
    """

    def loss_function(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # `where`, not a product: what stands at a masked position must not matter, finite or not.
        dtype = torch.promote_types(losses_BS.dtype, torch.float32)
        zero = losses_BS.new_zeros((), dtype=dtype)
        valid_BS = loss_mask_BS > 0
        kept_BS = torch.where(valid_BS, losses_BS.view_as(valid_BS).to(dtype), zero)
        loss_sum = kept_BS.detach().sum(dtype=torch.float64)
        return kept_BS.sum() * scale, torch.stack([loss_sum, valid_BS.sum().double()])

    return loss_function
