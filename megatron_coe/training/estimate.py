"""Sizes of a run on paper: parameters, work per token, and memory of a rank.

Weights, gradients and optimizer state are exact for a model on one rank; activations are estimated
from the tensors that a layer keeps for its backward pass. Nothing is built.

Axis letters: S sequence, B micro-batch, T = S * B tokens, H hidden, K experts chosen, C iterations,
F expert feed-forward size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_coe import sizes
from megatron_coe.provider import CoEModelProvider
from megatron_coe.training.checks import data_parallel_size
from megatron_coe.training.settings import Settings

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(provider: CoEModelProvider, settings: Settings, world_size: int) -> Memory:
    """Memory of training one micro-batch on the rank that holds most."""
    dense, expert = _rank_params(provider)
    params = dense + expert
    optimizer = 12 if provider.bf16 else 8  # Adam's two moments, and fp32 main weights beside bf16
    states = params * optimizer
    if settings.parallel.use_distributed_optimizer:
        pp = provider.pipeline_model_parallel_size
        expert_ranks = provider.expert_model_parallel_size * provider.expert_tensor_parallel_size
        dense_replicas = data_parallel_size(settings, world_size) * provider.context_parallel_size
        expert_replicas = world_size // (expert_ranks * pp)
        states = optimizer * (dense // dense_replicas + expert // expert_replicas)
    return Memory(
        weights=params * (2 if provider.bf16 else 4),
        gradients=params * 4,  # reduced and summed over micro-batches in fp32
        optimizer=states,
        activations=_activation_bytes(provider, settings.train.micro_batch_size),
    )


def describe_sizes(provider: CoEModelProvider, settings: Settings, world_size: int) -> str:
    """The estimate as a small table."""
    S = provider.seq_length
    memory = estimate_memory(provider, settings, world_size)
    with_tables, body = provider.num_params(), provider.num_params(embeddings=False)
    active = provider.num_active_params()
    active_body = provider.num_active_params(embeddings=False)
    rows = [
        ("parameters", f"{with_tables:,} ({body:,} without embedding and head)"),
        ("active per token", f"at most {active:,} ({active_body:,})"),
        ("training FLOPs per token", f"{provider.flops_per_token(S):,} at sequence length {S}"),
        ("memory of a rank", f"{memory.total / GIB:.2f} GiB, of {world_size} rank(s)"),
        ("  weights", f"{memory.weights / GIB:.2f} GiB"),
        ("  gradients", f"{memory.gradients / GIB:.2f} GiB"),
        ("  optimizer", f"{memory.optimizer / GIB:.2f} GiB"),
        ("  activations", f"about {memory.activations / GIB:.2f} GiB"),
    ]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)


def _rank_params(provider: CoEModelProvider) -> tuple[int, int]:
    """Parameters (outside experts, in experts) of the fullest pipeline stage's ranks."""
    stages, tp = provider.pipeline_model_parallel_size, provider.tensor_model_parallel_size
    layers = -(-provider.num_layers // stages)
    experts_of = provider.num_moe_experts * sizes.ffn_params(provider, provider.moe_ffn_hidden_size)
    fullest = max(
        (
            provider.moe_layer_pattern[start : start + layers]
            for start in range(0, len(provider.moe_layer_pattern), layers)
        ),
        key=lambda pattern: sum(sizes.layer_work(provider, bool(moe)).stored for moe in pattern),
    )
    expert = sum(fullest) * experts_of
    dense = sum(sizes.layer_work(provider, bool(moe)).stored for moe in fullest) - expert
    dense += sizes.norm_params(provider, provider.hidden_size)
    tables = sizes.embedding_params(provider)
    dense += tables if stages == 1 else tables // 2
    expert_ranks = provider.expert_model_parallel_size * provider.expert_tensor_parallel_size
    return dense // tp, expert // expert_ranks


def _activation_bytes(provider: CoEModelProvider, micro_batch_size: int) -> int:
    """What the backward pass of a micro-batch needs, pipeline stages in flight included."""
    H, V = provider.hidden_size, provider.padded_vocab_size
    tokens = micro_batch_size * provider.seq_length // provider.context_parallel_size
    tp, element = provider.tensor_model_parallel_size, 2 if provider.bf16 else 4
    kept = sum(_layer_values(provider, bool(moe)) for moe in provider.moe_layer_pattern)
    # A stage holds 1/stages of the layers, for as many micro-batches as there are stages behind it.
    values = kept + 2 * H
    logits = V * (element + 4)  # the head's output, and its softmax in fp32
    return tokens * (values * element + logits) // tp


def _layer_values(provider: CoEModelProvider, is_moe: bool) -> int:
    """Numbers kept per token by one decoder layer."""
    H, heads = provider.hidden_size, provider.num_attention_heads
    if provider.multi_latent_attention:
        query = heads * (provider.qk_head_dim + provider.qk_pos_emb_head_dim)
        value = heads * provider.v_head_dim
        latent = 2 * provider.kv_lora_rank + provider.qk_pos_emb_head_dim
        attention = 2 * query + 2 * value + latent
    else:
        query = heads * provider.kv_channels
        value = provider.num_query_groups * provider.kv_channels
        attention = 2 * query + 2 * value
    # Two norms keep their inputs and outputs.
    values = 4 * H + attention
    gated = 3 if provider.gated_linear_unit else 2  # gate, up, and their product
    if not is_moe:
        return values + gated * provider.ffn_hidden_size
    C, K = provider.coe_iterations, provider.moe_router_topk
    routed = K * (2 * H + gated * provider.moe_ffn_hidden_size)
    shared = gated * (provider.moe_shared_expert_intermediate_size or 0)
    return values + C * (routed + shared + H + 4 * provider.num_moe_experts)
