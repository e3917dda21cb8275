"""Layouts: every rule is Megatron's arithmetic, and the answer to a mistake is legal and near."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

from megatron_coe.layout import Extents, Layout, check_layout, complaint, extents_of, nearest_legal

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
    ({TP: 8}, {"num_query_groups": 4}, ["num_query_groups=4", f"{TP}=8", f"has {TP}=4."]),
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
        assert (complaint(layout, extents) is None) == right, (layout, extents)
        seen[right] += 1
        if right:
            continue
        near = nearest_legal(layout, extents)
        assert legal(near, extents)
        changed = [
            f.name for f in fields(Layout) if getattr(near, f.name) != getattr(layout, f.name)
        ]
        if len(changed) > 1:  # then no single size mends it
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
