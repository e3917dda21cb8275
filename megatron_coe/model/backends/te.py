"""Transformer Engine's modules behind Megatron's ``BackendSpecProvider``.

Megatron's own provider, narrowed to what CoE layers use: Transformer Engine's grouped
linear layers, and never the legacy grouped experts, which need another CUDA source build.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.extensions import transformer_engine_spec_provider as megatron_te
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS, ExpertModules
from megatron_coe.model.backends.mla import LatentAttention
from megatron_coe.model.backends.torch import TorchSpecProvider
from megatron_coe.model.config import CoEConfig


class TESpecProvider(megatron_te.TESpecProvider):
    """Modules for Megatron's layer specs, from Transformer Engine.

    Args:
        parts: of `select.TE_PARTS`, what is its own; `linear` is. The others are PyTorch's.
    """

    def __init__(self, parts: Sequence[str] = ("linear", "attention", "experts")) -> None:
        super().__init__()
        self.parts = parts
        self._torch = TorchSpecProvider()

    def core_attention(self) -> type:
        own = "attention" in self.parts
        return super().core_attention() if own else self._torch.core_attention()

    def substitutes(self) -> dict[type, type]:
        """Return Megatron's modules and what stands in their place (not in the protocol)."""
        return {super().core_attention(): self.core_attention(), MLASelfAttention: LatentAttention}

    def refuse_unsupported(self, config: CoEConfig) -> None:
        """Raise ValueError for a field that this backend's modules refuse when built."""
        if "attention" not in self.parts:
            self._torch.refuse_attention(config)
        if "experts" not in self.parts:
            self._torch.refuse_experts(config)
        self.grouped_mlp_modules(config.moe_grouped_gemm)

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False
    ) -> ExpertModules:
        """Return `TEGroupedMLP`, or Megatron's loop over expert modules without grouped GEMM.

        Raises:
            ValueError: Transformer Engine is too old for grouped linear layers.
        """
        if "experts" not in self.parts:
            return self._torch.grouped_mlp_modules(moe_use_grouped_gemm)
        if moe_use_grouped_gemm and megatron_te.TEColumnParallelGroupedLinear is None:
            raise ValueError(
                "moe_grouped_gemm=True needs Transformer Engine 1.9 or newer, not "
                f"{megatron_te.get_te_version()}: upgrade it, or set moe_grouped_gemm=False"
            )
        legacy = () if PARTS_ARE_PARTIALS else (False,)
        return super().grouped_mlp_modules(moe_use_grouped_gemm, *legacy)
