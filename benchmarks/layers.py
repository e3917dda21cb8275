"""Variants of the layer by itself: CoE's, Megatron's own called C times, and their ceiling.

All are set up as in training: wrapped by Megatron's `DistributedDataParallel`, whose buffer
receives every weight gradient. Variants that compute the same share their weights' memory, so that
they must agree.

Axis letters: S sequence, B batch, T = S * B tokens, H hidden, N routed experts, K experts per token
and iteration, C iterations, F feed-forward size of an expert, R = T * K dispatched tokens (rows).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from benchmarks.timing import Lap, Variant
from megatron_coe.megatron_compat.versions import build_part
from megatron_coe.model.backends.select import backend_of
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.flops import ffn_params, moe_work
from megatron_coe.model.layer_specs import get_coe_decoder_block_spec
from megatron_coe.model.moe.experts import GroupedExperts
from megatron_coe.model.moe.layer import CoELayer
from megatron_coe.model.provider import CoEModelProvider

FORWARD, BACKWARD = "forward", "backward"


class StockIterations(torch.nn.Module):
    """Megatron's `MoELayer` over `SequentialMLP`, called C times with a residual: no CoE code."""

    def __init__(self, config: CoEConfig) -> None:
        super().__init__()
        spec = get_moe_module_spec_for_backend(
            LocalSpecProvider(), num_experts=config.num_moe_experts, moe_grouped_gemm=False
        )
        self.iterations = config.coe_iterations
        self.layer: MoELayer = build_part(spec, config=replace(config))

    def forward(self, x_SBH: Tensor) -> Tensor:
        for _ in range(self.iterations):
            x_SBH = x_SBH + self.layer(x_SBH)[0]
        return x_SBH

    def share_weights(self, layer: CoELayer) -> None:
        """Share the storage of a CoE layer's weights, and let all its routers share one's."""
        for router in layer.router:
            router.weight.data = self.layer.router.weight.data
        self.share_experts(layer.experts)
        if layer.use_shared_expert:
            for name in ("linear_fc1", "linear_fc2"):
                ours = getattr(layer.shared_experts, name)
                getattr(self.layer.shared_experts, name).weight.data = ours.weight.data

    def share_experts(self, experts: GroupedExperts) -> None:
        """Share the storage of grouped experts' weights."""
        for index, expert in enumerate(self.layer.experts.local_experts):
            expert.linear_fc1.weight.data = experts.linear_fc1.weight.data[index]
            expert.linear_fc2.weight.data = experts.linear_fc2.weight.data[index]


def build_layer(provider: CoEModelProvider, device: torch.device) -> CoELayer:
    """Build a CoE layer from the model's specs, outside of a model."""
    block = get_coe_decoder_block_spec(provider, backend_of(provider))
    layer = build_part(block.layer_specs[0].submodules.mlp, config=provider)
    assert isinstance(layer, CoELayer)
    return layer.to(device, provider.params_dtype)


def build_stock(provider: CoEModelProvider, device: torch.device) -> StockIterations:
    """Build Megatron's layer of the same sizes; its residual is that of mode `inner`.

    Raises:
        ValueError: `coe_residual` is another.
    """
    if provider.coe_residual != "inner":
        raise ValueError(f"coe_residual={provider.coe_residual!r}: the stock layer needs 'inner'")
    return StockIterations(provider).to(device, provider.params_dtype)


@dataclass(frozen=True)
class PassVariant:
    """A module in training, its inputs and the gradients of its outputs."""

    name: str
    module: DistributedDataParallel
    xs: tuple[Tensor, ...]
    """Inputs, whose gradients are computed."""
    dys: tuple[Tensor, ...]
    flops: int
    tokens: int
    forward: Callable[..., tuple[Tensor, ...]]
    """A function that calls the module on the inputs."""

    def variant(self) -> Variant:
        """Return the variant, its parts forward and backward."""
        return Variant(self.name, self.run, self.prepare, self.flops, self.tokens)

    def prepare(self) -> None:
        """Clear gradients, and reset the scale of auxiliary losses that a training step left."""
        self.module.zero_grad_buffer()
        for x in self.xs:
            x.grad = None
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=self.xs[0].device))

    def run(self, lap: Lap) -> None:
        """Run forward and backward, ending each part with `lap`."""
        ys = self.forward(self.module, *self.xs)
        lap(FORWARD)
        torch.autograd.backward(ys, self.dys)
        lap(BACKWARD)

    def work(self) -> None:
        """Run untimed. (It adds to the existing gradients.)"""
        self.run(lambda part: None)

    def result(self) -> dict[str, Any]:
        """Run once and return outputs and gradients of inputs and weights, by name.

        The weights' gradients tell most: beside the residual the output of freshly initialized
        experts is small.
        """
        self.prepare()
        ys = self.forward(self.module, *self.xs)
        torch.autograd.backward(ys, self.dys)
        found: dict[str, Any] = {f"output {i}": y.detach() for i, y in enumerate(ys)}
        found |= {f"gradient of input {i}": x.grad for i, x in enumerate(self.xs)}
        return found | weight_gradients(self.module.module)


def wrap_with_ddp(module: torch.nn.Module, provider: CoEModelProvider) -> DistributedDataParallel:
    """Wrap a module as `megatron_coe.distributed.train_state.build_model` wraps a model."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=provider.bf16)
    return DistributedDataParallel(config=provider, ddp_config=config, module=module)


def weight_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return accumulated gradients: of the routers, summed, and of the first and the last expert.

    Their names do not depend on how a module stores its weights.
    """
    layer = module.layer if isinstance(module, StockIterations) else module
    experts: Any = layer.experts if isinstance(layer, MoELayer) else layer
    found: dict[str, Tensor] = {}
    if isinstance(layer, MoELayer):
        found["gradient of routers"] = sum(p.main_grad for p in layer.router.parameters())
    for linear in ("linear_fc1", "linear_fc2"):
        if isinstance(experts, GroupedExperts):
            gradients = getattr(experts, linear).weight.main_grad
        else:
            gradients = [getattr(e, linear).weight.main_grad for e in experts.local_experts]
        found |= {f"gradient of {linear}, expert {i}": gradients[i] for i in (0, -1)}
    return found


def layer_variant(
    name: str,
    module: CoELayer | StockIterations,
    provider: CoEModelProvider,
    batch: tuple[Tensor, Tensor],
) -> PassVariant:
    """Return a layer as a variant, on x [S, B, H] and the gradient of its output."""

    def forward(module: torch.nn.Module, x_SBH: Tensor) -> tuple[Tensor, ...]:
        output = module(x_SBH)
        return (output[0] if isinstance(output, tuple) else output,)

    x, dy = batch
    tokens = x.shape[0] * x.shape[1]
    flops = 6 * moe_work(provider).macs * tokens
    x = x.clone().requires_grad_()
    return PassVariant(name, wrap_with_ddp(module, provider), (x,), (dy,), flops, tokens, forward)


def random_batch(
    provider: CoEModelProvider, sequences: int, device: torch.device, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw x [S, B, H] of unit variance, as after a norm, and a gradient of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    shape = (provider.seq_length, sequences, provider.hidden_size)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    return x.to(device, provider.params_dtype), dy.to(device, provider.params_dtype)


# --- routed experts alone -------------------------------------------------------------------------


def expert_flops(config: CoEConfig, rows: int) -> int:
    """Return the FLOPs of the routed experts on R rows: one product forward, two backward."""
    return 6 * rows * ffn_params(config, config.moe_ffn_hidden_size)


def natural_counts(config: CoEConfig, tokens: int, seed: int = 2) -> Tensor:
    """Draw the rows of each expert [N] as a fresh router assigns T tokens: uniformly."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, config.num_moe_experts, generator=generator)
    indices = scores.topk(config.moe_router_topk, dim=1).indices
    return torch.bincount(indices.flatten(), minlength=config.num_moe_experts)


def experts_variant(
    name: str,
    experts: torch.nn.Module,
    provider: CoEModelProvider,
    tokens: int,
    device: torch.device,
) -> PassVariant:
    """Return the routed experts as a variant of C passes, each over its own, sorted rows."""
    rows = tokens * provider.moe_router_topk
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, provider.params_dtype)

    iterations = range(provider.coe_iterations)
    xs = tuple(random(rows, provider.hidden_size).requires_grad_() for _ in iterations)
    dys = tuple(random(rows, provider.hidden_size) for _ in iterations)
    probs = torch.rand(rows, generator=generator).to(device)
    counts = natural_counts(provider, tokens).to(device)

    def forward(experts: torch.nn.Module, *xs: Tensor) -> tuple[Tensor, ...]:
        # Megatron's experts have no `shared_weights`.
        with getattr(experts.module, "shared_weights", nullcontext)():
            return tuple(experts(x_RH, counts, probs)[0] for x_RH in xs)

    flops = expert_flops(provider, len(xs) * rows)
    return PassVariant(name, wrap_with_ddp(experts, provider), xs, dys, flops, tokens, forward)


def dense_variant(provider: CoEModelProvider, tokens: int, device: torch.device) -> Variant:
    """Return the ceiling: the multiplications of the routed experts in products of all rows.

    It is `torch.mm` into preallocated memory: up and gate, down, and for each the gradients of its
    input and of its weight.
    """
    rows, width = tokens * provider.moe_router_topk, provider.hidden_size
    ffn, passes = provider.moe_ffn_hidden_size, range(provider.coe_iterations)
    up_width = ffn_params(provider, ffn) // width - ffn  # 2F with a gate, F without

    def matrices(*shapes: tuple[int, int]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(s, device=device, dtype=provider.params_dtype) for s in shapes)

    shapes = ((rows, width), (rows, up_width), (rows, ffn), (up_width, width), (width, ffn))
    x_RH, hidden_RU, active_RF, up_UH, down_HF = matrices(*shapes)
    into_RH, into_RU, into_RF, into_UH, into_HF = matrices(*shapes)

    def run(lap: Lap) -> None:
        for _ in passes:
            torch.mm(x_RH, up_UH.t(), out=into_RU)
            torch.mm(active_RF, down_HF.t(), out=into_RH)
        lap(FORWARD)
        for _ in passes:
            torch.mm(x_RH, down_HF, out=into_RF)
            torch.mm(x_RH.t(), active_RF, out=into_HF)
            torch.mm(hidden_RU, up_UH, out=into_RH)
            torch.mm(hidden_RU.t(), x_RH, out=into_UH)
        lap(BACKWARD)

    return Variant(
        "dense matmul", run, flops=expert_flops(provider, len(passes) * rows), tokens=tokens
    )


def square_variant(device: torch.device) -> Variant:
    """Return a large square product, which shows what the machine's matrix units give at best."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b, into = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))

    def run(lap: Lap) -> None:
        torch.mm(a, b, out=into)
        lap(FORWARD)

    return Variant(f"{size}-cubed product", run, flops=2 * size**3)
