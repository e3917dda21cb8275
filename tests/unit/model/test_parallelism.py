"""Layouts: every rule is Megatron's arithmetic, and the answer to a mistake is legal and near."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from megatron_coe.model import config as coe_config
from megatron_coe.model.parallelism import (
    Extents,
    Layout,
    check_layout,
    extents_of,
    nearest_legal,
    violation,
)
from megatron_coe.planning.build import build_rank
from megatron_coe.planning.plan import Plan
from tests.builders import TINY, tiny_provider

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VPP, CP = "virtual_pipeline_model_parallel_size", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
MODEL = {
    "num_layers": 27,
    "num_attention_heads": 16,
    "num_moe_experts": 64,
    "moe_ffn_hidden_size": 1408,
    "seq_length": 4096,
}
REFUSED = [
    # (layout, what differs from MODEL, words of the answer)
    ({EP: 8}, {"num_moe_experts": 63, "world_size": 8}, ["=63", f"{EP}=8", f"has {EP}=1."]),
    ({EP: 8}, {"num_moe_experts": 63}, ["1, 3, 7, 9, 21, 63", "56 or 64", f"has {EP}=9."]),
    ({TP: 3}, {}, ["num_attention_heads=16", f"{TP}=3", "1, 2, 4, 8, 16", f"has {TP}=4."]),
    ({TP: 8}, {"num_query_groups": 3}, ["num_query_groups=3", f"{TP}=8", f"has {TP}=1."]),
    ({TP: 4}, {"kv_latent_width": 18}, ["qk_pos_emb_head_dim=18", f"{TP}=4", f"has {TP}=2."]),
    ({TP: 4}, {"q_lora_rank": 6}, ["q_lora_rank=6", f"{TP}=4", f"has {TP}=2."]),
    ({ETP: 3}, {}, ["moe_ffn_hidden_size=1408", f"{ETP}=3", f"has {ETP}=4."]),
    ({PP: 2}, {}, ["num_layers=27", f"{PP}=2", "1, 3, 9, 27", f"has {PP}=3."]),
    ({PP: 3, VPP: 2}, {}, ["num_layers=27", f"{VPP} (2) = 6", f"has {VPP}=3."]),
    ({VPP: 3}, {}, [f"{VPP}=3 needs {PP} > 1", f"has {PP}=3."]),
    ({PP: 3, VPP: 1}, {}, [f"{VPP}=1", "leave it out", f"has {VPP}=null."]),
    ({CP: 2}, {"seq_length": 510}, ["seq_length=510", "508 or 512"]),
    ({CP: 2, TP: 4}, {"seq_length": 500}, ["seq_length=500", "multiple of 8", f"has {TP}=2."]),
    ({TP: 2, CP: 2}, {"world_size": 6}, ["make 4", "processes, 6", "4 or 8", f"has {TP}=1."]),
    ({EP: 4, PP: 3}, {"world_size": 9}, ["make 12", "processes, 9", "12 processes", f"has {EP}=1"]),
]


@pytest.mark.parametrize(("layout", "changes", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_mistake_is_answered_with_its_values_and_the_nearest_legal_layout(layout, changes, words):
    extents = Extents(**{**MODEL, **changes})
    with pytest.raises(ValueError) as error:
        check_layout(Layout(**layout), extents)
    for word in words:
        assert word in str(error.value)


def legal(layout: Layout, e: Extents) -> bool:
    """The same rules once more, as a person would write them down."""
    tp, pp, cp = (getattr(layout, name) for name in (TP, PP, CP))
    vpp, ep, etp = getattr(layout, VPP), getattr(layout, EP), getattr(layout, ETP) or tp
    return (
        e.world_size % (tp * pp * cp) == 0
        and e.world_size % (etp * ep * pp) == 0
        and (vpp is None or (vpp > 1 and pp > 1))
        and e.num_layers % (pp * (vpp or 1)) == 0
        and e.num_attention_heads % tp == 0
        and e.num_moe_experts % ep == 0
        and e.moe_ffn_hidden_size % etp == 0
        and e.seq_length % (tp * cp) == 0
        and (cp == 1 or e.seq_length % (2 * cp) == 0)
    )


def test_random_layouts_are_judged_right_and_sent_to_a_nearest_one():
    rng = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(500):
        extents = Extents(
            num_layers=rng.choice([4, 6, 27]),
            num_attention_heads=rng.choice([6, 8]),
            num_moe_experts=rng.choice([63, 64]),
            moe_ffn_hidden_size=48,
            seq_length=rng.choice([96, 100]),
            world_size=rng.choice([1, 4, 6, 8, 12]),
        )
        sizes = {name: rng.choice([1, 1, 2, 3, 4]) for name in (TP, PP, CP, EP)}
        layout = Layout(
            **sizes, **{VPP: rng.choice([None, None, 1, 2]), ETP: rng.choice([None, 1])}
        )
        right = legal(layout, extents)
        assert (violation(layout, extents) is None) == right, (layout, extents)
        seen[right] += 1
        if right:
            continue
        near = nearest_legal(layout, extents)
        assert legal(near, extents)
        changed = [
            f.name for f in fields(Layout) if getattr(near, f.name) != getattr(layout, f.name)
        ]
        if len(changed) > 1:  # then no single size fixes it
            for name in (TP, PP, CP, EP, ETP, VPP):
                for size in [None] * (name in (VPP, ETP)) + list(range(1, 28)):
                    assert not legal(replace(layout, **{name: size}), extents)
    assert min(seen.values()) > 30


def test_what_is_not_divided_evenly_on_purpose_is_left_to_megatron():
    model = {**MODEL, "num_layers_in_first_pipeline_stage": 13, "ffn_hidden_size": 5}
    assert extents_of(model).num_layers is None
    assert extents_of(model).ffn_hidden_size is None, "no layer is dense"
    assert extents_of({**model, "moe_layer_freq": [0, 1]}).ffn_hidden_size == 5
    assert extents_of({"num_layers": "${x}"}) == Extents()


LATENT = {"kv_lora_rank": 16, "qk_pos_emb_head_dim": 4, "num_attention_heads": 6}
PLAIN = {"multi_latent_attention": False, "num_attention_heads": 12, "hidden_size": 24}
FOUND_BY_HAND: list[dict[str, Any]] = [
    {TP: 3, **LATENT},
    {TP: 2, **LATENT, "q_lora_rank": 9},
    {TP: 2, **LATENT, "q_lora_rank": 10},
    {TP: 4, **PLAIN, "num_query_groups": 2},
    {TP: 4, **PLAIN, "num_query_groups": 6},
    {TP: 12, **PLAIN, "num_query_groups": 4, "kv_channels": 2},
    {TP: 3, ETP: 1, **PLAIN, "hidden_size": 28, "ffn_hidden_size": None, "moe_layer_freq": [0, 1]},
    {PP: 2, "num_layers_in_first_pipeline_stage": 3},
    {PP: 3, "account_for_loss_in_pipeline_split": True, "mtp_num_layers": 1},
]


def random_model(rng: random.Random) -> dict[str, Any]:
    """A model in a layout, each of which the others may not allow."""
    model: dict[str, Any] = {
        TP: rng.choice([1, 2, 3, 4]),
        PP: rng.choice([1, 1, 2, 3]),
        EP: rng.choice([1, 1, 2, 3]),
        ETP: rng.choice([None, 1, 2, 3]),
        "num_layers": rng.choice([2, 4, 6]),
        "num_attention_heads": rng.choice([4, 12]),
        "hidden_size": rng.choice([24, 48]),
        "num_moe_experts": rng.choice([6, 7]),
        "ffn_hidden_size": rng.choice([None, 20, 24]),
        "moe_ffn_hidden_size": rng.choice([8, 9, 12]),
        "moe_shared_expert_intermediate_size": rng.choice([None, 8, 12]),
        "moe_grouped_gemm": rng.random() < 0.7,
        "share_embeddings_and_output_weights": rng.random() < 0.2,
        "multi_latent_attention": rng.random() < 0.6,
    }
    if model["multi_latent_attention"]:
        names = {"kv_lora_rank": [16, 20], "qk_pos_emb_head_dim": [4, 8]}
        model["q_lora_rank"] = rng.choice([None, 8, 12])
    else:
        names = {"num_query_groups": [None, 1, 2, 3, 4], "kv_channels": [None, 2, 8]}
    model |= {name: rng.choice(values) for name, values in names.items()}
    dense = [rng.choice([0, 1, 1]) for _ in range(model["num_layers"] - 1)]
    model["moe_layer_freq"] = [*dense, 1]
    if model[PP] > 1:
        model[VPP] = rng.choice([None, None, 2])
        uneven = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        model |= {name: rng.choice([1, 4]) for name in uneven if rng.random() < 0.1}
    return model


def build(model: dict[str, Any]) -> None:
    """Build ranks of up to three stages by Megatron's modules, after Megatron's own checks."""
    model = {**model, "sequence_parallel": model.get(TP, 1) > 1, "pipeline_dtype": torch.float32}
    model["seq_length"] = 48  # by which nothing is built
    if model.get(VPP):
        model |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    provider = tiny_provider(**model)
    layout = Layout(**{f.name: getattr(provider, f.name) for f in fields(Layout)})
    world_size = layout.world_multiple
    for rank in {0, world_size // 2, world_size - 1}:
        build_rank(Plan(provider, world_size), rank)


def refusal(model: dict[str, Any]) -> Exception | None:
    try:
        build(model)
    except (ValueError, AssertionError, StopIteration, IndexError) as error:
        return error
    return None


def test_what_is_refused_is_what_modules_refuse(device: torch.device, monkeypatch) -> None:
    """Layouts that pass are built; those that do not cannot be, once nothing of ours refuses."""
    rng = random.Random(1)
    models = [*FOUND_BY_HAND, *(random_model(rng) for _ in range(40))]
    refused = 0
    for model in models:
        ours = refusal(model)
        assert ours is None or isinstance(ours, ValueError), (ours, model)
        if ours is not None:
            refused += 1
            with monkeypatch.context() as patch:
                patch.setattr(coe_config.CoEConfig, "_check_layout", lambda self: None)
                assert refusal(model) is not None, (ours, model)
    assert 10 < refused < len(models) - 10


def test_whole_latents_are_not_asked_to_divide() -> None:
    """Transformer Engine keeps the down-projections whole on each rank."""
    others = dict.fromkeys(("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 48)
    model = {**TINY, **LATENT, **others, "q_lora_rank": 5}
    assert violation(Layout(3), extents_of(model)).startswith("kv_lora_rank + qk_pos_emb_head_dim=")
    assert violation(Layout(3), extents_of({**model, "backend": "te"})) is None
