"""What a forward pass keeps for the backward pass, tensor by tensor, per rank.

Counted for the modules of `megatron_coe.model.backends.torch`: what autograd saves, each tensor
once however often it is saved (tests hold it against real passes). Transformer Engine's modules
keep much the same.

Axis letters: S sequence, B micro-batch, T = S * B / CP tokens, of which t = T / TP are a rank's own
under sequence parallelism, H hidden, K experts chosen, N experts, C iterations, F feed-forward
size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_coe.planning.plan import Chunk, Plan

_INDEX = 8  # bytes of an int64
_FP32 = 4


@dataclass(frozen=True)
class Kept:
    """Bytes from the forward to the backward pass, and those that recomputation makes anew there,
    for one unit (a layer, an iteration) at a time."""

    held: int = 0
    remade: int = 0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.held + other.held, max(self.remade, other.remade))

    def __mul__(self, times: int) -> Kept:
        return Kept(self.held * times, self.remade if times else 0)


def stage_activations(plan: Plan, stage: int) -> int:
    """Bytes alive at the worst moment on a rank of a pipeline stage: of all micro-batches in
    flight, and either the head's softmax or what is being recomputed."""
    model = plan.model
    kept = Kept()
    for chunk, count in zip(plan.chunks[stage], in_flight(plan, stage), strict=True):
        kept += chunk_kept(plan, chunk) * count
    if stage < model.pipeline_model_parallel_size - 1:
        return kept.held + kept.remade
    heads = 1 + (model.mtp_num_layers or 0)
    kept += Kept(_norm(plan, model.hidden_size, plan.own_tokens))
    if heads > 1:
        kept += _mtp_layer(plan) * (heads - 1)
    softmax = heads * plan.own_tokens * model.padded_vocab_size * _FP32
    return kept.held + max(softmax, kept.remade)  # the softmax goes before layers are recomputed


def in_flight(plan: Plan, stage: int) -> list[int]:
    """Micro-batches of each model chunk of a stage whose backward pass is still to come, at most.

    Follows the warm-up of megatron/core/pipeline_parallel/schedules.py: one forward pass for each
    stage behind this one, or under interleaving twice that and all earlier chunks' rounds.
    """
    stages, rounds = len(plan.chunks), len(plan.chunks[stage])
    total = plan.num_microbatches * rounds
    if rounds == 1:
        return [min(total, stages - stage)]
    warm_up = 2 * (stages - stage - 1) + (rounds - 1) * stages
    counts = [0] * rounds
    for number in range(min(total, warm_up + 1)):
        counts[number % (stages * rounds) // stages] += 1
    return counts


def chunk_kept(plan: Plan, chunk: Chunk) -> Kept:
    """One micro-batch in the decoder layers of a model chunk."""
    model = plan.model
    kinds = {is_moe: layer_kept(plan, is_moe) for is_moe in set(chunk)}
    layers = [kinds[is_moe] for is_moe in chunk]
    if model.recompute_granularity != "full":
        return sum(layers, Kept())
    inputs = plan.own_tokens * model.hidden_size * plan.element_size
    unit = model.recompute_num_layers or 1
    if model.recompute_method == "block":  # the first layers each, the others not at all
        remade = [Kept(inputs, layer.held + layer.remade - inputs) for layer in layers[:unit]]
        return sum(remade + layers[unit:], Kept())
    blocks = [layers[start : start + unit] for start in range(0, len(layers), unit)]
    whole = [sum(layer.held + layer.remade for layer in block) for block in blocks]
    return sum((Kept(inputs, block - inputs) for block in whole), Kept())


def layer_kept(plan: Plan, is_moe: bool) -> Kept:
    """One micro-batch in one decoder layer, without recomputation of the layer as a whole."""
    model = plan.model
    norms = 2 * _norm(plan, model.hidden_size, plan.own_tokens)
    layer = Kept(norms + _attention(plan))
    if is_moe:
        return layer + _chain(plan)
    ffn = _ffn(plan, model.ffn_hidden_size, plan.own_tokens)
    if _recomputes(plan, "mlp"):
        return layer + Kept(0, ffn)
    return layer + Kept(ffn)


def iteration_kept(plan: Plan, t: int) -> Kept:
    """One micro-batch in iteration t = 0 … C - 1 of a CoE layer, x(t) included but x(0), which the
    norm before it keeps."""
    model, e, own = plan.model, plan.element_size, plan.own_tokens
    H, K, N = model.hidden_size, model.moe_router_topk, model.num_moe_experts
    x = own * H * e if t else 0
    scored = 8 if model.moe_router_dtype == "fp64" else _FP32
    balanced = 2 if _balanced(plan) else 1
    if model.dispatches_locally:
        # Scores, chosen indices, and both ways the rows' places, at half an index each.
        router = own * (N * scored + K * 2 * _INDEX)
    else:
        # Scores, chosen indices (both twice under a balance loss), the map and weights by expert,
        # and the order in which rows go to experts.
        router = own * (N * (scored * (balanced + 1) + 1) + K * _INDEX * (balanced + 1))
    gates = own * H * e if model.coe_upcycled and t else 0
    shared = 0
    if model.moe_shared_expert_intermediate_size:
        shared = _ffn(plan, model.moe_shared_expert_intermediate_size, own)
        shared += 2 * own * H * e if model.moe_shared_expert_gate else 0
    rows, width = plan.routed_rows, model.moe_ffn_hidden_size // plan.expert_tp
    first = rows * width * (2 if model.gated_linear_unit else 1) * e
    activated = 0  # the torch backend's experts always make it anew, with or without "moe_act"
    if model.backend == "te":
        activated = rows * width * _activated(plan, routed=True) * e
    routed = rows * (H * e + scored) + first
    if _recomputes(plan, "moe"):
        return Kept(x, router + gates + shared + routed + activated)
    kept = Kept(x + router + gates + routed)
    kept += Kept(0, shared) if _recomputes(plan, "shared_experts") else Kept(shared)
    return kept + (Kept(0, activated) if _recomputes(plan, "moe_act") else Kept(activated))


def _chain(plan: Plan) -> Kept:
    return sum((iteration_kept(plan, t) for t in range(plan.model.coe_iterations)), Kept())


def _norm(plan: Plan, width: int, tokens: int) -> int:
    """Input, output and 1 / RMS of each token; on a CPU also the normed input, and both in fp32."""
    e = plan.element_size
    inputs = e if plan.on_gpu else 2 * max(e, _FP32)
    return tokens * (width * (inputs + e) + _FP32)


def _attention(plan: Plan) -> int:
    """From the first projections' outputs to the input of the last one."""
    model, e = plan.model, plan.element_size
    tp, own = model.tensor_model_parallel_size, plan.own_tokens
    heads = model.num_attention_heads // tp
    if model.multi_latent_attention:
        key, value = model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim
        latents = [model.kv_lora_rank] + [model.q_lora_rank] * (model.q_lora_rank is not None)
        if model.qk_layernorm:
            kept = sum(_norm(plan, rank, own) for rank in latents)
            kept += own * model.qk_pos_emb_head_dim * e  # stands beside the norm's input
        else:
            kept = own * sum(latents) * e
        return kept + _core(plan, heads, heads, key, value)
    groups, width = max(1, model.num_query_groups // tp), model.kv_channels
    kept = 0
    if not _gathers(plan):
        # The values are a part of the projection's output, which stays as a whole for their sake.
        kept += plan.tokens * (heads + groups) * width * e
    if model.qk_layernorm:
        kept += _norm(plan, width, plan.tokens * (heads + groups))
    return kept + _core(plan, heads, groups, width, width)


def _core(plan: Plan, heads: int, groups: int, key: int, value: int) -> int:
    """Queries, keys, values, their result, and the logarithm of each query's sum."""
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
    """Whether keys and values of the whole sequence are gathered, as the torch backend does."""
    return plan.model.context_parallel_size > 1 and plan.model.backend != "te"


def _ffn(plan: Plan, size: int, own_tokens: int) -> int:
    """A dense feed-forward network or shared expert, whose width tensor-parallel ranks divide while
    each sees all T tokens: T * F / TP = t * F."""
    first = 2 if plan.model.gated_linear_unit else 1
    return own_tokens * size * (first + _activated(plan, routed=False)) * plan.element_size


def _activated(plan: Plan, routed: bool) -> int:
    """Tensors of F columns between the two projections, besides the first one's output."""
    model = plan.model
    if model.bias_activation_fusion or (routed and model.use_fused_weighted_squared_relu):
        return 1  # the second projection's input
    if not model.gated_linear_unit:
        return 2 if routed else 1
    return 3  # the activated half; the other one or, routed, their product; the second one's input


def _mtp_layer(plan: Plan) -> Kept:
    """A multi-token-prediction layer: two normed inputs, joined, a decoder layer, a norm."""
    model = plan.model
    H, own = model.hidden_size, plan.own_tokens
    norms = 3 * _norm(plan, H, own)
    return Kept(norms) + layer_kept(plan, bool(model.moe_layer_pattern[-1]))


def _balanced(plan: Plan) -> bool:
    coefficients = plan.model.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    return any(coefficients) and plan.model.moe_router_load_balancing_type != "none"


def _recomputes(plan: Plan, module: str) -> bool:
    model = plan.model
    return model.recompute_granularity == "selective" and module in (model.recompute_modules or ())
