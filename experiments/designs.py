"""Designs of a chain that the product does not have, in plain torch: to be screened first.

`ScreenedLayer` is the layer of `megatron_coe.model.reference` with options; without them it equals
the reference, which tests/unit/experiments/test_designs.py checks. It stands in for the layer of
`megatron_coe.hf`, whose attention, norms and embeddings it is trained with.

Axis letters: B batch, S sequence, T = B * S tokens, H hidden, N routed experts, K chosen per token
and iteration, C iterations, F feed-forward size, Z zero-computation experts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_coe.hf import CoeConfig, CoeForCausalLM
from megatron_coe.hf.modeling_coe import CoeRMSNorm
from megatron_coe.model.reference import swiglu

BIAS_RATE = 1e-3
"""Step of the bias of zero-computation experts, as that of DeepSeek-V3's experts."""


@dataclass(frozen=True)
class Design:
    """A layer of experts.

    Attributes:
        name: on the command line.
        title: in tables.
        iterations: C.
        topk: K.
        stream: carry the residual stream h through the chain, x(t) = x(t-1) + f_t(norm_t(x(t-1)))
            from x(0) = h; one such iteration is the standard MoE. False: the paper's `inner`, from
            x(0) = norm(h).
        norms: normalize the input of every iteration, not of the first alone.
        scale: x(t) = x(t-1) + a_t * f_t, a_t per channel, learned from this value; None: no scale.
        scaled_init: draw the experts' last matrices with a standard deviation divided by sqrt(C).
        shared_once: run the shared expert in the first iteration only.
        sees_first: routers after the first have a second matrix, for the chain's input.
        chain_balance: one balance loss over the assignments of all iterations.
        no_repeats: an iteration does not choose the experts that the token has passed already.
        zero_share: share of the assignments after the first iteration that a bias steers to K
            zero-computation experts.
        pooled: all layers share one pool of their experts, as many in all.
    """

    name: str
    title: str
    iterations: int = 2
    topk: int = 4
    stream: bool = False
    norms: bool = False
    scale: float | None = None
    scaled_init: bool = False
    shared_once: bool = False
    sees_first: bool = False
    chain_balance: bool = False
    no_repeats: bool = False
    zero_share: float = 0.0
    pooled: bool = False


DESIGNS = {
    design.name: design
    for design in [
        Design("moe", "standard MoE(8/64)", iterations=1, topk=8, stream=True),
        Design("moe_inner", "the paper's baseline: a chain of one, 8/64", iterations=1, topk=8),
        Design("chain", "CoE-2(4/64), the paper's"),
        Design("stream", "residual stream carried through the chain", stream=True),
        Design(
            "stream_shared-once",
            "the same, shared expert in the first iteration only",
            stream=True,
            shared_once=True,
        ),
        Design("norms", "norm before every iteration", norms=True),
        Design("scale", "scale per iteration and channel, from 0.1", scale=0.1),
        Design("init", "experts' initialization scaled by 1/sqrt(C)", scaled_init=True),
        Design("shared-once", "shared expert in the first iteration only", shared_once=True),
        Design("sees-first", "routers see x(0) as well", sees_first=True),
        Design("chain-balance", "balance loss over the whole chain", chain_balance=True),
        Design("no-repeats", "no expert twice for a token", no_repeats=True),
        Design("depth", "a quarter of later assignments to zero experts", zero_share=0.25),
        Design(
            "stream_depth",
            "the same, with the stream carried through",
            stream=True,
            zero_share=0.25,
        ),
        Design(
            "moe_pooled",
            "standard MoE, one pool for both layers",
            iterations=1,
            topk=8,
            stream=True,
            pooled=True,
        ),
        Design(
            "stream_pooled", "stream carried, one pool for both layers", stream=True, pooled=True
        ),
    ]
}
"""The standard MoE first, then the paper's baseline and chain."""


class Experts(nn.Module):
    """A pool of routed experts."""

    def __init__(self, config: CoeConfig, experts: int, last_std: float) -> None:
        super().__init__()
        H, F_, std = config.hidden_size, config.moe_intermediate_size, config.initializer_range
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * F_, H) * std)
        self.down = nn.Parameter(torch.randn(experts, H, F_) * last_std)

    def forward(self, x_TH: Tensor, indices_TK: Tensor, probs_TK: Tensor) -> Tensor:
        """Sum each token's experts, weighted; an index of N or more is a zero-computation one."""
        N, K = len(self.down), indices_TK.shape[1]
        order = indices_TK.flatten().argsort(stable=True)
        counts = torch.bincount(indices_TK.flatten(), minlength=N)[:N].tolist()
        order = order[: sum(counts)]
        rows = x_TH[order // K].split(counts)
        weights = zip(self.gate_up.unbind(), self.down.unbind(), strict=True)
        outputs = [swiglu(part, *own) for part, own in zip(rows, weights, strict=True)]
        weighted = torch.cat(outputs) * probs_TK.flatten()[order, None]
        return torch.zeros_like(x_TH).index_add(0, order // K, weighted)


class Router(nn.Module):
    """The router of an iteration."""

    zero_bias: Tensor

    def __init__(self, config: CoeConfig, design: Design, experts: int, first: bool) -> None:
        super().__init__()
        self.topk = design.topk
        self.zeros = 0 if first or not design.zero_share else design.topk
        self.share = design.zero_share
        self.weight = nn.Parameter(torch.empty(experts + self.zeros, config.hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.second = None
        if design.sees_first and not first:
            self.second = nn.Parameter(torch.empty_like(self.weight))
            nn.init.kaiming_uniform_(self.second, a=math.sqrt(5))
        self.register_buffer("zero_bias", torch.zeros(()))

    def forward(
        self, x_BSH: Tensor, first_BSH: Tensor, passed_BSN: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route x(t-1).

        Args:
            first_BSH: the chain's input.
            passed_BSN: experts not to be chosen; None: there are none.

        Returns: scores of the routed experts [B, S, N], indices [B, S, K], their scores [B, S, K].
        """
        logits = F.linear(x_BSH, self.weight)
        if self.second is not None:
            logits = logits + F.linear(first_BSH, self.second)
        scores = logits.softmax(dim=-1)
        N = scores.shape[-1] - self.zeros
        choosing = scores.detach()
        if passed_BSN is not None:
            choosing = choosing.masked_fill(passed_BSN, -1.0)
        if self.zeros:
            choosing = torch.cat([choosing[..., :N], choosing[..., N:] + self.zero_bias], dim=-1)
        indices = choosing.topk(self.topk, dim=-1).indices
        if self.zeros and self.training:
            share = (indices >= N).double().mean()
            self.zero_bias += BIAS_RATE * torch.sign(self.share - share)
        return scores[..., :N], indices, scores.gather(-1, indices)


class ScreenedLayer(nn.Module):
    """The experts' part of a decoder layer, residual stream included: h [B, S, H] to h.

    After a pass in training `aux_loss` is its balance loss without coefficient, a mean over the
    sequences summed over iterations, and `passes` the experts that a token passed through.
    """

    def __init__(self, config: CoeConfig, design: Design, experts: Experts) -> None:
        super().__init__()
        self.design, self.experts = design, experts
        self.aux_loss, self.passes = torch.zeros(()), 0.0
        H, C, F_ = config.hidden_size, design.iterations, config.moe_intermediate_size
        N, std = len(experts.down), config.initializer_range
        norms = C if design.stream or design.norms else 1
        self.norms = nn.ModuleList(CoeRMSNorm(H, config.rms_norm_eps) for _ in range(norms))
        self.routers = nn.ModuleList(Router(config, design, N, first=t == 0) for t in range(C))
        self.shared_gate_up = nn.Parameter(torch.randn(2 * F_, H) * std)
        self.shared_down = nn.Parameter(torch.randn(H, F_) * last_std(config, design))
        self.scales = None
        if design.scale is not None:
            self.scales = nn.Parameter(torch.full((C, H), design.scale))

    def forward(self, h: Tensor) -> Tensor:
        """Run the chain on the residual stream; return the stream after the layer."""
        design = self.design
        x = h if design.stream else self.norms[0](h)
        first, passed, routed, self.passes = None, None, [], 0.0
        for t, router in enumerate(self.routers):
            u = self.norms[t](x) if design.stream or (design.norms and t) else x
            first = u if first is None else first
            scores, indices, probs = router(u, first, passed)
            routed.append((scores, indices))
            if design.no_repeats:
                chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
                passed = chosen if passed is None else passed | chosen
            flat = (u.flatten(0, 1), indices.flatten(0, 1), probs.flatten(0, 1))
            update = self.experts(*flat).view_as(u)
            self.passes += (indices < scores.shape[-1]).double().sum(-1).mean().item()
            if t == 0 or not design.shared_once:
                update = update + swiglu(u, self.shared_gate_up, self.shared_down)
                self.passes += 1
            if self.scales is not None:
                update = self.scales[t] * update
            x = x + update
        if self.training:
            self.aux_loss = balance_loss(routed, design.chain_balance)
        return x


def balance_loss(routed: list[tuple[Tensor, Tensor]], whole_chain: bool) -> Tensor:
    """Return DeepSeek's sequence-level balance loss, summed over iterations.

    Args:
        routed: scores [B, S, N] and indices [B, S, K] of each iteration.
        whole_chain: balance the assignments of all iterations together; the sum is as large.
    """
    counts, means = [], []
    for scores, indices in routed:
        S, N = scores.shape[1:]
        chosen = F.one_hot(indices, max(N, int(indices.max()) + 1))[..., :N].sum(dim=(1, 2))
        counts.append(chosen.to(scores.dtype) * (N / (S * indices.shape[-1])))
        means.append(scores.mean(dim=1))
    count_CBN, mean_CBN = torch.stack(counts), torch.stack(means)
    if whole_chain:
        C = len(routed)
        return C * (count_CBN.mean(0) * mean_CBN.mean(0)).sum(-1).mean()
    return (count_CBN * mean_CBN).sum(-1).mean(-1).sum()


def last_std(config: CoeConfig, design: Design) -> float:
    """Return the standard deviation of the experts' last matrices."""
    scale = math.sqrt(design.iterations) if design.scaled_init else 1
    return config.initializer_range / scale


def build_model(config: CoeConfig, design: Design) -> CoeForCausalLM:
    """Build a model whose layers of experts are of a design; the rest is that of `config`."""
    config = copy.deepcopy(config)
    config.aux_loss_alpha = 0.0  # the layers keep their own
    model = CoeForCausalLM(config)
    layers: Any = model.model.layers
    count = config.n_routed_experts * (len(layers) if design.pooled else 1)
    pool = None
    for layer in layers:
        if pool is None or not design.pooled:
            pool = Experts(config, count, last_std(config, design))
        layer.mlp = ScreenedLayer(config, design, pool)
        layer.post_attention_layernorm = nn.Identity()
        layer.adds_residual = False
    return model


def layers_of(model: CoeForCausalLM) -> list[ScreenedLayer]:
    """Return the layers of experts."""
    layers: Any = model.model.layers
    return [layer.mlp for layer in layers]
