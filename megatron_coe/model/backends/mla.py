"""`LatentAttention`: Megatron's latent attention (MLA) with the norms its spec names, no other."""

from __future__ import annotations

from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)


class LatentAttention(MLASelfAttention):
    """Queries straight from the hidden state (`q_lora_rank=None`) are not normalized.

    So it is in DeepSeek-V2 and in megatron-core 0.16. Later versions read `qk_layernorm=True` as a
    wish for a norm there as well: they build another model, or without Transformer Engine refuse
    (megatron/core/transformer/mla_qk_norm_config.py). What is overridden they alone ask for.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, object]:
        if self.config.q_lora_rank is not None:
            return super()._resolve_qk_norm_config(submodules)
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "kv_layernorm": submodules.kv_layernorm,
        }
