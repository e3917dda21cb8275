"""What a forward pass saves for the backward pass, tensor by tensor, per rank.

Counted for the modules of `megatron_coe.model.backends.torch`: what autograd saves, each tensor
once however often it is saved (tests hold it against real passes). Transformer Engine's modules
save much the same.

Axis letters: S sequence, B micro-batch, T = S * B / CP tokens, of which t = T / TP are a rank's own
under sequence parallelism, H hidden, K experts chosen, N experts, C iterations, F feed-forward
size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_coe.model.linear_cross_entropy import chunk_rows
from megatron_coe.planning.plan import Chunk, Plan

_INDEX = 8  # bytes of an int64
_FP32 = 4


@dataclass(frozen=True)
class Saved:
    """Bytes saved from the forward to the backward pass, and bytes recomputed there.

    The latter are of one unit (a layer, an iteration) at a time.
    """

    saved: int = 0
    recomputed: int = 0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.saved + other.saved, max(self.recomputed, other.recomputed))

    def __mul__(self, times: int) -> Saved:
        return Saved(self.saved * times, self.recomputed if times else 0)


def stage_activations(plan: Plan, stage: int) -> int:
    """Return the bytes alive at the peak on a rank of a pipeline stage.

    They are those of all micro-batches in flight, and either what output layer and loss hold or
    what is being recomputed.
    """
    model = plan.model
    saved = Saved()
    for chunk, count in zip(plan.chunks[stage], in_flight(plan, stage), strict=True):
        saved += chunk_activations(plan, chunk) * count
    if stage < model.pipeline_model_parallel_size - 1:
        return saved.saved + saved.recomputed
    heads = 1 + (model.mtp_num_layers or 0)
    saved += Saved(_norm(plan, model.hidden_size, plan.own_tokens))
    if heads > 1:
        saved += _mtp_layer(plan) * (heads - 1)
    # What the losses need is freed before layers are recomputed.
    return saved.saved + max(_losses(plan, heads), saved.recomputed)


def _losses(plan: Plan, heads: int) -> int:
    """Count what losses keep: the softmax, or in its place both gradients, the weights' in fp32."""
    model = plan.model
    rows = model.padded_vocab_size // model.tensor_model_parallel_size
    if not model.fuses_output_layer(plan.on_gpu):
        return heads * plan.tokens * rows * _FP32
    x, weight = plan.tokens * model.hidden_size, rows * model.hidden_size
    return heads * (x * plan.element_size + weight * _FP32)


def loss_workspace(plan: Plan) -> int:
    """Return the bytes of logits on their way to the loss: all of them, or those of a chunk."""
    model, e, tokens = plan.model, plan.element_size, plan.tokens
    rows = model.padded_vocab_size // model.tensor_model_parallel_size
    if model.fuses_output_layer(plan.on_gpu):
        tokens = min(chunk_rows(tokens, rows, e, plan.on_gpu), tokens)
    return tokens * rows * e


def in_flight(plan: Plan, stage: int) -> list[int]:
    """Return how many micro-batches of each chunk of a stage await their backward pass at most.

    Follows the warm-up of megatron/core/pipeline_parallel/schedules.py: one forward pass for each
    stage behind this one, or under interleaving twice that and all earlier chunks'.
    """
    stages, chunks = len(plan.chunks), len(plan.chunks[stage])
    total = plan.num_microbatches * chunks
    if chunks == 1:
        return [min(total, stages - stage)]
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    counts = [0] * chunks
    for number in range(min(total, warm_up + 1)):
        counts[number % (stages * chunks) // stages] += 1
    return counts


def chunk_activations(plan: Plan, chunk: Chunk) -> Saved:
    """Return the activations of one micro-batch in the decoder layers of a model chunk."""
    model = plan.model
    kinds = {is_moe: layer_activations(plan, is_moe) for is_moe in set(chunk)}
    layers = [kinds[is_moe] for is_moe in chunk]
    if model.recompute_granularity != "full":
        return sum(layers, Saved())
    inputs = plan.own_tokens * model.hidden_size * plan.element_size
    unit = model.recompute_num_layers or 1
    if model.recompute_method == "block":  # the first layers each, the others not at all
        recomputed = [
            Saved(inputs, layer.saved + layer.recomputed - inputs) for layer in layers[:unit]
        ]
        return sum(recomputed + layers[unit:], Saved())
    blocks = [layers[start : start + unit] for start in range(0, len(layers), unit)]
    whole = [sum(layer.saved + layer.recomputed for layer in block) for block in blocks]
    return sum((Saved(inputs, block - inputs) for block in whole), Saved())


def layer_activations(plan: Plan, is_moe: bool) -> Saved:
    """Return those of one micro-batch in one decoder layer, which is not recomputed as a whole."""
    model = plan.model
    norms = 2 * _norm(plan, model.hidden_size, plan.own_tokens)
    layer = Saved(norms + _attention(plan))
    if is_moe:
        return layer + _iterations(plan)
    ffn = _ffn(plan, model.ffn_hidden_size, plan.own_tokens)
    if plan.recomputes("mlp"):
        return layer + Saved(0, ffn)
    return layer + Saved(ffn)


def iteration_activations(plan: Plan, t: int) -> Saved:
    """Return those of one micro-batch in iteration t = 0 … C - 1 of a CoE layer.

    x(t) is included but for x(0), which the norm before it saves.
    """
    model, e, own = plan.model, plan.element_size, plan.own_tokens
    H, K, N = model.hidden_size, model.moe_router_topk, model.num_moe_experts
    x = own * H * e if t else 0
    scored = 8 if model.moe_router_dtype == "fp64" else _FP32
    balanced = 2 if _balanced(plan) else 1
    if model.dispatches_locally:
        # Scores, chosen indices, and both directions' row indices, at half an index each.
        router = own * (N * scored + K * 2 * _INDEX)
    else:
        # Scores, chosen indices (both twice under an aux loss), the map and weights by expert,
        # and the order in which rows go to experts.
        router = own * (N * (scored * (balanced + 1) + 1) + K * _INDEX * (balanced + 1))
    scales = own * H * e if model.coe_upcycled and t else 0
    shared = 0
    if model.moe_shared_expert_intermediate_size:
        shared = _ffn(plan, model.moe_shared_expert_intermediate_size, own)
        shared += 2 * own * H * e if model.moe_shared_expert_gate else 0
    rows, width = plan.routed_rows, model.moe_ffn_hidden_size // plan.layout.expert_tp
    first = rows * width * (2 if model.gated_linear_unit else 1) * e
    activated = 0  # the torch backend's experts always recompute it, with or without "moe_act"
    if model.backend == "te":
        activated = rows * width * _activated(plan, routed=True) * e
    routed = rows * (H * e + scored) + first
    if plan.recomputes("moe"):
        return Saved(x, router + scales + shared + routed + activated)
    saved = Saved(x + router + scales + routed)
    saved += Saved(0, shared) if plan.recomputes("shared_experts") else Saved(shared)
    return saved + (Saved(0, activated) if plan.recomputes("moe_act") else Saved(activated))


def _iterations(plan: Plan) -> Saved:
    return sum((iteration_activations(plan, t) for t in range(plan.model.coe_iterations)), Saved())


def _norm(plan: Plan, width: int, tokens: int) -> int:
    """Return a norm's input, output and 1 / RMS; on a CPU also the normed input, in fp32."""
    e = plan.element_size
    inputs = e if plan.on_gpu else 2 * max(e, _FP32)
    return tokens * (width * (inputs + e) + _FP32)


def _attention(plan: Plan) -> int:
    """Return what lies between the first projections' outputs and the last one's input."""
    model, e = plan.model, plan.element_size
    tp, own = model.tensor_model_parallel_size, plan.own_tokens
    heads = model.num_attention_heads // tp
    if model.multi_latent_attention:
        key, value = model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
        latents = [model.kv_lora_rank] + [model.q_lora_rank] * (model.q_lora_rank is not None)
        if model.qk_layernorm:
            saved = sum(_norm(plan, rank, own) for rank in latents)
            saved += own * model.qk_pos_emb_head_dim * e  # stands beside the norm's input
        else:
            saved = own * sum(latents) * e
        return saved + _core(plan, heads, heads, key, value)
    groups, width = max(1, model.num_query_groups // tp), model.kv_channels
    saved = 0
    if not _gathers(plan):
        # The values are views of the projection's output, all of which stays alive for them.
        saved += plan.tokens * (heads + groups) * width * e
    if model.qk_layernorm:
        saved += _norm(plan, width, plan.tokens * (heads + groups))
    return saved + _core(plan, heads, groups, width, width)


def _core(plan: Plan, heads: int, groups: int, key: int, value: int) -> int:
    """Count queries, keys, values, their result, and the logarithm of each query's sum."""
    e, T, cp = plan.element_size, plan.tokens, plan.model.context_parallel_size
    # A CPU's kernel wants one width for all: values and result are padded, the latter then copied.
    padded = value if plan.on_gpu else max(key, value)
    copied = value if padded > value else 0
    keys_values = T * groups * (key + padded)
    if _gathers(plan):  # of all ranks, in one tensor; the result is joined of two chunks
        copied = value
        keys_values = cp * T * groups * (key + value)
        if padded > value:
            keys_values += T * (2 * cp + 1) * groups * padded // 2
    return (T * heads * (key + padded + copied) + keys_values) * e + T * heads * _FP32


def _gathers(plan: Plan) -> bool:
    """Return whether keys and values of all tokens are gathered, as by the torch backend."""
    return plan.model.context_parallel_size > 1 and plan.model.backend != "te"


def _ffn(plan: Plan, size: int, own_tokens: int) -> int:
    """Count a dense feed-forward network or shared expert.

    Tensor-parallel ranks divide its width while each sees all T tokens: T * F / TP = t * F.
    """
    first = 2 if plan.model.gated_linear_unit else 1
    return own_tokens * size * (first + _activated(plan, routed=False)) * plan.element_size


def _activated(plan: Plan, routed: bool) -> int:
    """Count the tensors of F columns between the projections, the first's output aside."""
    model = plan.model
    if model.bias_activation_fusion or (routed and model.use_fused_weighted_squared_relu):
        return 1  # the second projection's input
    if not model.gated_linear_unit:
        return 2 if routed else 1
    return 3  # the activated half; the other one or, routed, their product; the second one's input


def _mtp_layer(plan: Plan) -> Saved:
    """Count an MTP layer: two normed inputs, joined, a decoder layer, a norm."""
    model = plan.model
    H, own = model.hidden_size, plan.own_tokens
    norms = 3 * _norm(plan, H, own)
    return Saved(norms) + layer_activations(plan, bool(model.moe_layer_pattern[-1]))


def _balanced(plan: Plan) -> bool:
    coefficients = plan.model.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    return any(coefficients) and plan.model.moe_router_load_balancing_type != "none"
