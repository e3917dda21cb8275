"""The output layer (LM head) and its loss: with all logits, in chunks, by others, and a ceiling.

It is half of all FLOPs at the paper's vocabulary, the same for CoE and MoE.

Axis letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from benchmarks.layers import BACKWARD, FORWARD
from benchmarks.memory import footprint
from benchmarks.timing import Lap, Variant
from megatron_coe.model.linear_cross_entropy import VocabShard, linear_cross_entropy
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.model.vocab_padding import fill_padding

MEGATRON, PRODUCTS = "linear, then Megatron's loss", "products alone"
CHUNKS, RECOMPUTED = "in chunks, weights known", "in chunks, recomputed"
TORCH, LIGER = "torch's linear_cross_entropy", "Liger's fused linear cross-entropy"


@dataclass(frozen=True)
class Head:
    """Hidden states [T, H], the output layer's weights [V, H] and the labels [T].

    Rows of the weights from `vocab_size` on are padding.
    """

    x: Tensor
    weight: Tensor
    labels: Tensor
    vocab_size: int

    def losses(self) -> dict[str, Callable[[], Tensor]]:
        """Return each way to the mean loss that this machine has; the first is the present one."""
        ways: dict[str, Callable[[], Tensor]] = {
            MEGATRON: self._by_megatron,
            CHUNKS: partial(self._in_chunks, torch.ones_like(self.labels, dtype=torch.float32)),
            RECOMPUTED: partial(self._in_chunks, None),
        }
        if hasattr(F, "linear_cross_entropy"):  # since 2.13
            ways[TORCH] = self._by_torch
        if self.x.is_cuda and importlib.util.find_spec("liger_kernel"):
            ways[LIGER] = self._by_liger
        return ways

    def variants(self) -> list[Variant]:
        """Return the variants, each forward and backward, for both gradients."""
        ways = self.losses().items()
        variants = [self._variant(name, partial(self._loss, function)) for name, function in ways]
        return [*variants, self._variant(PRODUCTS, self._products)]

    def result(self, name: str) -> dict[str, Any]:
        """Run a variant and return its loss and gradients by name."""
        self._clear()
        loss = self._loss(self.losses()[name], lambda part: None)
        return {"loss": loss.detach(), "dx": self.x.grad, "dweight": self.weight.grad}

    def peak_bytes(self, variant: Variant) -> int:
        """Return the most bytes of a run of a variant, besides what stands before it."""
        variant.prepare()
        found = footprint((self.x, self.weight, self.labels), variant.run, self.x.device)
        self._clear()
        return max(found.passing.values())

    def _variant(self, name: str, run: Callable[[Lap], Any]) -> Variant:
        return Variant(
            name, run, self._clear, 3 * 2 * len(self.x) * self.weight.numel(), len(self.x)
        )

    def _clear(self) -> None:
        self.x.grad = self.weight.grad = None

    def _loss(self, function: Callable[[], Tensor], lap: Lap) -> Tensor:
        loss = function()
        lap(FORWARD)
        loss.backward()
        lap(BACKWARD)
        return loss

    def _by_megatron(self) -> Tensor:
        logits = F.linear(self.x, self.weight)
        fill_padding(logits, self.vocab_size)
        return vocab_parallel_cross_entropy(logits[:, None], self.labels[:, None]).mean()

    def _in_chunks(self, weights: Tensor | None) -> Tensor:
        shard = VocabShard(0, self.vocab_size)
        return linear_cross_entropy(self.x, self.weight, self.labels, shard, weights).mean()

    def _by_torch(self) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # in chunks, by PyTorch's own choice
        return F.linear_cross_entropy(self.x, self._tokens(), self.labels, options=options)

    def _by_liger(self) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return LigerFusedLinearCrossEntropyFunction.apply(self.x, self._tokens(), self.labels)[0]

    def _tokens(self) -> Tensor:
        """Return the weights without padding: a slice of all would cost a copy of the gradient."""
        whole = self.vocab_size == len(self.weight)
        return self.weight if whole else self.weight[: self.vocab_size]

    def _products(self, lap: Lap) -> None:
        x, weight = self.x.detach(), self.weight.detach()
        logits = x @ weight.t()
        lap(FORWARD)
        self.x.grad, self.weight.grad = logits @ weight, logits.t() @ x
        lap(BACKWARD)


def random_head(provider: CoEModelProvider, tokens: int, device: torch.device) -> Head:
    """Draw a head with the sizes and dtype of a model."""
    H, V, dtype = provider.hidden_size, provider.padded_vocab_size, provider.params_dtype
    x = torch.randn(tokens, H, device=device, dtype=dtype)
    weight = torch.randn(V, H, device=device, dtype=dtype) * provider.init_method_std
    labels = torch.randint(provider.vocab_size, (tokens,), device=device)
    return Head(x.requires_grad_(), weight.requires_grad_(), labels, provider.vocab_size)
