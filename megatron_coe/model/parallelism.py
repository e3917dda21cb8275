"""Parallel layouts: which sizes a model and a number of processes allow, and the nearest that fit.

Plain arithmetic over Megatron's field names, so that a mistake is answered before Megatron is
imported or a process group made. One rule per line of `RULES`; ranking layouts uses the same
ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any

_LISTED = 12  # legal sizes that a message names at most


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; the names of Megatron's `ModelParallelConfig`."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None: as `tensor_model_parallel_size`."""

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: must be greater than 0")

    @property
    def expert_tp(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def dense_ranks(self) -> int:
        """Return the ranks over which one sequence's work is sharded: TP x CP x PP."""
        return (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def expert_ranks(self) -> int:
        """Return the ranks over which one copy of the experts is sharded: ETP x EP x PP."""
        return self.expert_tp * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def world_multiple(self) -> int:
        """Return the fewest ranks that hold the layout; every legal number is a multiple."""
        return math.lcm(self.dense_ranks, self.expert_ranks)

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas that read different sequences on `world_size` processes.

        Context-parallel ranks share theirs.
        """
        return world_size // self.dense_ranks

    @property
    def sequence_multiple(self) -> int:
        """Return what a sequence's length must be a multiple of.

        Two chunks per CP rank balance causal attention; sequence parallelism cuts each rank's part
        again.
        """
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        return math.lcm(2 * cp if cp > 1 else 1, tp * cp)


def layout_of(config: object) -> Layout:
    """Return the parallel sizes among the fields of a configuration, or of section `parallel`."""
    return Layout(**{f.name: getattr(config, f.name) for f in fields(Layout)})


@dataclass(frozen=True)
class Extents:
    """What a layout has to divide. None: not known, or divided in a way of the user's own."""

    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    qkv_width: int | None = None
    """Rows of plain attention's one projection to queries, keys and values."""
    kv_latent_width: int | None = None
    """Rows of latent attention's down-projection: kv_lora_rank + qk_pos_emb_head_dim."""
    q_lora_rank: int | None = None
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    ffn_hidden_size: int | None = None
    seq_length: int | None = None
    world_size: int | None = None


def extents_of(model: Mapping[str, object], world_size: int | None = None) -> Extents:
    """Return what is known of a model, by the names of its configuration's fields.

    Sizes that are left out are derived as Megatron derives them, from those that are given.
    """
    given = {name: value for name, value in model.items() if type(value) is int and value > 0}
    if "hidden_size" in given:
        given.setdefault("ffn_hidden_size", 4 * given["hidden_size"])
    if "ffn_hidden_size" in given:
        given.setdefault("moe_ffn_hidden_size", given["ffn_hidden_size"])
    sizes = {f.name: given.get(f.name) for f in fields(Extents)}
    if any(model.get(name) for name in UNEVEN_STAGES):
        sizes["num_layers"] = None
    frequency = model.get("moe_layer_freq", 1)
    if frequency == 1 or (isinstance(frequency, list) and all(frequency)):
        sizes["ffn_hidden_size"] = None  # there is no dense layer
    if not model.get("multi_latent_attention", True):
        return Extents(**sizes | {"q_lora_rank": None, "world_size": world_size, **_plain(given)})
    if model.get("backend") == "te":
        sizes["q_lora_rank"] = None  # Transformer Engine keeps down-projections whole on each rank
    elif {"kv_lora_rank", "qk_pos_emb_head_dim"} <= given.keys():
        sizes["kv_latent_width"] = given["kv_lora_rank"] + given["qk_pos_emb_head_dim"]
    return Extents(**sizes | {"world_size": world_size})


def _plain(given: Mapping[str, int]) -> dict[str, int]:
    """Return the width of plain attention's projection, if it is known."""
    heads, groups = given.get("num_attention_heads"), given.get("num_query_groups")
    width = given.get("kv_channels")
    if heads and width is None and "hidden_size" in given:
        width = given["hidden_size"] // heads
    if not (heads and groups and width):
        return {}
    return {"qkv_width": (heads + 2 * groups) * width}


# Megatron's ways to give pipeline stages different numbers of layers; it checks them itself.
UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


@dataclass(frozen=True)
class Rule:
    """`extent` must be a multiple of what the layout's `sizes` make together."""

    extent: str
    sizes: tuple[str, ...]
    multiple: Callable[[Layout], int]
    or_divisor: bool = False
    """Whether a divisor is legal, too: several ranks then compute the same part."""

    def broken_by(self, layout: Layout, extents: Extents) -> bool:
        extent, multiple = getattr(extents, self.extent), self.multiple(layout)
        if extent is None or extent % multiple == 0:
            return False
        return not (self.or_divisor and multiple % extent == 0)

    def violation(self, layout: Layout, extents: Extents) -> str:
        extent, multiple = getattr(extents, self.extent), self.multiple(layout)
        values = {name: getattr(layout, name) for name in self.sizes}
        if "expert_tensor_parallel_size" in values:
            values["expert_tensor_parallel_size"] = layout.expert_tp
        named = " x ".join(f"{name} ({size})" for name, size in values.items() if size)
        if self.extent == "world_size":
            return (
                f"{named} make {multiple}, which does not divide the number of processes, "
                f"{extent}: start {_around(extent, layout.world_multiple)} processes"
            )
        if self.extent == "seq_length":
            return (
                f"seq_length={extent} with {named} is not a multiple of {multiple}: "
                f"{_around(extent, multiple)} are"
            )
        label = _LABELS.get(self.extent, self.extent)
        if len(self.sizes) > 1:
            return f"{label}={extent} is not divisible by {named} = {multiple}"
        (name,) = self.sizes
        if self.or_divisor:
            return f"{label}={extent} is neither a multiple nor a divisor of {name}={multiple}"
        return (
            f"{label}={extent} is not divisible by {name}={multiple}: legal sizes are "
            f"{_listed(divisors(extent))} (and {label}={_around(extent, multiple)} would do)"
        )


_LABELS = {
    "qkv_width": "(num_attention_heads + 2 x num_query_groups) x kv_channels",
    "kv_latent_width": "kv_lora_rank + qk_pos_emb_head_dim",
}


_TP, _PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
_VPP, _CP = "virtual_pipeline_model_parallel_size", "context_parallel_size"
_EP, _ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"

RULES = (
    Rule("num_attention_heads", (_TP,), lambda layout: layout.tensor_model_parallel_size),
    Rule("num_query_groups", (_TP,), lambda layout: layout.tensor_model_parallel_size, True),
    Rule("qkv_width", (_TP,), lambda layout: layout.tensor_model_parallel_size),
    Rule("kv_latent_width", (_TP,), lambda layout: layout.tensor_model_parallel_size),
    Rule("q_lora_rank", (_TP,), lambda layout: layout.tensor_model_parallel_size),
    Rule("ffn_hidden_size", (_TP,), lambda layout: layout.tensor_model_parallel_size),
    Rule(
        "moe_shared_expert_intermediate_size",
        (_TP,),
        lambda layout: layout.tensor_model_parallel_size,
    ),
    Rule("num_moe_experts", (_EP,), lambda layout: layout.expert_model_parallel_size),
    Rule("moe_ffn_hidden_size", (_ETP,), lambda layout: layout.expert_tp),
    Rule("num_layers", (_PP,), lambda layout: layout.pipeline_model_parallel_size),
    Rule(
        "num_layers",
        (_PP, _VPP),
        lambda layout: (
            layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1)
        ),
    ),
    Rule("seq_length", (_TP, _CP), lambda layout: layout.sequence_multiple),
    Rule("world_size", (_TP, _PP, _CP), lambda layout: layout.dense_ranks),
    Rule("world_size", (_ETP, _EP, _PP), lambda layout: layout.expert_ranks),
)


def violation(layout: Layout, extents: Extents) -> str | None:
    """Describe the first rule that the layout breaks, with the values; None if it is legal."""
    vpp, pp = layout.virtual_pipeline_model_parallel_size, layout.pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        return f"{_VPP}={vpp} needs pipeline_model_parallel_size > 1"
    if vpp == 1:
        return f"{_VPP}=1 is the plain schedule: leave it out"
    for rule in RULES:
        if rule.broken_by(layout, extents):
            return rule.violation(layout, extents)
    return None


def check_layout(layout: Layout, extents: Extents) -> None:
    """Refuse an illegal layout.

    Raises:
        ValueError: the message has the values and the nearest legal layout.
    """
    found = violation(layout, extents)
    if found is None:
        return
    near = nearest_legal(layout, extents)
    hint = f". The nearest legal layout has {_changes(layout, near)}" if near else ""
    raise ValueError(f"{found}{hint}.")


def nearest_legal(layout: Layout, extents: Extents) -> Layout | None:
    """Return the legal layout that changes the fewest sizes, and these by the smallest factors."""
    candidates = {name: _candidates(name, layout, extents) for name in _NAMES}
    for count in range(1, len(_NAMES) + 1):
        legal = [
            changed
            for names in combinations(_NAMES, count)
            for values in product(*(candidates[name] for name in names))
            if not violation(changed := replace(layout, **_named(names, values)), extents)
        ]
        if legal:
            return min(legal, key=lambda other: _distance(layout, other))
    return None


def _named(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


_NAMES = tuple(f.name for f in fields(Layout))


def _candidates(name: str, layout: Layout, extents: Extents) -> list[int | None]:
    """Return the sizes worth trying: divisors of everything that this size has to divide."""
    bounds = [
        getattr(extents, rule.extent)
        for rule in RULES
        if name in rule.sizes and not rule.or_divisor and getattr(extents, rule.extent) is not None
    ]
    sizes: list[int | None] = list(divisors(math.gcd(*bounds))) if bounds else [1]
    if name in (_VPP, _ETP):
        sizes = [None, *sizes[1:]] if name == _VPP else [None, *sizes]
    return [size for size in sizes if size != getattr(layout, name)]


def _distance(layout: Layout, other: Layout) -> float:
    pairs = [(getattr(layout, name) or 1, getattr(other, name) or 1) for name in _NAMES]
    return sum(abs(math.log(a / b)) for a, b in pairs)


def _changes(layout: Layout, other: Layout) -> str:
    changed: Iterator[str] = (
        f"{name}={'null' if getattr(other, name) is None else getattr(other, name)}"
        for name in _NAMES
        if getattr(other, name) != getattr(layout, name)
    )
    return ", ".join(changed)


def _around(number: int, multiple: int) -> str:
    """Return the multiples just below and above a number that is none."""
    below = number // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def _listed(sizes: list[int]) -> str:
    shown = sizes if len(sizes) <= _LISTED else [*sizes[:_LISTED], "…"]
    return ", ".join(map(str, shown))
