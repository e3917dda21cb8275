"""Collectives of a step: which, how many, how many bytes, how long; per rank.

Ranks lie as Megatron's default order "tp-cp-ep-dp-pp" puts them: tensor-parallel neighbors next to
each other, then context, then data, and pipeline stages farthest apart; for the experts
expert-tensor-parallel neighbors first, then expert-parallel ones.

Axis letters: T tokens of a micro-batch on a rank's heads, t = T / TP its own, H hidden, K experts
chosen, N experts, C iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_coe.planning.hardware import Cluster
from megatron_coe.planning.memory import stage_params
from megatron_coe.planning.plan import Plan

_FP32 = 4


@dataclass(frozen=True)
class Collective:
    """One kind of collective in one of its places."""

    name: str
    group: str
    """Parallel dimension: TP, CP, EP, ETP, PP, DP or EDP."""
    place: str
    """What it happens in: an iteration or layer (of a micro-batch), a micro-batch, a step."""
    times: int
    """How often per step."""
    calls: int
    """Collectives each time, forward and backward."""
    sent: int
    """Bytes that a rank sends each time, forward and backward."""
    seconds: float
    """Each time."""


@dataclass(frozen=True)
class _Group:
    name: str
    size: int
    stride: int


def collectives(plan: Plan, stage: int, cluster: Cluster) -> list[Collective]:
    """List the collectives of a rank of a pipeline stage, but those of a few bytes."""
    made = _Maker(cluster, {group.name: group for group in _groups(plan)})
    parts = (_of_experts, _of_attention, _of_ends, _of_step)
    found = [collective for part in parts for collective in part(plan, stage, made)]
    return [collective for collective in found if collective.calls and collective.times]


@dataclass(frozen=True)
class _Maker:
    """Makes a `Collective` of what a rank sends in `calls` of them; none in a group of one."""

    cluster: Cluster
    groups: dict[str, _Group]

    def __call__(
        self,
        name: str,
        group: str,
        place: str,
        times: int,
        calls: int,
        sent: float,
        to_each: bool = False,
    ) -> Collective:
        g = self.groups[group]
        calls, sent = (calls, int(sent)) if g.size > 1 else (0, 0)
        each = sent / calls if calls else 0
        seconds = calls * self.cluster.collective(each, g.size, g.stride, to_each=to_each)
        return Collective(name, group, place, times, calls, sent, seconds)


def _of_experts(plan: Plan, stage: int, made: _Maker) -> Iterator[Collective]:
    """Return the collectives of routed and shared experts, and of dense networks."""
    model, layers = plan.model, plan.layers(stage)
    H, e = model.hidden_size, plan.element_size
    iterations = sum(layers) * plan.num_microbatches * model.coe_iterations
    forwards = _forwards(plan) + plan.recomputes("moe")
    passes = forwards + 1
    ep, etp = made.groups["EP"].size, made.groups["ETP"].size
    rows = plan.own_tokens * model.moe_router_topk
    place = ("EP", "iteration", iterations)
    away = passes * rows * (ep - 1) / ep
    name = "dispatch: rows and weights, all-to-all"
    yield made(name, *place, 2 * passes, away * (H * e + _FP32), to_each=True)
    yield made("combine: rows, all-to-all", *place, passes, away * H * e, to_each=True)
    part = passes * rows * (etp - 1)
    name = "gather and scatter rows over ETP"
    yield made(name, "ETP", "iteration", iterations, 3 * passes, part * (2 * H * e + _FP32))

    # Forward: gather the input, scatter the output. Backward: the reverse, and the input once more.
    part = _sequence_part(plan)
    if model.moe_shared_expert_intermediate_size is not None:
        calls = 2 * forwards + 3
        name = "shared expert: gather and scatter"
        yield made(name, "TP", "iteration", iterations, calls, calls * part)
    dense = layers.count(False) * plan.num_microbatches
    calls = 2 * _forwards(plan) + 3
    yield made("dense MLP: gather and scatter", "TP", "layer", dense, calls, calls * part)


def _of_attention(plan: Plan, stage: int, made: _Maker) -> Iterator[Collective]:
    times, forwards = len(plan.layers(stage)) * plan.num_microbatches, _forwards(plan)
    inputs, width = _attention_inputs(plan)
    calls = forwards * (inputs + 1) + 2 * inputs + 1
    sent = _sequence_part(plan) * (forwards * (width + 1) + 2 * width + 1)
    yield made("attention: gather and scatter", "TP", "layer", times, calls, sent)
    keys_values = plan.tokens * _key_value_width(plan) * plan.element_size
    calls, others = forwards + 1, made.groups["CP"].size - 1
    sent = calls * keys_values * others
    yield made("attention: keys and values", "CP", "layer", times, calls, sent)


def _of_ends(plan: Plan, stage: int, made: _Maker) -> Iterator[Collective]:
    """Return those of embedding, output layer and the neighboring pipeline stages."""
    m, part = plan.num_microbatches, _sequence_part(plan)
    if stage == 0:
        yield made("embedding: scatter", "TP", "micro-batch", m, 2, 2 * part)
    if stage == len(plan.chunks) - 1:
        yield made("output layer: gather and scatter", "TP", "micro-batch", m, 3, 3 * part)
    times, sent = m * len(plan.chunks[stage]), plan.own_tokens * _row(plan)
    name = "activations and gradients to neighbors"
    yield made(name, "PP", "micro-batch", times, 2, 2 * sent)


def _of_step(plan: Plan, stage: int, made: _Maker) -> Iterator[Collective]:
    """Return those of gradients and weights over the data-parallel ranks."""
    weights, experts = stage_params(plan, stage)
    for name, group, params, n in (
        ("", "DP", weights, plan.dense_data_parallel_size),
        ("experts' ", "EDP", experts, plan.expert_data_parallel_size),
    ):
        share = params * (n - 1) / n
        if plan.use_distributed_optimizer:
            yield made(f"{name}gradients: reduce-scatter", group, "step", 1, 1, share * _FP32)
            yield made(f"{name}weights: gather", group, "step", 1, 1, share * plan.element_size)
        else:
            yield made(f"{name}gradients: all-reduce", group, "step", 1, 1, 2 * share * _FP32)


def _row(plan: Plan) -> int:
    """Return the bytes of a token's hidden state."""
    return plan.model.hidden_size * plan.element_size


def _sequence_part(plan: Plan) -> int:
    """Return what a rank sends to gather, or to scatter, the sequence over TP once."""
    return plan.own_tokens * _row(plan) * (plan.model.tensor_model_parallel_size - 1)


def _forwards(plan: Plan) -> int:
    """Count a micro-batch's forward passes: a recomputed one communicates again."""
    return 1 + (plan.model.recompute_granularity == "full")


def _groups(plan: Plan) -> list[_Group]:
    model = plan.model
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size
    etp, ep = plan.layout.expert_tp, model.expert_model_parallel_size
    pp = model.pipeline_model_parallel_size
    return [
        _Group("TP", tp, 1),
        _Group("CP", cp, tp),
        _Group("DP", plan.dense_data_parallel_size, tp),
        _Group("PP", pp, plan.world_size // pp),
        _Group("ETP", etp, 1),
        _Group("EP", ep, etp),
        _Group("EDP", plan.expert_data_parallel_size, etp * ep),
    ]


def _attention_inputs(plan: Plan) -> tuple[int, float]:
    """Return the number of an attention's gathered inputs, and their width in units of H."""
    model = plan.model
    if not model.multi_latent_attention:
        return 1, 1.0
    latents = [model.kv_lora_rank] + [model.q_lora_rank] * (model.q_lora_rank is not None)
    return 2 + len(latents), 2 + sum(latents) / model.hidden_size


def _key_value_width(plan: Plan) -> int:
    model, tp = plan.model, plan.model.tensor_model_parallel_size
    if not model.multi_latent_attention:
        return 2 * max(1, model.num_query_groups // tp) * model.kv_channels
    widths = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
    return model.num_attention_heads // tp * widths
