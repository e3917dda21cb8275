"""All experts' feed-forward networks as one autograd function: fc1, activation * probs, fc2.

For backward each call saves its input, fc1's output and the router's weights of the rows; the
activation is recomputed there. The iterations of one layer share a node through which the weights
enter (`SharedWeights`): autograd runs it once, after the backward passes of all iterations, so that
is where a parameter's gradient is complete, whatever the layout, schedule or number of iterations.

Axis letters: T rows sorted by expert, E experts, H hidden, F expert FFN size, O = 2F (gate over up)
or F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_coe.model.moe.expert_activation import ExpertActivation, SwiGLU
from megatron_coe.model.moe.fused_mlp import fused_backward, fused_forward
from megatron_coe.model.moe.grouped_linear import BACKENDS, Backend, Grouping, Products

Parameters = tuple[torch.nn.Parameter, torch.nn.Parameter]


class SharedWeights:
    """The expert weights [E, O, H] and [E, H, F] for any number of calls of one forward pass.

    Autograd sees one gradient per parameter, complete after the last call's backward pass.
    """

    def __init__(
        self,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        backend: Backend = BACKENDS["loop"],
    ):
        self.parameters, self.backend = (fc1, fc2), backend
        self.fc1, self.fc2 = _ShareWeights.apply(fc1, fc2, (fc1, fc2), backend)


def expert_mlp(
    x_TH: Tensor,
    probs_T1: Tensor,
    weights: SharedWeights,
    groups: Grouping,
    activation: ExpertActivation,
    fp8_hidden: bool = False,
) -> Tensor:
    """Return y_TH with y = fc2(activation(fc1(x)) * probs), each row by its expert; dtype of x.

    With `groups.order`, x and probs are the tokens' in their own order, [tokens, H], [tokens, K].

    Args:
        fp8_hidden: save fc1's output for backward in eight bits.
    """
    sinks = (weights.parameters, weights.backend)
    call = _Call(groups, activation, *sinks, torch.is_grad_enabled(), fp8_hidden)
    return _ExpertMLP.apply(x_TH, probs_T1, weights.fc1, weights.fc2, call)


@dataclass(frozen=True)
class _Call:
    groups: Grouping
    activation: ExpertActivation
    parameters: Parameters
    backend: Backend  # that of all calls; an empty one's own may be another
    differentiable: bool
    fp8_hidden: bool

    def main_grads(self) -> tuple[Tensor, Tensor] | None:
        return _main_grads(self.parameters, self.backend)


class _ShareWeights(torch.autograd.Function):
    """Hands the weights to the calls, and completes their gradients."""

    @staticmethod
    def forward(
        ctx: Any, fc1: Tensor, fc2: Tensor, parameters: Parameters, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        ctx.parameters, ctx.backend = parameters, backend
        ctx.set_materialize_grads(False)
        return fc1.view_as(fc1), fc2.view_as(fc2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dw1: Tensor | None, dw2: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if _main_grads(ctx.parameters, ctx.backend):
            # The calls have added to the buffers. Megatron's convention then
            # (tensor_parallel/layers.py): what autograd gets is an uninitialized stand-in, which
            # nobody reads, to say "there is a gradient".
            for weight in ctx.parameters:
                weight.grad_added_to_main_grad = True
            dw1, dw2 = (torch.empty_like(weight) for weight in ctx.parameters)
        return dw1, dw2, None, None


def _main_grads(parameters: Parameters, backend: Backend) -> tuple[Tensor, Tensor] | None:
    """Return Megatron's gradient buffers, where products can be added to them in place.

    That is on a CPU if they have the weights' dtype, on a GPU if the backend can.
    """
    found: list[Any] = [getattr(weight, "main_grad", None) for weight in parameters]
    usable = all(
        main is not None
        and (backend.adds_to_main_grad or (main.dtype == weight.dtype and not weight.is_cuda))
        for main, weight in zip(found, parameters, strict=True)
    )
    return (found[0], found[1]) if usable else None


class _ExpertMLP(torch.autograd.Function):
    """One call. Its weight gradients go on to `_ShareWeights`, or into Megatron's buffers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: _Call
    ) -> Tensor:
        x = x.contiguous()
        y, hidden = _implementation(call)[0](x, probs, fc1, fc2, call)
        ctx.call = call
        if call.differentiable:
            assert hidden is not None
            saved = hidden.to(torch.float8_e4m3fn) if call.fp8_hidden else hidden
            ctx.save_for_backward(x, probs, saved, fc1, fc2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, probs, hidden, fc1, fc2 = ctx.saved_tensors
        _, _, wants_dw1, wants_dw2, _ = ctx.needs_input_grad
        call = ctx.call
        run = _implementation(call)[1]
        # A sum's gradient has strides of zero, which grouped_mm refuses.
        dx, dprobs, dweights = run(
            x, probs, hidden.to(x.dtype), dy.contiguous(), fc1, fc2, call, wants_dw1 or wants_dw2
        )
        return dx, dprobs, *(dweights or (None, None)), None


def _implementation(call: _Call) -> tuple[Callable, Callable]:
    """Return the functions that run a call forward and backward."""
    if call.groups.backend is BACKENDS["loop"]:
        return _forward_loop, _backward_loop
    if call.groups.backend is BACKENDS["triton"] and isinstance(call.activation, SwiGLU):
        return _forward_fused, _backward_fused
    return _forward_grouped, _backward_grouped


def _forward_fused(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: _Call
) -> tuple[Tensor, Tensor]:
    return fused_forward(x, probs, fc1, fc2, call.groups)


def _backward_fused(
    x: Tensor,
    probs: Tensor,
    hidden: Tensor,
    dy: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    call: _Call,
    wants_dw: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    into = call.main_grads()
    return fused_backward(x, probs, hidden, dy, fc1, fc2, call.groups, into, wants_dw)


def _forward_grouped(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: _Call
) -> tuple[Tensor, Tensor]:
    products = cast(Products, call.groups.backend)
    hidden = products.times_transposed(x, fc1, call.groups)
    activated = call.activation.forward(hidden, probs)
    return products.times_transposed(activated, fc2, call.groups), hidden


def _backward_grouped(
    x: Tensor,
    probs: Tensor,
    hidden: Tensor,
    dy: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    call: _Call,
    wants_dw: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    products, groups = cast(Products, call.groups.backend), call.groups
    dactivated = products.times(dy, fc2, groups)
    activated, dhidden, dprobs = call.activation.backward(hidden, probs, dactivated)
    dx = products.times(dhidden, fc1, groups)
    if not wants_dw:
        return dx, dprobs, None
    into = call.main_grads() or (None, None)
    dw1 = products.outer(dhidden, x, groups, fc1, into[0])
    dw2 = products.outer(dy, activated, groups, fc2, into[1])
    return dx, dprobs, None if dw1 is None or dw2 is None else (dw1, dw2)


def _forward_loop(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: _Call
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    hidden = x.new_empty(len(x), fc1.shape[1]) if call.differentiable else None
    for block in _expert_blocks(call.groups.counts, fc1):
        hidden_t = x.new_empty(block.size, fc1.shape[1]) if hidden is None else hidden[block.rows]
        _multiply(block.of(x), fc1[block.experts].mT, block.split(hidden_t))
        activated = call.activation.forward(hidden_t, probs[block.rows])
        _multiply(block.split(activated), fc2[block.experts].mT, block.of(y))
    return y, hidden


def _backward_loop(
    x: Tensor,
    probs: Tensor,
    hidden: Tensor,
    dy: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    call: _Call,
    wants_dw: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    dx, dprobs = torch.empty_like(x), torch.empty_like(probs)
    gradients = _WeightGradients(fc1, fc2, call.main_grads()) if wants_dw else None
    for block in _expert_blocks(call.groups.counts, fc1):
        dactivated = x.new_empty(block.size, fc2.shape[2])
        _multiply(block.of(dy), fc2[block.experts], block.split(dactivated))
        activated, dhidden, dprobs[block.rows] = call.activation.backward(
            hidden[block.rows], probs[block.rows], dactivated
        )
        _multiply(block.split(dhidden), fc1[block.experts], block.of(dx))
        if gradients:
            inputs = (block.of(x), block.split(activated))
            gradients.add(block, (block.split(dhidden), block.of(dy)), inputs)
    return dx, dprobs, gradients.for_autograd if gradients else None


def _multiply(inputs: Iterable[Tensor], weights: Tensor, outputs: Iterable[Tensor]) -> None:
    """Write each expert's product of its rows and its weight [in, out] to its output."""
    for x_e, w_e, out in zip(inputs, weights, outputs, strict=True):
        torch.mm(x_e, w_e, out=out)


@dataclass(frozen=True)
class _ExpertBlock:
    """Experts that the loop takes together: all one thing, then all the next."""

    experts: slice
    counts: list[int]
    start: int

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)

    def of(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split the rows of all experts: those of each expert of the block."""
        return self.split(tensor[self.rows])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split the rows of the block by expert."""
        return tensor.split(self.counts)


_BLOCK_BYTES = 1 << 20
"""fc1's output of a block, at most (but for single experts): small enough to be in the cache when
the activation reads it, large enough that small experts share the cost of its launches."""


def _expert_blocks(counts: list[int], fc1: Tensor) -> list[_ExpertBlock]:
    most = _BLOCK_BYTES // (fc1.shape[1] * fc1.element_size())
    blocks, first, start = [], 0, 0
    while first < len(counts):
        end, size = first + 1, counts[first]
        while end < len(counts) and size + counts[end] <= most:
            size, end = size + counts[end], end + 1
        blocks.append(_ExpertBlock(slice(first, end), counts[first:end], start))
        first, start = end, start + size
    return blocks


class _WeightGradients:
    """The weight gradients of a loop: added to `main_grads`, or new ones for autograd.

    New ones are zero where an expert has no rows.
    """

    def __init__(self, fc1: Tensor, fc2: Tensor, main_grads: tuple[Tensor, Tensor] | None):
        self.buffers = main_grads or (torch.empty_like(fc1), torch.empty_like(fc2))
        self.for_autograd = None if main_grads else self.buffers
        self.beta = 1 if main_grads else 0  # 0: what was in the buffer is not even read

    def add(
        self,
        block: _ExpertBlock,
        dy: tuple[Sequence[Tensor], Sequence[Tensor]],
        x: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> None:
        """Add those of a block's experts: of fc1 and fc2, each expert's dy [rows, out] and x."""
        for buffer, outputs, inputs in zip(self.buffers, dy, x, strict=True):
            for dw, dy_e, x_e in zip(buffer[block.experts], outputs, inputs, strict=True):
                if len(dy_e) or not self.beta:
                    dw.addmm_(dy_e.t(), x_e, beta=self.beta)
