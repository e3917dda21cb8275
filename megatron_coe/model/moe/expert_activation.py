"""What stands between an expert's two projections, times the router's weight, and its gradient.

The backward pass recomputes the activation from the first projection's output: a pointwise pass
is cheaper than saving [T, F] more of every iteration. Both directions take rows of any number of
experts, so a caller may go expert by expert while the rows are still in a CPU's cache.

Axis letters: T rows, F expert FFN size, O = 2F (gate over up) or F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertActivation(Protocol):
    """activation(hidden) * probs, by Megatron's rule.

    The product is in the wider dtype of the two, the result in that of the hidden rows.
    """

    def forward(self, hidden_TO: Tensor, probs_T1: Tensor) -> Tensor:
        """Return activation(hidden) * probs [T, F]."""

    def backward(
        self, hidden_TO: Tensor, probs_T1: Tensor, dy_TF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result once more [T, F], and the gradients of hidden [T, O] and probs [T, 1].

        `dy_TF` may be overwritten.
        """


class SwiGLU:
    """silu(gate) * up * probs, with few temporaries and both gradients in closed form."""

    def forward(self, hidden_TO: Tensor, probs_T1: Tensor) -> Tensor:
        gate, up = hidden_TO.chunk(2, dim=-1)
        return _weighted(F.silu(gate).mul_(up), probs_T1)

    def backward(
        self, hidden_TO: Tensor, probs_T1: Tensor, dy_TF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = hidden_TO.chunk(2, dim=-1)
        silu = F.silu(gate)
        y = silu * up
        dprobs = (y * dy_TF.to(probs_T1.dtype)).sum(-1, keepdim=True)
        dy_TF = _weighted(dy_TF, probs_T1)
        dhidden = torch.empty_like(hidden_TO)
        dgate, dup = dhidden.chunk(2, dim=-1)
        torch.mul(silu, dy_TF, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy_TF.mul_(up), gate, grad_input=dgate)
        return _weighted(y, probs_T1), dhidden, dprobs


class ByAutograd:
    """Any function (hidden [T, O], probs [T, 1]) -> [T, F], differentiated by autograd."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.forward = function

    def backward(
        self, hidden_TO: Tensor, probs_T1: Tensor, dy_TF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in (hidden_TO, probs_T1)]
        with torch.enable_grad():
            y = self.forward(*inputs)
        dhidden_TO, dprobs_T1 = torch.autograd.grad(y, inputs, dy_TF)
        return y.detach(), dhidden_TO, dprobs_T1


def _weighted(y_TF: Tensor, probs_T1: Tensor) -> Tensor:
    """Y * probs in y's dtype; overwrites y where its dtype is already the wider one."""
    if torch.promote_types(y_TF.dtype, probs_T1.dtype) == y_TF.dtype:
        return y_TF.mul_(probs_T1)
    return (y_TF * probs_T1).to(y_TF.dtype)
