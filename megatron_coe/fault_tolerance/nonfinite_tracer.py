"""Finding where the first NaN or Inf of a step arises on a rank, with hooks on every module.

In the forward pass it is the first module with an output that is not finite. If all outputs are
finite, it is the first module in the backward pass that makes a gradient which is not finite out of
finite ones. The calls of a module are told apart: a CoE layer calls its experts C times.

Every value is checked, which is slow: meant for rerunning a step that is known to be bad.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model
from torch.utils.hooks import RemovableHandle

from megatron_coe.model.moe.layer import CoELayer
from megatron_coe.model.moe.router import CoERouter

FORWARD, BACKWARD, PARAMETER = 0, 1, 2
"""Kinds of findings, in the order in which they are preferred."""


M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Place:
    """A call of a module on a rank, or a parameter."""

    name: str
    """Of the module or parameter in its model chunk; "loss" for the chunk itself."""
    layer: int | None
    """In the model, counted from 1."""
    iteration: int | None
    """Of the CoE layer, counted from 1."""
    chunk: int
    microbatch: int
    """Of the step, counted from 0."""
    order: int
    """Among the events of this step on the rank: the start of the call, or its end if the output is
    not finite. Of a parameter, among the parameters."""
    row: int | None = None
    """Of the micro-batch, if one sequence can be named."""

    def __str__(self) -> str:
        numbers = [("layer", self.layer), ("iteration", self.iteration)]
        known = ", ".join(f"{name} {number}" for name, number in numbers if number is not None)
        return f"{self.name} ({known})" if known else self.name


class NonFiniteTracer:
    """Hooks on the model chunks of a rank, inside its context.

    Args:
        chunks: the model chunks.
        micro_batch_size: of the step that is rerun.
    """

    def __init__(self, chunks: list[torch.nn.Module], micro_batch_size: int) -> None:
        self.found: dict[int, Place] = {}
        """The first place of each kind."""
        self.micro_batch_size = micro_batch_size
        self._chunks = unwrap_model(chunks)
        self._handles: list[RemovableHandle] = []
        self._calls: Counter[torch.nn.Module] = Counter()
        self._open: defaultdict[torch.nn.Module, list[_Call]] = defaultdict(list)
        self._order = 0

    def __enter__(self) -> NonFiniteTracer:
        for index, chunk in enumerate(self._chunks):
            for name, module in chunk.named_modules():
                if not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
                    self._add_hooks(index, name, module)
            for order, (name, parameter) in enumerate(chunk.named_parameters()):
                if parameter.requires_grad:
                    place = Place(name, layer_number(chunk, name), None, index, 0, order)
                    hook = self._parameter_hook(place, parameter)
                    self._handles.append(parameter.register_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def tick(self) -> int:
        """Return the next number in the order of events."""
        self._order += 1
        return self._order

    def note(self, kind: int, place: Place) -> None:
        """Record a place, if it is the first of its kind."""
        self.found.setdefault(kind, place)

    def _add_hooks(self, index: int, name: str, module: torch.nn.Module) -> None:
        chunk = self._chunks[index]
        coe_layer = _ancestor(chunk, name, CoELayer)
        layer = layer_number(chunk, name)

        def before(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if isinstance(module, CoELayer):
                for inner in module.modules():
                    del self._calls[inner]
            self._calls[module] += 1
            microbatch = max(self._calls[chunk] - 1, 0)
            iteration = self._iteration(coe_layer, module, args)
            place = Place(name or "loss", layer, iteration, index, microbatch, self.tick())
            call = _Call(self, place)
            self._open[module].append(call)
            entered = {name: call.enter(value) for name, value in kwargs.items()}
            return tuple(call.enter(value) for value in args), entered

        def after(module: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:
            self._open[module].pop().leave(output)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def _iteration(
        self, coe_layer: CoELayer | None, module: torch.nn.Module, args: tuple[Any, ...]
    ) -> int | None:
        if coe_layer is None or module is coe_layer:
            return None
        if isinstance(module, CoERouter):
            return args[2] + 1 if len(args) > 2 else 1
        call, last = self._calls[module], coe_layer.config.coe_iterations
        # Iterations that are recomputed one by one come again, from the last to the first.
        return call if call <= last else max(2 * last + 1 - call, 1)

    def _parameter_hook(
        self, place: Place, parameter: torch.nn.Parameter
    ) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if getattr(parameter, "grad_added_to_main_grad", False):
                # What autograd got is an uninitialized stand-in.
                gradient = parameter.main_grad  # type: ignore[attr-defined]  # Megatron's
            if not is_finite(gradient):
                self.note(PARAMETER, place)

        return hook


def is_finite(value: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor Inf."""
    return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())


def layer_number(chunk: torch.nn.Module, name: str) -> int | None:
    """Return the layer of the model that a module or parameter belongs to, counted from 1."""
    layer = _ancestor(chunk, name, TransformerLayer)
    return None if layer is None else layer.layer_number


class _Call:
    """One call of a module."""

    def __init__(self, tracer: NonFiniteTracer, place: Place) -> None:
        self.tracer = tracer
        self.place = place
        self.received_finite = True
        """Whether the gradients of the output are finite, as far as they have arrived."""

    def enter(self, value: object) -> object:
        """Return an input of the call, its gradient probed."""
        return _Probe.apply(value, self) if _has_gradient(value) else value

    def leave(self, output: object) -> None:
        """Check the output of the call, and hook its gradients."""
        ended = self.tracer.tick()  # a module ends after those inside it, and starts before them
        for value in _tensors(output):
            if not is_finite(value):
                place = replace(self.place, order=ended, row=self._row(value))
                self.tracer.note(FORWARD, place)
            if _has_gradient(value):
                value.register_hook(self.receive)

    def receive(self, gradient: torch.Tensor) -> None:
        """Check a gradient of the output."""
        self.received_finite = self.received_finite and is_finite(gradient)

    def pass_back(self, gradient: torch.Tensor) -> None:
        """Check a gradient of an input."""
        if self.received_finite and not is_finite(gradient):
            self.tracer.note(BACKWARD, self.place)

    def _row(self, value: torch.Tensor) -> int | None:
        """Return the sequence of the first bad value in an output [S, B, …] or a loss [B, S]."""
        axis = 0 if self.place.name == "loss" else 1
        if value.dim() != 3 - (axis == 0) or value.size(axis) != self.tracer.micro_batch_size:
            return None
        return int((~torch.isfinite(value)).nonzero()[0, axis])


class _Probe(torch.autograd.Function):
    """The identity, which shows the gradient of an input to one call of a module."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.call = call
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.call.pass_back(gradient)
        return gradient, None


def _ancestor(chunk: torch.nn.Module, name: str, kind: type[M]) -> M | None:
    """Return the innermost module of a kind that `name` is or belongs to."""
    found: M | None = None
    module: Any = chunk
    for part in name.split("."):
        module = getattr(module, part, None)
        if isinstance(module, kind):
            found = module
        if not isinstance(module, torch.nn.Module):
            break
    return found


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in an output of a module."""
    if isinstance(value, torch.nn.Parameter):
        return  # passed on, not computed
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _has_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_floating_point()
