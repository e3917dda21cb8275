"""Attention of vLLM's layers: its MLA where that has a kernel, else its plain attention, padded.

Axis letters: T tokens, H hidden, D width of an attention head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mla import MLAModules, MultiHeadLatentAttentionWrapper

from megatron_coe.hf.modeling_coe import CoeRotaryEmbedding, rotate, yarn_mscale

from .limits import padded_head_size


class Rotary(nn.Module):
    """Rotary embedding of the model for transformers, looked up: in fp32, with all of its YaRN.

    vLLM's own keep their tables in the model's dtype, and leave out two keys of `rope_scaling`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.interleaved = config.attention_type == "mla"
        length = vllm_config.model_config.max_model_len
        positions = torch.arange(length, dtype=torch.float32)
        frequencies, magnitude = CoeRotaryEmbedding(config).frequencies(positions.device)
        angles = positions[:, None] * frequencies
        self.register_buffer("cos", angles.cos() * magnitude, persistent=False)
        self.register_buffer("sin", angles.sin() * magnitude, persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Apply it to query and key [T, heads, D] at their positions [T]."""
        cos, sin = self.cos[positions], self.sin[positions]  # T is the batch: one token each
        query, key = (
            rotate(x.unsqueeze(2), cos.unsqueeze(1), sin.unsqueeze(1), self.interleaved).squeeze(2)
            for x in (query, key)
        )
        return query, key


class PaddedAttention(nn.Module):
    """vLLM's attention for heads of any size: zeros up to one it has, the scale of the true."""

    def __init__(
        self, vllm_config: VllmConfig, heads: int, kv_heads: int, scale: float, prefix: str
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.size = padded_head_size(vllm_config.model_config.hf_config)
        self.attn = Attention(
            heads,
            self.size,
            scale,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention of q, k [T, heads, D] and v [T, heads, Dv]: [T, heads * Dv].

        Zeros in q and k add nothing to a score, and columns of zeros in v are cut off again.
        """
        width = value.shape[-1]
        padded = (F.pad(x, (0, self.size - x.shape[-1])).flatten(1) for x in (query, key, value))
        return self.attn(*padded).unflatten(-1, (self.heads, self.size))[..., :width].flatten(1)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    q_proj: nn.Module
    kv_a_proj_with_mqa: nn.Module
    fused_qkv_a_proj: nn.Module
    q_b_proj: nn.Module
    kv_b_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, vllm_config: VllmConfig, rotary: Rotary, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        H, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        self.widths = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.kv_widths = (config.qk_nope_head_dim, config.v_head_dim)
        self.latents = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.heads = heads // get_tensor_model_parallel_world_size()
        self.rank, self.rotary = rank, rotary

        def linear(kind: type[nn.Module], name: str, *sizes: Any, **options: Any) -> None:
            options = {"bias": False, "quant_config": vllm_config.quant_config, **options}
            setattr(self, name, kind(*sizes, prefix=f"{prefix}.{name}", **options))

        query, bias = heads * config.head_dim, config.attention_bias
        if rank is None:
            linear(ColumnParallelLinear, "q_proj", H, query)
            linear(ReplicatedLinear, "kv_a_proj_with_mqa", H, sum(self.latents), bias=bias)
        else:
            parts = [rank, sum(self.latents)]
            linear(
                MergedColumnParallelLinear, "fused_qkv_a_proj", H, parts, bias=bias, disable_tp=True
            )
            self.q_a_layernorm = RMSNorm(rank, eps=config.latent_norm_eps)
            linear(ColumnParallelLinear, "q_b_proj", rank, query)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.latent_norm_eps)
        up = heads * sum(self.kv_widths)
        linear(ColumnParallelLinear, "kv_b_proj", config.kv_lora_rank, up)
        linear(RowParallelLinear, "o_proj", heads * config.v_head_dim, H, bias=bias)
        scale, rope = config.head_dim**-0.5, config.rope_parameters
        if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
            scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
        if vllm_config.model_config.use_mla:
            self.mla_attn = self._kernel(vllm_config, scale, prefix)
        else:
            self.padded = PaddedAttention(vllm_config, self.heads, self.heads, scale, prefix)

    def _kernel(
        self, vllm_config: VllmConfig, scale: float, prefix: str
    ) -> MultiHeadLatentAttentionWrapper:
        config = vllm_config.model_config.hf_config
        own = {
            name: getattr(self, name, None)
            for name in (
                *("kv_a_layernorm", "kv_b_proj", "o_proj", "fused_qkv_a_proj"),
                *("kv_a_proj_with_mqa", "q_a_layernorm", "q_b_proj", "q_proj"),
            )
        }
        modules = MLAModules(
            **own, rotary_emb=self.rotary, indexer=None, is_sparse=False, topk_indices_buffer=None
        )
        return MultiHeadLatentAttentionWrapper(
            config.hidden_size,
            self.heads,
            scale,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.q_lora_rank,
            config.kv_lora_rank,
            modules,
            vllm_config.cache_config,
            vllm_config.quant_config,
            prefix,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        if hasattr(self, "mla_attn"):
            return self.mla_attn(positions, hidden_states)
        query, latent, k_rope = self._down(hidden_states)
        query = query.unflatten(-1, (self.heads, -1))
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))[0]
        k_nope, value = key_value.unflatten(-1, (self.heads, -1)).split(self.kv_widths, dim=-1)
        q_nope, q_rope = query.split(self.widths, dim=-1)
        q_rope, k_rope = self.rotary(positions, q_rope, k_rope.unsqueeze(1))
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1)), dim=-1)
        return self.o_proj(self.padded(query, key, value))[0]

    def _down(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, the latent keys and values, and the keys' rotary part."""
        if self.rank is None:
            query = self.q_proj(hidden_states)[0]
            latents = self.kv_a_proj_with_mqa(hidden_states)[0]
        else:
            fused = self.fused_qkv_a_proj(hidden_states)[0]
            query, latents = fused.split((self.rank, sum(self.latents)), dim=-1)
            query = self.q_b_proj(self.q_a_layernorm(query.contiguous()))[0]
        latent, k_rope = latents.split(self.latents, dim=-1)
        return query, latent.contiguous(), k_rope


class PlainAttention(nn.Module):
    """Multi-head attention with grouped queries."""

    def __init__(self, vllm_config: VllmConfig, rotary: Rotary, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.size, self.rotary = config.head_dim, rotary
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.size,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        if config.use_qk_norm:
            self.q_norm = RMSNorm(self.size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.size, eps=config.rms_norm_eps)
        self.heads = (self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads)
        self.padded = PaddedAttention(vllm_config, *self.heads, self.size**-0.5, prefix)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        heads, kv_heads = self.heads
        fused = self.qkv_proj(hidden_states)[0].unflatten(-1, (-1, self.size))
        query, key, value = fused.split((heads, kv_heads, kv_heads), dim=1)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query.contiguous()), self.k_norm(key.contiguous())
        query, key = self.rotary(positions, query, key)
        return self.o_proj(self.padded(query, key, value))[0]
