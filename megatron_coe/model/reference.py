"""The Chain-of-Experts layer in plain torch: the readable specification, and the tests' oracle.

Nothing here is shared with the layer that trains (`megatron_coe.model.moe`): a token meets its
experts in a loop, and every equation of the paper (arXiv 2506.18945, section 3) is one line.

Axis letters: S sequence, B batch, H hidden, N routed experts, K chosen per token and iteration,
C iterations, F feed-forward size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ReferenceCoE:
    """One CoE layer; all tensors in one dtype, on one device.

    Attributes:
        gates: C matrices [N, H], one router per iteration (the same one C times if shared).
        gate_up: [N, 2F, H], each expert's gate projection over its up projection.
        down: [N, H, F], each expert's down projection.
        shared: (gate_up [2F', H], down [H, F']) of the shared expert, or None.
        topk: K.
        residual: `inner` | `outer` | `addinit` | `inner_outer` | `none`.
        scaling: routed_scaling_factor, applied to the chosen scores.
        coe_weights: if upcycled, the iteration scales a_t [H] for t = 2 ... C; x(1) = f_1(x(0)).
    """

    gates: list[Tensor]
    gate_up: Tensor
    down: Tensor
    shared: tuple[Tensor, Tensor] | None
    topk: int
    residual: str = "inner"
    scaling: float = 1.0
    coe_weights: list[Tensor] | None = None

    def forward(self, x_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """Run the C iterations on x(0), the normed residual stream [S, B, H].

        Returns:
            x(C) [S, B, H], to which modes `outer` and `inner_outer` then add the residual stream,
            and the auxiliary loss of each iteration [C], a mean over the B sequences without
            coefficient.
        """
        x_0 = x = x_SBH
        losses = []
        for t, gate in enumerate(self.gates):
            score_SBN = self.scores(x, gate)
            update = self.experts(x, score_SBN)  # f_t(x(t-1))
            losses.append(self.aux_loss(score_SBN))
            bases: dict[str, Tensor | int]
            bases = {"inner": x, "inner_outer": x, "addinit": x_0, "outer": 0, "none": 0}
            if self.coe_weights is not None and t > 0:
                x = x + self.coe_weights[t - 1] * update
            else:
                x = bases[self.residual] + update
        return x, torch.stack(losses)

    def scores(self, x_SBH: Tensor, gate_NH: Tensor) -> Tensor:
        """Return the softmax over all routed experts [S, B, N], at least in fp32."""
        dtype = torch.promote_types(x_SBH.dtype, torch.float32)
        return F.softmax(F.linear(x_SBH.to(dtype), gate_NH.to(dtype)), dim=-1)

    def experts(self, x_SBH: Tensor, score_SBN: Tensor) -> Tensor:
        """Sum the top-k experts, weighted by their scores as they are, and the shared one."""
        chosen_SBK = score_SBN.topk(self.topk, dim=-1).indices
        rows = []
        for x_H, chosen, score in zip(
            x_SBH.flatten(0, 1), chosen_SBK.flatten(0, 1), score_SBN.flatten(0, 1), strict=True
        ):
            picked = [score[i] * swiglu(x_H, self.gate_up[i], self.down[i]) for i in chosen]
            rows.append(self.scaling * torch.stack(picked).sum(0))
        routed = torch.stack(rows).view_as(x_SBH).to(x_SBH.dtype)
        return routed if self.shared is None else routed + swiglu(x_SBH, *self.shared)

    def aux_loss(self, score_SBN: Tensor) -> Tensor:
        """Return DeepSeek's `seq_aux`: sum_i count_i / (S K / N) * mean_s score_i, mean over B."""
        S, _, N = score_SBN.shape
        chosen_SBK = score_SBN.topk(self.topk, dim=-1).indices
        count_BN = F.one_hot(chosen_SBK, N).sum(dim=(0, 2)).to(score_SBN.dtype)
        return (count_BN / (S * self.topk / N) * score_SBN.mean(dim=0)).sum(dim=-1).mean()


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return one expert's down(silu(gate(x)) * up(x)); x [..., H]."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
