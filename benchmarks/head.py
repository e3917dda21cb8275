"""The output layer (LM head) with its loss: Megatron's two steps, PyTorch's fused one, a ceiling.

It is half of all FLOPs at the paper's vocabulary, the same for CoE and MoE.

Axis letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from benchmarks.layers import BACKWARD, FORWARD
from benchmarks.timing import Lap, Variant
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.model.vocab_padding import fill_padding

MEGATRON, FUSED, PRODUCTS = "linear, then Megatron's loss", "linear_cross_entropy", "products alone"


@dataclass(frozen=True)
class Head:
    """Hidden states [T, H], the output layer's weights [V, H] and the labels [T].

    Rows of the weights from `vocab_size` on are padding.
    """

    x: Tensor
    weight: Tensor
    labels: Tensor
    vocab_size: int

    def variants(self) -> list[Variant]:
        """Return the variants, each forward and backward, for both gradients."""
        losses = {MEGATRON: self._by_megatron, FUSED: self._fused}
        variants = [self._variant(name, partial(self._loss, f)) for name, f in losses.items()]
        return [*variants, self._variant(PRODUCTS, self._products)]

    def result(self, name: str) -> dict[str, Any]:
        """Run a variant and return its gradients by name."""
        self._clear()
        self._loss({MEGATRON: self._by_megatron, FUSED: self._fused}[name], lambda part: None)
        return {"dx": self.x.grad, "dweight": self.weight.grad}

    def _variant(self, name: str, run: Callable[[Lap], None]) -> Variant:
        return Variant(
            name, run, self._clear, 3 * 2 * len(self.x) * self.weight.numel(), len(self.x)
        )

    def _clear(self) -> None:
        self.x.grad = self.weight.grad = None

    def _loss(self, function: Callable[[], Tensor], lap: Lap) -> None:
        loss = function()
        lap(FORWARD)
        loss.backward()
        lap(BACKWARD)

    def _by_megatron(self) -> Tensor:
        logits = F.linear(self.x, self.weight)
        fill_padding(logits, self.vocab_size)
        return vocab_parallel_cross_entropy(logits[:, None], self.labels[:, None]).mean()

    def _fused(self) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # in chunks, by PyTorch's own choice
        weight = self.weight
        if self.vocab_size < len(weight):  # a slice of all would cost a copy of the gradient
            weight = weight[: self.vocab_size]
        return F.linear_cross_entropy(self.x, weight, self.labels, options=options)

    def _products(self, lap: Lap) -> None:
        x, weight = self.x.detach(), self.weight.detach()
        logits = x @ weight.t()
        lap(FORWARD)
        self.x.grad, self.weight.grad = logits @ weight, logits.t() @ x
        lap(BACKWARD)


def random_head(provider: CoEModelProvider, tokens: int, device: torch.device) -> Head:
    """Draw a head with the sizes and dtype of a model.

    Raises:
        ValueError: this PyTorch has no `linear_cross_entropy` (new in 2.13).
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError(
            f"--what head: torch {torch.__version__} has no linear_cross_entropy; use 2.13 or later"
        )
    H, V, dtype = provider.hidden_size, provider.padded_vocab_size, provider.params_dtype
    x = torch.randn(tokens, H, device=device, dtype=dtype)
    weight = torch.randn(V, H, device=device, dtype=dtype) * provider.init_method_std
    labels = torch.randint(provider.vocab_size, (tokens,), device=device)
    return Head(x.requires_grad_(), weight.requires_grad_(), labels, provider.vocab_size)
