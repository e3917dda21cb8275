"""Small models, layers and their oracles, built alike by every test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_coe.megatron_compat.versions import (
    Part,
    build_part,
    experts_part,
    part_submodules,
    with_module,
)
from megatron_coe.model.backends.select import resolve_backend
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.layer_specs import get_coe_decoder_block_spec
from megatron_coe.model.moe.experts import GroupedExperts
from megatron_coe.model.moe.layer import CoELayer
from megatron_coe.model.moe.router import CoERouter, IterationRouters
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.model.reference import ReferenceCoE

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": 16,
    "num_moe_experts": 7,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": 16,
    "vocab_size": 96,
    "make_vocab_size_divisible_by": 1,
}
"""The shape of the golden models: seconds matter, and every part is there."""

BALANCE_COEFF = 0.01
"""Larger than the paper's 0.001, so that a wrong balance gradient stands out of rounding."""


def tiny_config(**changes) -> CoEConfig:
    return CoEConfig(**{**TINY, **changes})


def tiny_provider(**changes) -> CoEModelProvider:
    return CoEModelProvider(**{"seq_length": 20, **TINY, **changes})


def build_layer(config: CoEConfig, layer_class: type = CoELayer) -> CoELayer:
    """Build one layer of the same parts as the specs (tests/unit/model/test_layer_specs.py)."""
    return build_part(moe_part(config, layer_class), config=config, layer_number=1)


def moe_part(config: CoEConfig, layer_class: type = CoELayer) -> Part:
    """The part of a decoder layer's spec that describes an MoE layer over `GroupedExperts`."""
    stock = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=1)
    part = with_module(stock, layer_class)
    submodules = part_submodules(part)
    submodules.experts = experts_part(resolve_backend("torch").grouped_mlp_modules(True))
    if issubclass(layer_class, CoELayer):
        independent = config.coe_independent_gate
        submodules.router = IterationRouters if independent else CoERouter
    return part


def decoder_layer(config: CoEConfig, layer_class: type = CoELayer) -> TransformerLayer:
    """A whole decoder layer with a CoE layer, or with another MoE layer over the same experts."""
    spec = get_coe_decoder_block_spec(config, resolve_backend("torch")).layer_specs[0]
    if layer_class is not CoELayer:
        spec.submodules.mlp = moe_part(config, layer_class)
    return build_module(spec, config=config, layer_number=1)


def expert_matrices(
    experts: GroupedExperts, of: Callable[[Tensor], Tensor] = lambda weight: weight
) -> tuple[Tensor, Tensor]:
    """(gate over up [N, 2F, H], down [N, H, F]) of the experts' weights, or of what `of` takes."""
    return of(experts.linear_fc1.weight), of(experts.linear_fc2.weight)


def reference_of(layer: CoELayer) -> tuple[ReferenceCoE, list[tuple[str, Callable, Tensor]]]:
    """The oracle with copies of a layer's weights.

    Returns also, for each of the layer's parameters, its name, a function that gives its gradient
    in the oracle's shape, and the oracle's leaf whose gradient it should be.
    """
    config, independent = layer.config, layer.config.coe_independent_gate
    pairs: list[tuple[str, Callable, Tensor]] = []

    def leaf(name: str, value: Tensor, grad_of: Callable[[], Tensor]) -> Tensor:
        copy = value.detach().clone().requires_grad_()
        pairs.append((name, grad_of, copy))
        return copy

    def same(name: str) -> Tensor:
        parameter = layer.get_parameter(name)
        return leaf(name, parameter, lambda: parameter.grad)

    names = [f"router.{t}.weight" for t in range(config.coe_iterations)]
    gates = [same(name) for name in (names if independent else ["router.weight"])]
    matrices = expert_matrices(layer.experts)
    gate_up, down = (
        leaf(
            f"experts.{name}",
            matrices[i],
            lambda i=i: expert_matrices(layer.experts, of=lambda weight: weight.grad)[i],
        )
        for i, (name, _) in enumerate(layer.experts.named_parameters())
    )
    shared = None
    if layer.use_shared_expert:
        shared = tuple(same(f"shared_experts.linear_fc{i}.weight") for i in (1, 2))
    coe_weights = None
    if config.coe_upcycled:
        coe_weights = [same(f"coe_weights.{t}") for t in range(1, config.coe_iterations)]
    reference = ReferenceCoE(
        gates=gates if independent else gates * config.coe_iterations,
        gate_up=gate_up,
        down=down,
        shared=shared,
        topk=config.moe_router_topk,
        residual=config.coe_residual,
        scaling=config.moe_router_topk_scaling_factor or 1.0,
        coe_weights=coe_weights,
    )
    return reference, pairs


def randomize(module: torch.nn.Module, generator: torch.Generator, std: float = 0.3) -> None:
    """Fresh weights, large enough that every part of the layer shows in its output."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * noise)


def weigh_balance_losses(weight: float) -> None:
    """What Megatron's schedule does before each backward pass, for a layer used by itself."""
    # The shape that the schedule gives it, and keeps: it stays set for whoever comes next.
    device = torch.cuda.current_device()
    scale = torch.full((1,), float(weight), device=device)
    MoEAuxLossAutoScaler.main_loss_backward_scale = scale


class GapRecorder(ReferenceCoE):
    """Notes how far apart a token's K-th and next score ever come."""

    smallest_gap = float("inf")

    def scores(self, x_SBH: Tensor, gate_NH: Tensor) -> Tensor:
        scores = super().scores(x_SBH, gate_NH)
        if self.topk < len(gate_NH):
            best = scores.sort(dim=-1, descending=True).values
            gaps = best[..., self.topk - 1] - best[..., self.topk]
            # A SwiGLU is quadratic near 0: what such a token's experts add is below any tolerance.
            gaps = gaps[x_SBH.abs().amax(dim=-1) > 1e-3]
            self.smallest_gap = min([self.smallest_gap, *gaps.flatten().tolist()])
        return scores


@torch.no_grad()
def clear_of_ties(reference: ReferenceCoE, x_SBH: Tensor, gap: float) -> bool:
    """Whether rounding errors below `gap` cannot swap two experts anywhere in any iteration."""
    recorder = GapRecorder(**vars(reference))
    recorder.forward(x_SBH)
    return recorder.smallest_gap > gap
