"""All experts' feed-forward networks as one autograd function: fc1, activation * probs, fc2.

For backward each call keeps its input, fc1's output and the router's weights of the rows; the
activation is computed anew there. The calls of one chain share a node through which the weights
enter (`Chain`): autograd runs it once, after the backward passes of all its calls, so that is
where a parameter's gradient is complete, whatever the layout, schedule or number of iterations.

Axis letters: T rows sorted by expert, E experts, H hidden, F expert FFN size, O = 2F (gate over up)
or F.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_coe.model.moe.expert_activation import ExpertActivation
from megatron_coe.model.moe.grouped_linear import Grouping, outer, times, times_transposed

Pieces = tuple[Tensor, Tensor, Tensor, Tensor, Grouping]
"""What the weight gradients of one call are made of: x [T, H], fc1's gradient [T, O], the
activation [T, F], the output's gradient [T, H], and the rows of each expert."""


@dataclass
class _Gradients:
    """Where the weight gradients of a chain's calls go."""

    parameters: tuple[torch.nn.Parameter, torch.nn.Parameter]
    merged: bool
    pieces: dict[int, Pieces] = field(default_factory=dict)  # of each call, if merged

    def main_grads(self) -> tuple[Tensor, Tensor] | None:
        """Megatron's gradient buffers, where products can be added to them in place: on a CPU, if
        they have the weights' dtype."""
        found = tuple(getattr(weight, "main_grad", None) for weight in self.parameters)
        usable = all(
            main is not None and main.dtype == weight.dtype and not weight.is_cuda
            for main, weight in zip(found, self.parameters, strict=True)
        )
        return found if usable else None


class Chain:
    """The expert weights [E, O, H] and [E, H, F] as the calls of one chain see them.

    Args:
        calls: how many calls of `expert_mlp` will be made with it, at most.
        merged: keep the pieces of the weight gradients until the last of the calls' backward
            passes, and make one product per expert out of all of them.
    """

    def __init__(
        self, fc1: torch.nn.Parameter, fc2: torch.nn.Parameter, calls: int, merged: bool = False
    ):
        self.gradients = _Gradients((fc1, fc2), merged)
        self.fc1, self.fc2, *self.tickets = _Entry.apply(fc1, fc2, self.gradients, calls)
        self.used = 0

    @property
    def exhausted(self) -> bool:
        return self.used == len(self.tickets)

    def take_ticket(self) -> tuple[int, Tensor]:
        """A call's number and the scalar whose gradient says that its backward pass was run."""
        number, self.used = self.used, self.used + 1
        return number, self.tickets[number]


def expert_mlp(
    x_TH: Tensor,
    probs_T1: Tensor,
    chain: Chain,
    groups: Grouping,
    activation: ExpertActivation,
    fp8_hidden: bool = False,
) -> Tensor:
    """y_TH with y = fc2(activation(fc1(x)) * probs), each row by its expert; dtype of x.

    Args:
        fp8_hidden: keep fc1's output for backward in eight bits.
    """
    number, ticket = chain.take_ticket()
    call = _Call(number, groups, activation, chain.gradients, torch.is_grad_enabled(), fp8_hidden)
    return _ExpertMLP.apply(x_TH, probs_T1, chain.fc1, chain.fc2, ticket, call)


@dataclass(frozen=True)
class _Call:
    number: int
    groups: Grouping
    activation: ExpertActivation
    gradients: _Gradients
    differentiable: bool
    fp8_hidden: bool


class _Entry(torch.autograd.Function):
    """Hands the weights to the calls, with a ticket for each, and completes their gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, fc1: Tensor, fc2: Tensor, gradients: _Gradients, calls: int
    ) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return fc1.view_as(fc1), fc2.view_as(fc2), *(fc1.new_empty(()) for _ in range(calls))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, dw1: Tensor | None, dw2: Tensor | None, *tickets: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        # A ticket without gradient: this backward pass did not come by its call.
        passed = [number for number, ticket in enumerate(tickets) if ticket is not None]
        pieces = [gradients.pieces.pop(number) for number in passed if gradients.merged]
        main_grads = gradients.main_grads()
        if pieces:
            made = _merged_products(pieces, gradients.parameters, main_grads)
            dw1, dw2 = made or (dw1, dw2)
        if passed and main_grads:
            # Megatron's convention (tensor_parallel/layers.py): what autograd gets is an
            # uninitialized stand-in, which nobody reads, to say "there is a gradient".
            for weight in gradients.parameters:
                weight.grad_added_to_main_grad = True
            dw1, dw2 = (torch.empty_like(weight) for weight in gradients.parameters)
        return dw1, dw2, None, None


class _ExpertMLP(torch.autograd.Function):
    """One call. Its weight gradients go on to `_Entry`, by hand if they are not autograd's."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        probs: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        ticket: Tensor,
        call: _Call,
    ) -> Tensor:
        run = _forward_loop if isinstance(call.groups, list) else _forward_grouped
        x = x.contiguous()
        y, hidden = run(x, probs, fc1, fc2, call)
        ctx.call = call
        if call.differentiable:
            kept = hidden.to(torch.float8_e4m3fn) if call.fp8_hidden else hidden
            ctx.save_for_backward(x, probs, kept, fc1, fc2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, probs, hidden, fc1, fc2 = ctx.saved_tensors
        _, _, wants_dw1, wants_dw2, _, _ = ctx.needs_input_grad
        call = ctx.call
        run = _backward_loop if isinstance(call.groups, list) else _backward_grouped
        # A sum's gradient has strides of zero, which grouped_mm refuses.
        dx, dprobs, dweights = run(
            x, probs, hidden.to(x.dtype), dy.contiguous(), fc1, fc2, call, wants_dw1 or wants_dw2
        )
        dw1, dw2 = dweights or (None, None)
        ticket = dy.new_zeros(()) if wants_dw1 or wants_dw2 else None
        return dx, dprobs, dw1, dw2, ticket, None


def _forward_grouped(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: _Call
) -> tuple[Tensor, Tensor]:
    hidden = times_transposed(x, fc1, call.groups)
    return times_transposed(call.activation.forward(hidden, probs), fc2, call.groups), hidden


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
    dactivated = times(dy, fc2, call.groups)
    activated, dhidden, dprobs = call.activation.backward(hidden, probs, dactivated)
    dx = times(dhidden, fc1, call.groups)
    pieces = (x, dhidden, activated, dy, call.groups)
    return dx, dprobs, _settle(pieces, call) if wants_dw else None


def _forward_loop(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, call: _Call
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x)
    hidden = x.new_empty(len(x), fc1.shape[1]) if call.differentiable else None
    for turn in _turns(call.groups, fc1):
        hidden_t = x.new_empty(turn.size, fc1.shape[1]) if hidden is None else hidden[turn.rows]
        for x_e, w_e, out in zip(turn.of(x), fc1[turn.experts], turn.split(hidden_t), strict=True):
            torch.mm(x_e, w_e.t(), out=out)
        activated = turn.split(call.activation.forward(hidden_t, probs[turn.rows]))
        for a_e, w_e, out in zip(activated, fc2[turn.experts], turn.of(y), strict=True):
            torch.mm(a_e, w_e.t(), out=out)
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
    """Only what merged weight gradients are made of outlives an expert's turn."""
    dx, dprobs = torch.empty_like(x), torch.empty_like(probs)
    merged = wants_dw and call.gradients.merged
    if merged:
        kept_dhidden, kept_activated = torch.empty_like(hidden), x.new_empty(len(x), fc2.shape[2])
    elif wants_dw:
        into = _Products(fc1, fc2, call.gradients.main_grads())
    for turn in _turns(call.groups, fc1):
        dactivated = x.new_empty(turn.size, fc2.shape[2])
        parts = zip(turn.of(dy), fc2[turn.experts], turn.split(dactivated), strict=True)
        for dy_e, w_e, out in parts:
            torch.mm(dy_e, w_e, out=out)
        activated, dhidden, dprobs[turn.rows] = call.activation.backward(
            hidden[turn.rows], probs[turn.rows], dactivated
        )
        parts = zip(turn.split(dhidden), fc1[turn.experts], turn.of(dx), strict=True)
        for dh_e, w_e, out in parts:
            torch.mm(dh_e, w_e, out=out)
        if merged:
            kept_dhidden[turn.rows], kept_activated[turn.rows] = dhidden, activated
        elif wants_dw:
            into.add(turn, turn.of(x), turn.split(dhidden), turn.split(activated), turn.of(dy))
    if merged:
        return dx, dprobs, _settle((x, kept_dhidden, kept_activated, dy, call.groups), call)
    return dx, dprobs, into.autograds if wants_dw else None


@dataclass(frozen=True)
class _Turn:
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
        """Each expert's rows out of those of all experts."""
        return self.split(tensor[self.rows])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows out of those of the turn."""
        return tensor.split(self.counts)


_TURN_BYTES = 1 << 20
"""fc1's output of a turn, at most (but for single experts): small enough to be in the cache when
the activation reads it, large enough that small experts share the cost of its launches."""


def _turns(groups: list[int], fc1: Tensor) -> list[_Turn]:
    most = _TURN_BYTES // (fc1.shape[1] * fc1.element_size())
    turns, first, start = [], 0, 0
    while first < len(groups):
        end, size = first + 1, groups[first]
        while end < len(groups) and size + groups[end] <= most:
            size, end = size + groups[end], end + 1
        turns.append(_Turn(slice(first, end), groups[first:end], start))
        first, start = end, start + size
    return turns


class _Products:
    """The weight gradients of a loop: added to `main_grads`, or made anew for autograd, zero where
    an expert has no rows."""

    def __init__(self, fc1: Tensor, fc2: Tensor, main_grads: tuple[Tensor, Tensor] | None):
        self.autograds = None if main_grads else (torch.empty_like(fc1), torch.empty_like(fc2))
        self.buffers = main_grads or self.autograds
        self.beta = 1 if main_grads else 0  # 0: what was in the buffer is not even read

    def add(
        self,
        turn: _Turn,
        x: Sequence[Tensor],
        dhidden: Sequence[Tensor],
        activated: Sequence[Tensor],
        dy: Sequence[Tensor],
    ) -> None:
        """Those of a turn's experts, from the rows of each."""
        for buffer, outputs, inputs in zip(
            self.buffers, (dhidden, dy), (x, activated), strict=True
        ):
            for dw, d_e, in_e in zip(buffer[turn.experts], outputs, inputs, strict=True):
                if len(d_e) or not self.beta:
                    dw.addmm_(d_e.t(), in_e, beta=self.beta)


def _settle(pieces: Pieces, call: _Call) -> tuple[Tensor, Tensor] | None:
    """Make a call's weight gradients, or lay their pieces by for the last call's."""
    gradients = call.gradients
    if gradients.merged:
        gradients.pieces[call.number] = pieces
        return None
    *tensors, ends = pieces
    return _grouped_products(*tensors, ends)


def _merged_products(
    pieces: list[Pieces],
    weights: tuple[Tensor, Tensor],
    main_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """Both weight gradients from the rows of several calls, or None if added to `main_grads`."""
    pieces = [piece for piece in pieces if len(piece[0])] or pieces[:1]
    *calls, groups = zip(*pieces, strict=True)
    if isinstance(groups[0], list):
        into = _Products(*weights, main_grads)
        splits = [[t.split(rows) for t, rows in zip(ts, groups, strict=True)] for ts in calls]
        for e in range(len(weights[0])):
            turn = _Turn(slice(e, e + 1), [], 0)
            into.add(turn, *([torch.cat([of_call[e] for of_call in kind])] for kind in splits))
        return into.autograds
    # Rows of all calls by expert: stable, so by call within an expert.
    experts = torch.cat(
        [torch.searchsorted(ends, _numbers(x), right=True) for x, *_, ends in pieces]
    )
    order = experts.argsort(stable=True)
    joined = (torch.cat(tensors).index_select(0, order) for tensors in calls)
    return _grouped_products(*joined, torch.stack(groups).sum(0, dtype=torch.int32))


def _numbers(x: Tensor) -> Tensor:
    return torch.arange(len(x), dtype=torch.int32, device=x.device)


def _grouped_products(
    x: Tensor, dhidden: Tensor, activated: Tensor, dy: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return outer(dhidden, x, ends), outer(dy, activated, ends)
