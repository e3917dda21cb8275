# SPDX-License-Identifier: Apache-2.0
"""The Chain-of-Experts model for transformers (4.57 and 5.x), with the authors' weight names.

A layer passes every token C times through its experts, each time routed by the router of that
iteration (paper: arXiv 2506.18945, section 3); everything else is DeepSeek-V2. `CoeConfig`
documents the variants.

Axis letters: B batch, S sequence, T = B * S tokens, H hidden, N routed experts, K chosen per token
and iteration, C iterations, D width of an attention head, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_coe import CoeConfig

try:
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs

    def record_outputs(forward: Callable) -> Callable:
        return merge_with_config_defaults(capture_outputs(forward))
except ImportError:  # transformers 4
    from transformers.utils.generic import OutputRecorder
    from transformers.utils.generic import check_model_inputs as record_outputs  # type: ignore[no-redef]

__all__ = ["CoeForCausalLM", "CoeForSequenceClassification", "CoeModel", "CoePreTrainedModel"]

CACHE = "cache" if hasattr(MoeModelOutputWithPast, "cache") else "past_key_values"
"""Name of the cache in outputs; transformers 5.24 renamed it."""

KEYWORDS = frozenset(
    {
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_aux_losses",
        "num_items_in_batch",  # this and the next two: the loss
        "shift_labels",
        "ignore_index",
        "cu_seq_lens_q",  # this and the next three: flash attention, packed sequences
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)
"""Keywords of `forward` besides its named arguments."""


class CoeRMSNorm(nn.Module):
    """RMS norm: x / rms(x) * weight, the mean in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class CoeMLP(nn.Module):
    """SwiGLU without biases: a dense layer, a shared expert or a routed expert."""

    def __init__(self, config: CoeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated)


# --- CoE layer ------------------------------------------------------------------------------------


class CoeGate(nn.Module):
    """Router: assigns K of N experts to each token, in fp32 at least."""

    def __init__(self, config: CoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.use_expert_bias:  # updated from token counts by the trainer, not by gradients
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Route x [B, S, H].

        Returns:
            Logits [T, N], top-k probabilities [T, K], expert indices [T, K], and in training mode
            the auxiliary losses without coefficient [B] (or [1] for the batch), else None.
        """
        config = self.config
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        x_TH = hidden_states.flatten(0, -2).to(dtype)
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TN = F.linear(x_TH, self.weight.to(dtype))
        sigmoid = config.scoring_func == "sigmoid"
        scores_TN = logits_TN.sigmoid() if sigmoid else logits_TN.softmax(dim=-1)
        biased_TN = (
            scores_TN + self.e_score_correction_bias if config.use_expert_bias else scores_TN
        )
        indices_TK = self._top_k(biased_TN)
        probs_TK = scores_TN.gather(1, indices_TK)
        if config.num_experts_per_tok > 1 and (sigmoid or config.norm_topk_prob):
            probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if sigmoid or config.num_experts_per_tok == 1 or not config.norm_topk_prob:
            probs_TK = probs_TK * config.routed_scaling_factor
        losses = None
        if self.training:
            # The bias balances the experts by itself: the auxiliary loss leaves it out.
            counted_TK = self._top_k(scores_TN) if config.use_expert_bias else indices_TK
            losses = self._aux_losses(scores_TN, counted_TK, hidden_states.shape[0])
        return logits_TN, probs_TK, indices_TK, losses

    def _top_k(self, scores_TN: Tensor) -> Tensor:
        """Return indices of the K highest scores [T, K], of the best groups if these are limited.

        A group is ranked by its best expert (DeepSeek-V2, section 2.2.2).
        """
        config = self.config
        if config.topk_method == "group_limited_greedy":
            groups_TGn = scores_TN.unflatten(1, (config.n_group, -1))
            best_TG = groups_TGn.amax(dim=-1).topk(config.topk_group, dim=-1, sorted=False).indices
            dropped_TG = torch.ones_like(groups_TGn[..., 0], dtype=torch.bool)
            dropped_TG = dropped_TG.scatter(1, best_TG, False)
            scores_TN = groups_TGn.masked_fill(dropped_TG.unsqueeze(-1), -torch.inf).flatten(1)
        return scores_TN.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    def _aux_losses(self, scores_TN: Tensor, indices_TK: Tensor, batch: int) -> Tensor:
        """DeepSeek's loss of each sequence [B]: sum_i count_i / (S K / N) * mean_s score_i.

        Padding counts, as in the authors' code. Without `seq_aux` the batch is one long sequence.
        """
        N = self.config.n_routed_experts
        if self.config.scoring_func == "sigmoid":  # normalized to sum to 1
            scores_TN = scores_TN / (scores_TN.sum(dim=-1, keepdim=True) + 1e-20)
        sequences = batch if self.config.seq_aux else 1
        scores_BSN = scores_TN.unflatten(0, (sequences, -1))
        chosen_BM = indices_TK.reshape(sequences, -1)  # M = S * K
        count_BN = scores_BSN.new_zeros(sequences, N)
        count_BN = count_BN.scatter_add(
            1, chosen_BM, torch.ones_like(chosen_BM, dtype=count_BN.dtype)
        )
        share_BN = count_BN * (N / chosen_BM.shape[1])
        return (share_BN * scores_BSN.mean(dim=1)).sum(dim=-1)


class CoeExperts(nn.ModuleList):
    """The routed experts of a layer, which all its iterations share."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum each token's experts [T, H], weighted, for x [T, H], index and weights [T, K]."""
        result_TH = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        # In training every expert runs, so that each has a gradient in each step (DDP needs it).
        for expert in range(len(self)) if self.training else top_k_index.unique().tolist():
            token, rank = torch.where(top_k_index == expert)
            update = self[expert](hidden_states[token])
            result_TH = result_TH.index_add(0, token, update * top_k_weights[token, rank, None])
        return result_TH.to(hidden_states.dtype)


class CoeMoE(nn.Module):
    """CoE layer: C iterations x(0) -> x(C), each with its own routing over the same experts."""

    def __init__(self, config: CoeConfig) -> None:
        super().__init__()
        self.config = config
        F_ = config.moe_intermediate_size
        self.experts = CoeExperts(CoeMLP(config, F_) for _ in range(config.n_routed_experts))
        C = config.inner_iter
        self.gate = (
            nn.ModuleList(CoeGate(config) for _ in range(C))
            if config.use_igate
            else CoeGate(config)
        )
        if config.n_shared_experts:
            self.shared_experts = CoeMLP(config, F_ * config.n_shared_experts)
        if config.coe_upcycled:
            self.coe_weights = nn.ParameterDict(
                {str(t): nn.Parameter(torch.zeros(config.hidden_size)) for t in range(1, C)}
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run all iterations: x(C) [B, S, H] from the normed residual stream x(0) [B, S, H]."""
        x_0 = x = hidden_states
        mode = self.config.residual_mode
        for t in range(self.config.inner_iter):
            update = self._update(x, t)
            if self.config.coe_upcycled:
                x = x + self.coe_weights[str(t)] * update if t else update
            elif mode in ("inner", "inner_outer"):
                x = x + update
            else:
                x = x_0 + update if mode == "addinit" else update
        return x

    def _update(self, x: Tensor, t: int) -> Tensor:
        """f_t(x): routed and shared experts of one iteration."""
        routers: Any = self.gate
        router = routers[t] if self.config.use_igate else routers
        _, probs_TK, indices_TK, _ = router(x)
        update = self.experts(x.flatten(0, -2), indices_TK, probs_TK).view_as(x)
        return update + self.shared_experts(x) if self.config.n_shared_experts else update


# --- attention ------------------------------------------------------------------------------------


class CoeRotaryEmbedding(nn.Module):
    """Angles of the rotary embedding, with or without DeepSeek-V2's YaRN.

    They are computed in every pass: a few small operations, and no buffer that a cast to a narrower
    dtype or the meta device could corrupt.
    """

    def __init__(self, config: CoeConfig) -> None:
        super().__init__()
        self.config = config
        self.size = config.qk_rope_head_dim if config.attention_type == "mla" else config.head_dim

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, S, D / 2] in fp32, for positions [B, S]."""
        device = hidden_states.device
        frequencies, magnitude = self.frequencies(device)
        with torch.autocast(device.type, enabled=False):
            angles = position_ids[..., None].to(device, torch.float32) * frequencies
            return angles.cos() * magnitude, angles.sin() * magnitude

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Return the frequency of each pair [D / 2] and the factor on cos and sin."""
        rope = self.config.rope_parameters
        pair = torch.arange(0, self.size, 2, device=device, dtype=torch.float32)
        plain = 1.0 / rope["rope_theta"] ** (pair / self.size)
        if rope["rope_type"] == "default":
            return plain, 1.0
        low, high = (self._pair_of_rotations(rope.get(*key)) for key in YARN_ROTATIONS)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        ramp = (pair / 2 - low) / max(high - low, 0.001)
        stretched = ramp.clamp(0, 1)  # 0: high frequency, kept; 1: low frequency, interpolated
        frequencies = plain * (1 - stretched) + plain / rope["factor"] * stretched
        mscales = (rope.get("mscale", 1.0), rope.get("mscale_all_dim", 0.0))
        over, under = (yarn_mscale(rope["factor"], mscale) for mscale in mscales)
        return frequencies, rope.get("attention_factor", over / under)

    def _pair_of_rotations(self, rotations: float) -> float:
        """Return the (fractional) pair that makes so many rotations over the original context."""
        rope = self.config.rope_parameters
        wavelengths = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return self.size * math.log(wavelengths) / (2 * math.log(rope["rope_theta"]))


YARN_ROTATIONS = (("beta_fast", 32), ("beta_slow", 1))


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return the attention scale for a context `factor` times as long (YaRN, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Apply the rotary embedding to x [B, heads, S, D] by cos and sin [B, S, D / 2], in fp32.

    Args:
        interleaved: pairs are (0, 1), (2, 3), … as DeepSeek stores them; else (0, D/2), …
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    even, odd = even.float(), odd.float()
    pair = (even * cos - odd * sin, even * sin + odd * cos)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return rotated.to(x.dtype)


def eager_attention_forward(
    module: CoeAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(q k^T + mask) v [B, S, heads, D]; return it and the probabilities."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CoeAttention(nn.Module):
    """Base of both kinds of attention, which differ in how they project."""

    is_causal = True
    o_proj: nn.Linear

    def __init__(self, config: CoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query, key and value, each [B, heads, S, D], of x [B, S, H]."""
        raise TypeError(f"{type(self).__name__} has no projections of its own.")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
        key_length: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.project(hidden_states, position_embeddings)
        if cache is not None:
            where = {"cache_position": cache_position}  # only transformers 4 needs it
            key, value = cache.update(key, value, self.layer_idx, where)
            # A static cache returns the slots of later tokens too.
            key, value = key[:, :, :key_length], value[:, :, :key_length]
        implementation, width = self.config._attn_implementation, value.shape[-1]
        if width < self.head_dim and implementation not in ("eager", "sdpa", "flex_attention"):
            # Fused kernels need one width; columns of zeros add nothing, and are cut off below.
            value = F.pad(value, (0, self.head_dim - width))
        output, weights = self._interface()(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        shape = hidden_states.shape[:-1]
        output = output.reshape(*shape, -1, value.shape[-1])[..., :width].flatten(-2)
        return self.o_proj(output), weights

    def _interface(self) -> Callable:
        """Return the configured implementation of attention.

        transformers 5 and 4 search a model's source for the spelling of these calls to find out
        whether it supports `set_attn_implementation`.
        """
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            implementation = self.config._attn_implementation
            return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if self.config._attn_implementation == "eager":
            return eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]


class CoeLatentAttention(CoeAttention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    def __init__(self, config: CoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.widths = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        H, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        rank, eps = config.q_lora_rank, config.latent_norm_eps
        if rank is None:
            self.q_proj = nn.Linear(H, heads * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(H, rank, bias=bias)
            self.q_a_layernorm = CoeRMSNorm(rank, eps)
            self.q_b_proj = nn.Linear(rank, heads * self.head_dim, bias=False)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(H, latent, bias=bias)
        self.kv_a_layernorm = CoeRMSNorm(config.kv_lora_rank, eps)
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, up, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, H, bias=bias)
        rope = config.rope_parameters
        if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
            self.scaling *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        if config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_nope, q_rope = query.split(self.widths, dim=-1)
        latent = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rope = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))
        widths = (config.qk_nope_head_dim, config.v_head_dim)
        key_value = key_value.unflatten(-1, (-1, sum(widths))).transpose(1, 2)
        k_nope, value = key_value.split(widths, dim=-1)
        q_rope = rotate(q_rope, *position_embeddings, interleaved=True)
        k_rope = rotate(k_rope.unsqueeze(1), *position_embeddings, interleaved=True)
        k_rope = k_rope.expand(-1, k_nope.shape[1], -1, -1)  # shared by all heads
        query = torch.cat((q_nope, q_rope), dim=-1)
        return query, torch.cat((k_nope, k_rope), dim=-1), value


class CoePlainAttention(CoeAttention):
    """Multi-head attention with grouped queries: `num_key_value_heads` heads of keys and values."""

    def __init__(self, config: CoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        H, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(H, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(H, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(H, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, H, bias=False)
        if config.use_qk_norm:
            self.q_norm = CoeRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = CoeRMSNorm(self.head_dim, config.rms_norm_eps)

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (
            rotate(x.transpose(1, 2), *position_embeddings, interleaved=False) for x in (query, key)
        )
        return query, key, value.transpose(1, 2)


# --- the model ------------------------------------------------------------------------------------


class CoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the experts' iterations or, in a dense layer, one feed-forward network."""

    def __init__(self, config: CoeConfig, layer_idx: int) -> None:
        super().__init__()
        attention = CoeLatentAttention if config.attention_type == "mla" else CoePlainAttention
        self.self_attn = attention(config, layer_idx)
        has_experts = config.has_experts(layer_idx)
        self.mlp = CoeMoE(config) if has_experts else CoeMLP(config, config.intermediate_size)
        self.adds_residual = config.adds_stream if has_experts else True
        self.input_layernorm = CoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        residual = hidden_states + attended
        output = self.mlp(self.post_attention_layernorm(residual))
        return residual + output if self.adds_residual else output


class CoePreTrainedModel(PreTrainedModel):
    """Base of the models: what they support, and how weights are initialized."""

    config_class = CoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("CoeDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # which experts run depends on the tokens
    _can_record_outputs = {  # noqa: RUF012 - transformers' own name and type
        "hidden_states": CoeDecoderLayer,
        "attentions": CoeAttention,
        "router_logits": OutputRecorder(CoeGate, index=0),
        "aux_losses": OutputRecorder(CoeGate, index=3),
    }

    def __init__(self, config: CoeConfig) -> None:
        super().__init__(config)
        if config.use_expert_bias:
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        if config.mtp_weights:
            self._keys_to_ignore_on_load_unexpected = [config.mtp_weights]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CoeGate):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if self.config.use_expert_bias:
                nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, CoeMoE) and self.config.coe_upcycled:
            for iteration_scale in module.coe_weights.values():
                nn.init.zeros_(iteration_scale)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = checkpoint,
        **kwargs: object,
    ) -> None:
        # The reentrant variant, the default of transformers 4, would detach the auxiliary loss
        # from the layers.
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)


class CoeModel(CoePreTrainedModel):
    """The layers: token ids to final hidden states."""

    def __init__(self, config: CoeConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            CoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = CoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = CoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @record_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: object,
    ) -> MoeModelOutputWithPast:
        """Run the layers on tokens [B, S], or on their embeddings [B, S, H].

        Args:
            attention_mask: [B, past + S], 1: token, 0: padding; or for attention itself,
                [B, 1, S, keys]: True, or 0.0 where a mask is added to the scores, for a key that is
                attended to. Without `position_ids`, one of the first kind determines where each
                sequence begins, so that padding on the left changes nothing.
            past_key_values, cache: the same argument under its old name and that of transformers
                5.24.
            token_type_ids: ignored; tokenizers of transformers 4 pass it.

        Raises:
            TypeError: a keyword is unknown, or the cache is given twice or of another type.
            ValueError: the tokens are given twice or not at all, the mask does not fit them, or a
                cache would be written twice because layers are recomputed.
        """
        kwargs.pop("cache_position", None)  # transformers 4 passes what is computed below
        check_keywords(kwargs, self.config._attn_implementation)
        cache = resolve_cache(past_key_values, cache)
        self._check_inputs(input_ids, inputs_embeds, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache()
        S, device = inputs_embeds.shape[1], inputs_embeds.device
        past = int(cache.get_seq_length()) if cache is not None else 0
        key_length = past + S
        cache_position = torch.arange(past, key_length, device=device)
        mask: Tensor | BlockMask | None
        if attention_mask is not None and len(attention_mask.shape) == 4:
            mask, key_length = attention_mask, attention_mask.shape[-1]
            attention_mask = None
        else:
            implementation = self.config._attn_implementation
            mask = causal_mask(implementation, inputs_embeds, past, attention_mask, position_ids)
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -S:]
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                cache_position=cache_position,
                key_length=key_length,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Cache | None
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and recomputes:
            raise ValueError(
                f"{CACHE} with gradient checkpointing: each key would be written again when its "
                "layer is recomputed. Leave the cache out, or call the model under torch.no_grad()."
            )


def check_keywords(kwargs: dict[str, object], implementation: str) -> None:
    """Refuse keywords that nothing reads: a cache under a newer name would be silently lost.

    An implementation of attention that is not transformers' own may have keywords of its own.

    Raises: TypeError naming them.
    """
    unknown = {key for key, value in kwargs.items() if value is not None} - KEYWORDS
    if not implementation.startswith(("eager", "sdpa", "flash_attention", "flex_attention")):
        unknown = {key for key in unknown if isinstance(kwargs[key], Cache)}
    if unknown:
        raise TypeError(
            f"forward() got unknown keywords: {', '.join(sorted(unknown))}. Leave them out; "
            "pass a cache as past_key_values or cache."
        )


def resolve_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache, passed under either of its two names.

    Raises: TypeError when both are given, or it is no `Cache`.
    """
    if past_key_values is not None and cache is not None:
        raise TypeError("past_key_values and cache are the same argument: give one of them.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(
            f"{CACHE} is of the type {type(cache).__name__}: give a Cache of transformers, such as "
            "DynamicCache()."
        )
    return cache


def causal_mask(
    implementation: str,
    inputs_embeds: Tensor,
    past: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | BlockMask | None:
    """Build the mask of the tokens that each of S new ones attends to, `past` cached ones included.

    Args:
        implementation: `attn_implementation`; it decides what is returned.
        inputs_embeds: [B, S, H], for its shape and device.
        attention_mask: [B, past + S], 1: token, 0: padding.
        position_ids: [B or 1, S] as passed by the caller. Without mask and cache, a position that
            is not its predecessor plus one begins another packed sequence, and packed sequences do
            not attend to each other.

    Returns:
        `eager`, `sdpa`: booleans [B, 1, S, past + S], True: attended to. `flex_attention`: a
        `BlockMask`. Others: `attention_mask`, as flash attention takes it. None where `sdpa` or
        flash attention needs causal order only.
    """
    B, S = inputs_embeds.shape[:2]
    L, device = past + S, inputs_embeds.device
    packed = position_ids is not None and attention_mask is None and past == 0
    if attention_mask is not None:
        if attention_mask.shape[-1] != L:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[-1]} columns: give {L}, one for each of "
                f"{past} cached and {S} new tokens."
            )
        attention_mask = attention_mask.to(device, torch.bool)
        if attention_mask.all():
            attention_mask = None
    if implementation not in ("eager", "sdpa", "flex_attention"):
        return attention_mask
    if packed and position_ids is not None:
        begins_BS = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
        packed = bool(begins_BS.any())
    if implementation == "sdpa" and attention_mask is None and not packed and (past == 0 or S == 1):
        return None
    key_L = torch.arange(L, device=device)
    query_S1 = key_L[past:, None]
    attended = (key_L <= query_S1).expand(B, 1, S, L)
    if packed:
        sequence_BS = begins_BS.to(device).cumsum(-1)
        attended = attended & (sequence_BS[:, None, :, None] == sequence_BS[:, None, None, :])
    if attention_mask is not None:
        # Padding attends to itself: some kernels return NaN for a row without any key.
        attended = attended & (attention_mask[:, None, None, :] | (key_L == query_S1))
    if implementation == "flex_attention":
        return create_block_mask(lambda b, h, q, k: attended[b, 0, q, k], B, None, S, L, device)
    return attended


def reduce_aux_losses(
    losses_B: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **kwargs: object,
) -> Tensor:
    """Reduce the sequences' losses [B] to their mean, or to their share of a larger batch.

    A micro-batch knows only the number of labeled tokens of its batch, `num_items_in_batch`, by
    which the cross-entropy is divided too: each sequence is weighted by its own such tokens.
    """
    if num_items_in_batch is None or labels is None:
        return losses_B.mean()
    targets_BS = labels[:, 1:] if shift_labels is None else shift_labels
    counts = (targets_BS != ignore_index).reshape(len(losses_B), -1)  # [1, ...] without seq_aux
    tokens_B = counts.sum(dim=-1).to(losses_B.device)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(losses_B.device)
    return (losses_B * tokens_B).sum() / num_items_in_batch


class CoeForCausalLM(CoePreTrainedModel, GenerationMixin):
    """Language model: token ids to logits, and a loss if there are labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: CoeConfig) -> None:
        super().__init__(config)
        self.model = CoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Compute the logits [B, S, V] of tokens [B, S].

        Args (others as in `CoeModel.forward`):
            labels: [B, S], the tokens themselves (they are shifted here); -100 is left out. The
                loss is the mean cross-entropy. In training mode its *gradient* is also that of
                `aux_loss`, whose value is not added, as in the authors' code.
            num_items_in_batch: labeled tokens of the batch that this one is a micro-batch of
                (`Trainer` passes it): the loss and `aux_loss` are then shares of that batch's,
                which add up to the same however it is split.
            output_router_logits: also return the logits of every router call, a tuple of L * C
                tensors [T, N]: layer by layer, and in each its iterations in order.
            logits_to_keep: compute logits of the last n positions only (0: all), or of these.

        Returns:
            transformers' output; `aux_loss`, in training mode only, is `aux_loss_alpha` times the
            auxiliary loss summed over layers and iterations, with its graph: the sequences' mean,
            or with `num_items_in_batch` weighted by their shares of these tokens.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = getattr(config, "output_router_logits", False)
        balanced = self.training and config.aux_loss_alpha > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            output_router_logits=output_router_logits,
            output_aux_losses=balanced,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = aux_loss = None
        if balanced:
            losses_B = sum(value.to(logits.device) for value in outputs["aux_losses"])
            aux_loss = config.aux_loss_alpha * reduce_aux_losses(losses_B, labels, **kwargs)
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + (aux_loss - aux_loss.detach())
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


class CoeForSequenceClassification(GenericForSequenceClassification, CoePreTrainedModel):
    """Classifier or regressor: `config.num_labels` scores of each sequence's last token.

    The last token is the last one that is not `pad_token_id`, on whichever side the padding is.
    The auxiliary loss is not part of its gradient.
    """

    def __init__(self, config: CoeConfig) -> None:
        CoePreTrainedModel.__init__(self, config)  # transformers' own asks the Auto classes
        self.num_labels = config.num_labels
        self.model = CoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
