"""Matrix products of rows sorted by expert with one matrix per expert, and who computes them.

Each expert's matrix is [out, in] like `nn.Linear`'s, all in one tensor, so checkpoints need no
transposition; all implementations read it as it lies, forward and backward. No autograd here: see
`megatron_coe.model.moe.grouped_mlp`.

`moe_grouped_gemm_backend` names one of `BACKENDS`; `auto` takes the first usable of `AUTO`:

| backend      | needs                                     | rate over one dense product |
|--------------|-------------------------------------------|-----------------------------|
| `grouped_mm` | capability 9.0 or 10.0, bf16, widths of   | 0.376 (C = 2, K = 4)        |
|              | whole 16 bytes                            | 0.391 (C = 1, K = 8)        |
| `triton`     | capability 8.0, 16-bit dtypes, triton     | not measured                |
| `te`         | Transformer Engine, bf16; a host sync     | not measured                |
| `loop`       | nothing                                   | `SequentialMLP`'s is 0.059  |

Forward and backward in bf16 on an H200; T = 32,768, 63 experts, H = 1024, F = 704. On a CPU neither
the loop nor `grouped_mm` wins at every shape; the loop takes fp64 too, does the activation while an
expert's rows are in the cache, and adds weight gradients into Megatron's gradient buffer as it
goes. `tools/benchmark.py --what experts` measures all that can be used.

Axis letters: T rows, E experts, I input width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_coe.megatron_compat.transformer_engine import have_te
from megatron_coe.model.moe.dispatcher import Order

MainGrad = Tensor | None
"""Megatron's gradient buffer of a weight, if products are added to it in place."""

AUTO = ("grouped_mm", "loop")
"""What `auto` tries, in this order: by what was measured, not by what is installed."""


class Backend(Protocol):
    """An implementation of grouped linear layers."""

    name: str
    """As `moe_grouped_gemm_backend` has it."""
    counts_on_host: bool
    """It asks the device for the numbers of rows, once for all products of a call."""
    adds_to_main_grad: bool
    """On a GPU weight gradients go into Megatron's buffer, in its dtype, without another pass."""

    def missing(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
        """Return what is missing to use it; empty if nothing is.

        Args:
            widths: every I and O that it will be used with.
        """


class Products(Backend, Protocol):
    """A backend of separate products, with the activation between them."""

    def times_transposed(self, x_TI: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        """Return y [T, O] with y[rows of e] = x[rows of e] @ weight[e]^T."""

    def times(self, dy_TO: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        """Return dx [T, I] with dx[rows of e] = dy[rows of e] @ weight[e]."""

    def outer(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        groups: Grouping,
        weight: Tensor,
        main_grad: Tensor | None,
    ) -> Tensor | None:
        """Return dW [E, O, I], dW[e] = dy[rows of e]^T @ x[rows of e], or add it to `main_grad`.

        It is zero where an expert has no rows.
        """


@dataclass(frozen=True)
class Grouping:
    """Which rows are an expert's, and what multiplies them."""

    backend: Backend
    counts: list[int] = field(default_factory=list)
    """[E], on the host, if the backend takes them there: rows of each expert."""
    ends: Any = None
    """A tensor [E], int32, on the device, if not: where each expert's rows end."""
    order: Order | None = None
    """Given: the rows are not there yet, but gathered from the tokens by the first product."""


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]
) -> Backend:
    """Return the backend of `moe_grouped_gemm_backend`.

    Raises:
        ValueError: one is named that cannot be used; the message says what is missing.
    """
    if name != "auto":
        if missing := BACKENDS[name].missing(device, dtype, widths):
            raise ValueError(
                f"moe_grouped_gemm_backend={name!r} needs {missing}. Set it to 'auto'."
            )
        return BACKENDS[name]
    return next(b for b in map(BACKENDS.get, AUTO) if b and not b.missing(device, dtype, widths))


def grouping(
    backend: Backend, x_TI: Tensor, tokens_per_expert_E: Tensor, order: Order | None = None
) -> Grouping:
    """Bring the group sizes into the form that the backend takes.

    Args:
        tokens_per_expert_E: integer, on the host or the device; sums to T. Without a backend that
            needs the numbers, sizes on a GPU cost no synchronization.
    """
    if x_TI.shape[0] == 0:  # known without asking the device; libraries refuse empty products
        return Grouping(BACKENDS["loop"], counts=[0] * len(tokens_per_expert_E))
    if backend.counts_on_host:
        return Grouping(backend, counts=tokens_per_expert_E.tolist())
    ends = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    return Grouping(backend, ends=ends.to(x_TI.device, non_blocking=True), order=order)


class Loop:
    """A product per expert; `megatron_coe.model.moe.grouped_mlp` has it, with the activation."""

    name = "loop"
    counts_on_host = True
    adds_to_main_grad = False

    def missing(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
        return ""


class GroupedMM:
    """PyTorch's: one launch for all experts.

    Where `missing` finds something `grouped_mm` is itself a loop, which asks the device for the
    sizes in every product (ATen/native/cuda/GroupedBlas.cpp).
    """

    name = "grouped_mm"
    counts_on_host = False
    adds_to_main_grad = False

    def missing(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
        if _capability(device) not in ((9, 0), (10, 0)) or dtype != torch.bfloat16:
            return "a GPU of compute capability 9.0 or 10.0 and bf16"
        aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
        return "" if aligned else f"rows of whole 16 bytes, not of {widths} numbers"

    def times_transposed(self, x_TI: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        return F.grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=groups.ends)

    def times(self, dy_TO: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        return F.grouped_mm(dy_TO, weight_EOI, offs=groups.ends)

    def outer(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        groups: Grouping,
        weight: Tensor,
        main_grad: Tensor | None,
    ) -> Tensor:
        return F.grouped_mm(dy_TO.t(), x_TI, offs=groups.ends)


class Triton:
    """This package's kernels; gated SiLU takes their fused forms instead of these products."""

    name = "triton"
    counts_on_host = False
    adds_to_main_grad = True

    def missing(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
        if _capability(device) < (8, 0) or dtype not in (torch.bfloat16, torch.float16):
            return "a GPU of compute capability 8.0 or later and bf16 or fp16"
        return "" if find_spec("triton") else "triton, which is not installed"

    @property
    def kernels(self) -> ModuleType:
        """The kernels' module, imported where it is needed: triton need not be there."""
        from megatron_coe.model.kernels import grouped_gemm

        return grouped_gemm

    def times_transposed(self, x_TI: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        tile = self.kernels.TILES.fc2
        return self.kernels.product(x_TI, weight_EOI, groups.ends, True, tile)

    def times(self, dy_TO: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        tile = self.kernels.TILES.dfc1
        return self.kernels.product(dy_TO, weight_EOI, groups.ends, False, tile)

    def outer(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        groups: Grouping,
        weight: Tensor,
        main_grad: Tensor | None,
    ) -> Tensor | None:
        dw = torch.empty_like(weight) if main_grad is None else None
        into, tile = weight_gradient(dw, main_grad), self.kernels.TILES.dw2
        self.kernels.add_outer(dy_TO, x_TI, groups.ends, None, into, dw is None, tile)
        return dw


class TransformerEngine:
    """Transformer Engine's grouped GEMM: a cuBLAS product per expert, over several streams."""

    name = "te"
    counts_on_host = True
    adds_to_main_grad = True

    def missing(self, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
        if device.type != "cuda" or dtype != torch.bfloat16:
            return "a GPU and bf16"
        return "" if have_te() else "Transformer Engine, which is not installed"

    def times_transposed(self, x_TI: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        out = x_TI.new_empty(len(x_TI), weight_EOI.shape[1])
        self._multiply(weight_EOI, x_TI.split(groups.counts), [out], groups, layout="TN")
        return out

    def times(self, dy_TO: Tensor, weight_EOI: Tensor, groups: Grouping) -> Tensor:
        out = dy_TO.new_empty(len(dy_TO), weight_EOI.shape[2])
        parts = dy_TO.split(groups.counts)
        self._multiply(weight_EOI, parts, [out], groups, layout="NN", grad=True)
        return out

    def outer(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        groups: Grouping,
        weight: Tensor,
        main_grad: Tensor | None,
    ) -> Tensor | None:
        dw = torch.zeros_like(weight) if main_grad is None else None
        parts = x_TI.split(groups.counts), dy_TO.split(groups.counts)
        into = list(weight_gradient(dw, main_grad))
        self._multiply(*parts, into, groups, layout="NT", grad=True, accumulate=True)
        return dw

    def _multiply(self, a: Any, b: Any, out: list[Tensor], groups: Grouping, **how: Any) -> None:
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

        none = [None] * len(groups.counts)
        how |= {"m_splits": groups.counts, "single_output": len(out) == 1 and how["layout"] != "NT"}
        general_grouped_gemm(list(a), list(b), out, none, b[0].dtype, **how)


def weight_gradient(dw: Tensor | None, main_grad: Tensor | None) -> Tensor:
    """Return the one of the two that is there."""
    into = dw if main_grad is None else main_grad
    assert into is not None
    return into


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (GroupedMM(), Triton(), TransformerEngine(), Loop())
}
