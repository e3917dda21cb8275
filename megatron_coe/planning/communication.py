"""Collectives of a step: which, how many, how many bytes, how long; per rank.

Ranks lie as Megatron's default order "tp-cp-ep-dp-pp" puts them: tensor-parallel neighbours next to
each other, then context, then data, and pipeline stages farthest apart; for the experts
expert-tensor-parallel neighbours first, then expert-parallel ones.

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

    @property
    def sent_per_step(self) -> int:
        return self.times * self.sent


@dataclass(frozen=True)
class _Group:
    name: str
    size: int
    stride: int


def collectives(plan: Plan, stage: int, cluster: Cluster) -> list[Collective]:
    """All that a rank of a pipeline stage takes part in, but those of a few bytes."""
    return [c for c in _all(plan, stage, cluster) if c.calls and c.times]


def _all(plan: Plan, stage: int, cluster: Cluster) -> Iterator[Collective]:
    model, m = plan.model, plan.num_microbatches
    layers = plan.layers(stage)
    moe, dense = sum(layers) * m, (len(layers) - sum(layers)) * m
    iterations = moe * model.coe_iterations
    H, e, t, T = model.hidden_size, plan.element_size, plan.own_tokens, plan.tokens
    groups = {group.name: group for group in _groups(plan)}
    tp = groups["TP"].size

    def made(name, group, place, times, calls, sent, to_each=False) -> Collective:
        g = groups[group]
        calls, sent = (calls, int(sent)) if g.size > 1 else (0, 0)
        each = sent / calls if calls else 0
        seconds = calls * cluster.collective(each, g.size, g.stride, to_each=to_each)
        return Collective(name, group, place, times, calls, sent, seconds)

    # A recomputed forward pass communicates again.
    again = 1 + (model.recompute_granularity == "full")
    routed_again = again + _recomputes_moe(plan)
    ep, etp = groups["EP"].size, groups["ETP"].size
    rows = t * model.moe_router_topk
    away = (ep - 1) / ep
    yield made(
        "dispatch: rows and weights, all-to-all",
        "EP",
        "iteration",
        iterations,
        2 * (routed_again + 1),
        (routed_again + 1) * rows * (H * e + _FP32) * away,
        True,
    )
    yield made(
        "combine: rows, all-to-all",
        "EP",
        "iteration",
        iterations,
        routed_again + 1,
        (routed_again + 1) * rows * H * e * away,
        True,
    )
    yield made(
        "gather and scatter rows over ETP",
        "ETP",
        "iteration",
        iterations,
        3 * (routed_again + 1),
        (routed_again + 1) * rows * (2 * H * e + _FP32) * (etp - 1),
    )
    shared = model.moe_shared_expert_intermediate_size is not None
    part = t * H * e * (tp - 1)  # what a rank sends to gather or scatter the sequence once
    yield made(
        "shared expert: gather and scatter",
        "TP",
        "iteration",
        iterations * shared,
        2 * routed_again + 3,
        (2 * routed_again + 3) * part,
    )
    yield made(
        "dense MLP: gather and scatter", "TP", "layer", dense, 2 * again + 3, (2 * again + 3) * part
    )
    gathers, latent = _attention_gathers(plan)
    # Forward: gather each input, scatter the output. Backward: the reverse, and inputs once more.
    yield made(
        "attention: gather and scatter",
        "TP",
        "layer",
        moe + dense,
        again * (gathers + 1) + 2 * gathers + 1,
        part * (again * (latent + 1) + 2 * latent + 1),
    )
    keys_values = T * _key_value_width(plan) * e
    cp = groups["CP"].size
    yield made(
        "attention: keys and values",
        "CP",
        "layer",
        moe + dense,
        again + 1,
        (again + 1) * keys_values * (cp - 1),
    )
    if stage == 0:
        yield made("embedding: scatter", "TP", "micro-batch", m, 2, 2 * part)
    if stage == len(plan.chunks) - 1:
        yield made("output head: gather and scatter", "TP", "micro-batch", m, 3, 3 * part)
    rounds = len(plan.chunks[stage])
    yield made(
        "activations and gradients to neighbours", "PP", "micro-batch", m * rounds, 2, 2 * t * H * e
    )
    yield from _per_step(plan, stage, made)


def _per_step(plan: Plan, stage: int, made) -> Iterator[Collective]:
    weights, experts = stage_params(plan, stage)
    for name, group, params, n in (
        ("", "DP", weights, plan.dense_replicas),
        ("experts' ", "EDP", experts, plan.expert_replicas),
    ):
        share = params * (n - 1) / n
        if plan.use_distributed_optimizer:
            yield made(f"{name}gradients: reduce-scatter", group, "step", 1, 1, share * _FP32)
            yield made(f"{name}weights: gather", group, "step", 1, 1, share * plan.element_size)
        else:
            yield made(f"{name}gradients: all-reduce", group, "step", 1, 1, 2 * share * _FP32)


def _groups(plan: Plan) -> list[_Group]:
    model = plan.model
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size
    etp, ep = plan.expert_tp, model.expert_model_parallel_size
    pp = model.pipeline_model_parallel_size
    return [
        _Group("TP", tp, 1),
        _Group("CP", cp, tp),
        _Group("DP", plan.dense_replicas, tp),
        _Group("PP", pp, plan.world_size // pp),
        _Group("ETP", etp, 1),
        _Group("EP", ep, etp),
        _Group("EDP", plan.expert_replicas, etp * ep),
    ]


def _attention_gathers(plan: Plan) -> tuple[int, float]:
    """(number of gathered inputs, their width in units of H) of an attention's projections."""
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


def _recomputes_moe(plan: Plan) -> bool:
    model = plan.model
    return model.recompute_granularity == "selective" and "moe" in (model.recompute_modules or ())
