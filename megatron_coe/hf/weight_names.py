"""One table of weight names, Megatron's and Hugging Face's, read both ways.

A row names the Hugging Face weights (DeepSeek-V2's names, with a router `gate` per iteration) that
make up one tensor of a Megatron checkpoint. `weights` unrolls the table for a model: one `Weight`
per Megatron tensor of each layer, with the exact shapes of its parts. It does not depend on the
layout over ranks: Megatron's distributed checkpoints hold unsharded tensors.

Axis letters: H hidden, V vocabulary, N routed experts, F feed-forward size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]

LAYERS = "decoder.layers."
MTP = "mtp.layers."
"""Layers of multi-token prediction; in a Hugging Face folder they follow the decoder's, with
DeepSeek-V3's names."""
MTP_MODEL_LAYER = ".mtp_model_layer."
"""Megatron's name since 0.19 of the decoder layer in an MTP layer, in modules but not in
checkpoints: there it stays `transformer_layer`."""


class ModelShape(Protocol):
    """The fields of a `CoEConfig` that decide which weights a model has, and their shapes."""

    moe_layer_pattern: list[int]
    moe_layer_freq: int | list[int]
    vocab_size: int
    padded_vocab_size: int
    share_embeddings_and_output_weights: bool
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int

    multi_latent_attention: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    num_query_groups: int
    kv_channels: int
    add_qkv_bias: bool
    qk_layernorm: bool

    num_moe_experts: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int | None
    moe_router_enable_expert_bias: bool
    coe_iterations: int
    coe_independent_gate: bool
    coe_upcycled: bool
    mtp_num_layers: int | None


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a Megatron checkpoint (of one layer, if it belongs to one) and its parts."""

    keys: tuple[str, ...]
    """Its spellings in checkpoints, without the layer: by module, or fused with a linear layer as
    Transformer Engine has it. The first is the one that is written."""
    layer: int | None
    parts: dict[str, Shape]
    """Hugging Face names and shapes, in the order of `split`."""
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]
    """The inverse of `split`. Both also work on a tensor-parallel rank, whose tensor is the join of
    its shards of all parts (of a padded one: after padding)."""
    experts: int = 0
    """Number of experts stacked in it; 0 if it belongs to none."""
    padded: bool = False
    """Whether it has a row per token id, and in the checkpoint further rows of padding."""
    keeps_fp32: bool = False
    """Whether it is never stored in a narrower dtype."""
    copies: tuple[str, ...] = ()
    """Further Hugging Face names of its only part: DeepSeek-V3's MTP layers repeat the embedding
    and the output layer, which all layers share."""

    def of_experts(self, first: int, count: int) -> Weight:
        """Return the part of a stacked weight for `count` experts from `first` on."""
        each = len(self.parts) // self.experts
        names = list(self.parts)[first * each : (first + count) * each]
        return replace(self, parts={name: self.parts[name] for name in names}, experts=count)


def weights(config: ModelShape) -> list[Weight]:
    """List every weight of a model: embedding, layer by layer, output layer, MTP layers."""
    model = _Names(config, None, "", "")
    result = [*_embedding(model)]
    for layer, has_experts in enumerate(config.moe_layer_pattern):
        result += _decoder_layer(
            _Names(config, layer, LAYERS, f"model.layers.{layer}."), has_experts
        )
    result += _output_layer(model)
    for depth, prefix in enumerate(mtp_prefixes(config)):
        result += _mtp_layer(_Names(config, None, f"{MTP}{depth}.", prefix))
    return result


def mtp_prefixes(config: ModelShape) -> tuple[str, ...]:
    """Return what the Hugging Face names of each MTP layer begin with."""
    first = len(config.moe_layer_pattern)
    return tuple(f"model.layers.{first + depth}." for depth in range(config.mtp_num_layers or 0))


@dataclass(frozen=True)
class _Names:
    """Builder of the rows of one layer, or of what is outside the layers."""

    config: ModelShape
    layer: int | None
    megatron: str
    hf: str

    def same(self, keys: str, name: str, *shape: int, **traits: Any) -> Weight:
        """Return one weight with two names; `keys` may hold several spellings, separated by |."""
        return self._row(
            keys, {name: shape}, lambda tensor: [tensor], lambda parts: parts[0], traits
        )

    def rows(self, keys: str, parts: Mapping[str, Shape]) -> Weight:
        """Return a weight of parts of one shape, concatenated along the first axis."""
        return self._row(keys, parts, lambda tensor: tensor.chunk(len(parts)), _join_rows)

    def vocabulary(self, keys: str, name: str, copy: str) -> Weight:
        """Return a weight with a row per token id, padded with zeros in Megatron.

        Args:
            copy: its name in MTP layers.
        """
        size, padding = self.config.vocab_size, self.config.padded_vocab_size
        return self._row(
            keys,
            {name: (size, self.config.hidden_size)},
            lambda tensor: [tensor[:size]],
            lambda parts: torch.nn.functional.pad(parts[0], (0, 0, 0, padding - size)),
            {"padded": True, "copies": tuple(mtp + copy for mtp in mtp_prefixes(self.config))},
        )

    def query_groups(self, keys: str, kind: str, *inputs: int) -> Weight:
        """Return q, k and v, which Megatron interleaves by group: its queries, key and value."""
        config = self.config
        groups, width = config.num_query_groups, config.kv_channels
        queries = config.num_attention_heads // groups
        counts = (queries, 1, 1)
        parts = {
            f"self_attn.{letter}_proj.{kind}": (groups * count * width, *inputs)
            for letter, count in zip("qkv", counts, strict=True)
        }

        def split(tensor: Tensor) -> list[Tensor]:
            grouped = tensor.view(-1, queries + 2, width, *inputs)
            return [part.reshape(-1, *inputs) for part in grouped.split(counts, dim=1)]

        def join(parts: Sequence[Tensor]) -> Tensor:
            grouped = [
                part.reshape(-1, count, width, *inputs)
                for part, count in zip(parts, counts, strict=True)
            ]
            return torch.cat(grouped, dim=1).reshape(-1, *inputs)

        return self._row(keys, parts, split, join)

    def experts(self, keys: str, matrices: Sequence[str], shape: Shape) -> Weight:
        """Return a tensor [N, rows, columns]: per expert, matrices concatenated by rows."""
        count, each = self.config.num_moe_experts, len(matrices)
        parts = {
            f"mlp.experts.{expert}.{matrix}.weight": shape
            for expert in range(count)
            for matrix in matrices
        }
        return self._row(
            keys,
            parts,
            lambda tensor: tensor.reshape(len(tensor) * each, -1, tensor.shape[-1]).unbind(),
            lambda parts: torch.stack(list(parts)).view(len(parts) // each, -1, parts[0].shape[-1]),
            experts=count,
        )

    def _row(
        self,
        keys: str,
        parts: Mapping[str, Shape],
        split: Callable[[Tensor], Sequence[Tensor]],
        join: Callable[[Sequence[Tensor]], Tensor],
        traits: dict[str, Any] | None = None,
        experts: int = 0,
    ) -> Weight:
        spellings = tuple(self.megatron + key for key in keys.split("|"))
        named = {self.hf + name: shape for name, shape in parts.items()}
        return Weight(spellings, self.layer, named, split, join, experts, **(traits or {}))


# --- the table --------------------------------------------------------------------------------


def _embedding(at: _Names) -> list[Weight]:
    keys, name = "embedding.word_embeddings.weight", "embed_tokens.weight"
    return [at.vocabulary(keys, f"model.{name}", copy=name)]


def _output_layer(at: _Names) -> list[Weight]:
    norm = at.same("decoder.final_layernorm.weight", "model.norm.weight", at.config.hidden_size)
    if at.config.share_embeddings_and_output_weights:
        return [norm]
    head = at.vocabulary("output_layer.weight", "lm_head.weight", copy="shared_head.head.weight")
    return [norm, head]


def _decoder_layer(at: _Names, has_experts: int) -> list[Weight]:
    rows = _latent_attention(at) if at.config.multi_latent_attention else _attention(at)
    return rows + (_coe_layer(at) if has_experts else _dense(at))


def _mtp_layer(at: _Names) -> list[Weight]:
    """Return the rows of an MTP layer, whose decoder layer is of the kind of the model's last."""
    H = at.config.hidden_size
    inner = replace(at, megatron=f"{at.megatron}transformer_layer.")
    return [
        at.same("enorm.weight", "enorm.weight", H),
        at.same("hnorm.weight", "hnorm.weight", H),
        at.same("eh_proj.weight", "eh_proj.weight", H, 2 * H),
        *_decoder_layer(inner, at.config.moe_layer_pattern[-1]),
        at.same("final_layernorm.weight", "shared_head.norm.weight", H),
    ]


def _join_rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _latent_attention(at: _Names) -> list[Weight]:
    c, attn = at.config, "self_attention."
    H, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    query = heads * (c.qk_head_dim + c.qk_pos_emb_head_dim)
    rows = [at.same("input_layernorm.weight", "input_layernorm.weight", H)]
    if c.q_lora_rank is None:
        rows += [at.same(f"{attn}linear_q_proj.weight", "self_attn.q_proj.weight", query, H)]
    else:
        fused = f"{attn}linear_q_up_proj.layer_norm_weight"
        up = f"{attn}linear_q_up_proj.weight"
        rows += [
            at.same(
                f"{attn}linear_q_down_proj.weight", "self_attn.q_a_proj.weight", c.q_lora_rank, H
            ),
            at.same(
                f"{attn}q_layernorm.weight|{fused}", "self_attn.q_a_layernorm.weight", c.q_lora_rank
            ),
            at.same(up, "self_attn.q_b_proj.weight", query, c.q_lora_rank),
        ]
    fused = f"{attn}linear_kv_up_proj.layer_norm_weight"
    down = (rank + c.qk_pos_emb_head_dim, H)
    from_latent = (heads * (c.qk_head_dim + c.v_head_dim), rank)
    return [
        *rows,
        at.same(f"{attn}linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", *down),
        at.same(f"{attn}kv_layernorm.weight|{fused}", "self_attn.kv_a_layernorm.weight", rank),
        at.same(f"{attn}linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", *from_latent),
        at.same(f"{attn}linear_proj.weight", "self_attn.o_proj.weight", H, heads * c.v_head_dim),
    ]


def _attention(at: _Names) -> list[Weight]:
    c, attn = at.config, "self_attention."
    H, width = c.hidden_size, c.kv_channels
    rows = [
        at.same(
            f"{attn}linear_qkv.layer_norm_weight|input_layernorm.weight",
            "input_layernorm.weight",
            H,
        ),
        at.query_groups(f"{attn}linear_qkv.weight", "weight", H),
    ]
    if c.add_qkv_bias:
        rows += [at.query_groups(f"{attn}linear_qkv.bias", "bias")]
    if c.qk_layernorm:
        rows += [
            at.same(f"{attn}{letter}_layernorm.weight", f"self_attn.{letter}_norm.weight", width)
            for letter in "qk"
        ]
    heads = c.num_attention_heads
    return [
        *rows,
        at.same(f"{attn}linear_proj.weight", "self_attn.o_proj.weight", H, heads * width),
    ]


def _feed_forward(at: _Names, keys: str, name: str, size: int) -> list[Weight]:
    H = at.config.hidden_size
    gate_over_up = {f"{name}{half}_proj.weight": (size, H) for half in ("gate", "up")}
    return [
        at.rows(f"{keys}linear_fc1.weight", gate_over_up),
        at.same(f"{keys}linear_fc2.weight", f"{name}down_proj.weight", H, size),
    ]


def _norm(at: _Names, modules_have_it: bool) -> Weight:
    """Return the norm before the MLP; with local plain attention it has TE's fused name."""
    spellings = ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"]
    keys = "|".join(spellings if modules_have_it else reversed(spellings))
    return at.same(keys, "post_attention_layernorm.weight", at.config.hidden_size)


def _dense(at: _Names) -> list[Weight]:
    norm = _norm(at, modules_have_it=at.config.multi_latent_attention)
    return [norm, *_feed_forward(at, "mlp.", "mlp.", at.config.ffn_hidden_size)]


def _coe_layer(at: _Names) -> list[Weight]:
    c = at.config
    H, N, F = c.hidden_size, c.num_moe_experts, c.moe_ffn_hidden_size
    rows = [_norm(at, modules_have_it=c.multi_latent_attention)]
    iterations = [f"{t}." for t in range(c.coe_iterations)] if c.coe_independent_gate else [""]
    for t in iterations:
        rows += [at.same(f"mlp.router.{t}weight", f"mlp.gate.{t}weight", N, H)]
        if c.moe_router_enable_expert_bias:
            bias = f"mlp.gate.{t}e_score_correction_bias"
            rows += [at.same(f"mlp.router.{t}expert_bias", bias, N, keeps_fp32=True)]
    if c.coe_upcycled:
        scales = [f"mlp.coe_weights.{t}" for t in range(1, c.coe_iterations)]
        rows += [at.same(scale, scale, H) for scale in scales]
    experts = "mlp.experts.experts."
    rows += [
        at.experts(f"{experts}linear_fc1.weight", ("gate_proj", "up_proj"), (F, H)),
        at.experts(f"{experts}linear_fc2.weight", ("down_proj",), (H, F)),
    ]
    if c.moe_shared_expert_intermediate_size:
        size, shared = c.moe_shared_expert_intermediate_size, "mlp.shared_experts."
        rows += _feed_forward(at, shared, shared, size)
    return rows
