"""Parameters and FLOPs of a model, counted from its configuration alone.

Everything here is arithmetic on a `CoEConfig`: no tensor is made, so a trillion-parameter model is
counted as fast as a small one. `tests/unit/model/test_flops.py` holds these numbers against built
models.

Axis letters: S sequence, H hidden, N routed experts, K experts chosen per token and iteration,
C iterations, F feed-forward size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_coe.model.config import CoEConfig


@dataclass(frozen=True)
class MatrixWork:
    """Weights of some matrix products and how many multiply-adds a token spends in them.

    `stored` counts the weights, `active` those that one token can touch, each once, and `macs` the
    multiply-adds of one token's forward pass, where a weight used twice counts twice. Of the stored
    ones, expert-parallel ranks divide the `routed`; tensor-parallel ranks divide the others, but
    for the `replicated`, of which each holds all.
    """

    stored: int = 0
    active: int = 0
    macs: int = 0
    routed: int = 0
    replicated: int = 0

    def __add__(self, other: MatrixWork) -> MatrixWork:
        return MatrixWork(
            self.stored + other.stored,
            self.active + other.active,
            self.macs + other.macs,
            self.routed + other.routed,
            self.replicated + other.replicated,
        )

    def __mul__(self, n: int) -> MatrixWork:
        return MatrixWork(
            self.stored * n, self.active * n, self.macs * n, self.routed * n, self.replicated * n
        )


def _used_once(weights: int) -> MatrixWork:
    return MatrixWork(weights, weights, weights)


def _not_multiplied(weights: int) -> MatrixWork:
    """Norm and iteration scales: stored and active, but no matrix product nor counted as work."""
    return MatrixWork(weights, weights, replicated=weights)


def norm_params(config: CoEConfig, size: int) -> int:
    """Count the weights of one norm over `size` channels: a scale, for LayerNorm a shift too."""
    return size * (2 if config.normalization == "LayerNorm" else 1)


def attention_work(config: CoEConfig) -> MatrixWork:
    """Count the projections and inner norms of one self-attention (the core has no weights)."""
    H, heads = config.hidden_size, config.num_attention_heads
    if not config.multi_latent_attention:
        groups, head_dim = config.num_query_groups, config.kv_channels
        qkv = (heads + 2 * groups) * head_dim
        inner_norms = 2 * norm_params(config, head_dim) if config.qk_layernorm else 0
        biases = qkv if config.add_qkv_bias else 0
        projections = _used_once(H * qkv + heads * head_dim * H) + MatrixWork(biases, biases)
        return projections + _not_multiplied(inner_norms)

    q_out = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
    kv_out = heads * (config.qk_head_dim + config.v_head_dim)
    kv_rank, q_rank = config.kv_lora_rank, config.q_lora_rank
    q = H * q_out if q_rank is None else H * q_rank + q_rank * q_out
    kv = H * (kv_rank + config.qk_pos_emb_head_dim) + kv_rank * kv_out
    inner_norms = 0
    if config.qk_layernorm:
        inner_norms = norm_params(config, kv_rank)
        if q_rank is not None:
            inner_norms += norm_params(config, q_rank)
    return _used_once(q + kv + heads * config.v_head_dim * H) + _not_multiplied(inner_norms)


def ffn_params(config: CoEConfig, ffn_size: int) -> int:
    """Count the weights of one feed-forward network: up (and gate) and down projections."""
    return config.hidden_size * ffn_size * (3 if config.gated_linear_unit else 2)


def moe_work(config: CoEConfig) -> MatrixWork:
    """Count the routers, experts and iteration scales of one CoE layer, over its C iterations."""
    C, K, N = config.coe_iterations, config.moe_router_topk, config.num_moe_experts
    expert = ffn_params(config, config.moe_ffn_hidden_size)
    routers = (C if config.coe_independent_gate else 1) * N * config.hidden_size
    work = MatrixWork(N * expert, min(N, C * K) * expert, C * K * expert, routed=N * expert)
    work += MatrixWork(routers, routers, C * N * config.hidden_size, replicated=routers)
    if config.coe_upcycled:
        work += _not_multiplied((C - 1) * config.hidden_size)
    if config.moe_shared_expert_intermediate_size is not None:
        shared = ffn_params(config, config.moe_shared_expert_intermediate_size)
        gate = config.hidden_size if config.moe_shared_expert_gate else 0
        work += MatrixWork(shared + gate, shared + gate, C * (shared + gate), replicated=gate)
    return work


def layer_work(config: CoEConfig, is_moe: bool) -> MatrixWork:
    """Count one decoder layer with its two norms."""
    mlp = moe_work(config) if is_moe else _used_once(ffn_params(config, config.ffn_hidden_size))
    norms = _not_multiplied(2 * norm_params(config, config.hidden_size))
    return attention_work(config) + mlp + norms


def decoder_work(config: CoEConfig) -> MatrixWork:
    """Count the decoder, multi-token-prediction layers included; no embedding, no output layer."""
    H = config.hidden_size
    work = _not_multiplied(norm_params(config, H))  # final norm
    work += layers_work(config, [bool(is_moe) for is_moe in config.moe_layer_pattern])
    return work + mtp_work(config)


def layers_work(config: CoEConfig, layers: list[bool]) -> MatrixWork:
    """Count decoder layers together: which are CoE layers (True) and which dense."""
    work = MatrixWork()
    for is_moe in set(layers):
        work += layer_work(config, is_moe) * layers.count(is_moe)
    return work


def mtp_work(config: CoEConfig) -> MatrixWork:
    """Count the multi-token-prediction layers, which stand on the last pipeline stage."""
    if not config.mtp_num_layers:
        return MatrixWork()
    # Each joins the normed hidden state and the normed embedding: megatron/core/transformer/
    # multi_token_prediction.py (enorm, hnorm, eh_proj, a decoder layer, final_layernorm).
    H = config.hidden_size
    joint = _used_once(2 * H * H) + _not_multiplied(3 * norm_params(config, H))
    is_moe = bool(config.moe_layer_pattern[-1])
    return (joint + layer_work(config, is_moe)) * config.mtp_num_layers


def embedding_params(config: CoEConfig) -> int:
    """Count embedding table and output layer, padded for tensor parallelism; one table if tied."""
    tables = 1 if config.share_embeddings_and_output_weights else 2
    return tables * config.padded_vocab_size * config.hidden_size


def attention_core_macs(config: CoEConfig, seq_length: int) -> int:
    """Return a token's multiply-adds in a layer's causal S x S scores and their product with V."""
    if config.multi_latent_attention:
        widths = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    else:
        widths = 2 * config.kv_channels
    return config.num_attention_heads * widths * seq_length // 2  # half: the causal triangle


def flops_per_token(config: CoEConfig, seq_length: int) -> int:
    """Return the floating-point operations of one token's forward and backward pass.

    A multiply-add counts two and the backward pass twice the forward, so 6 per multiply-add; norms,
    activations, softmax and the optimizer are left out, as is usual.
    """
    layers = config.num_layers + (config.mtp_num_layers or 0)
    heads = 1 + (config.mtp_num_layers or 0)
    macs = decoder_work(config).macs + layers * attention_core_macs(config, seq_length)
    return 6 * (macs + heads * config.padded_vocab_size * config.hidden_size)
