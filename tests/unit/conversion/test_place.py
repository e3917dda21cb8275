"""Experts in another order: the same function, every weight where it belongs, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.conversion.place import place, read_orders, write_orders
from megatron_coe.hf import CoeForCausalLM
from tests.unit.conversion.models import megatron_logits, write_random_model

N = 6
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
MODELS = {
    "chain": {},
    "biases, three iterations": {**SIGMOID, "coe_iterations": 3},
    "one router, dense layer first": {"coe_independent_gate": False, "moe_layer_freq": [0, 1]},
    "upcycled": {"coe_residual": "outer", "coe_upcycled": True},
}


def orders_for(layers: list[int]) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(5)
    return {layer: torch.randperm(N, generator=generator).tolist() for layer in layers}


def inverse(order: list[int]) -> list[int]:
    return [order.index(expert) for expert in range(N)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = CoeForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_placed_model_is_the_same_function(single_rank, tmp_path, name):
    changes = {"num_moe_experts": N, **MODELS[name]}
    before = write_random_model(tmp_path / "hf", seed=len(name), **changes)
    step = from_hf(tmp_path / "hf", tmp_path / "first")
    layers = [2] if "dense" in name else [1, 2]
    orders = orders_for(layers)
    write_orders(tmp_path / "p.json", {3: orders, 2: {k: inverse(o) for k, o in orders.items()}})

    source = tmp_path / ("first" if "biases" in name else "hf")
    placed = place(source, tmp_path / "placed", tmp_path / "p.json", 3)
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        megatron_logits(placed, ids, single_rank), megatron_logits(step, ids, single_rank),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    to_hf(tmp_path / "placed", tmp_path / "exported")
    expected = logits_of(tmp_path / "hf", ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(tmp_path / "exported", ids), expected, rtol=0, atol=1e-12)

    after = weights_of(tmp_path / "exported")
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        prefix, experts, rest = key.partition(".mlp.experts.")
        layer = int(key.split(".")[2]) + 1 if key.startswith("model.layers") else None
        if experts:
            number, _, matrix = rest.partition(".")
            key = f"{prefix}{experts}{orders[layer][int(number)]}.{matrix}"
            assert torch.equal(tensor, before[key]), key
        elif ".mlp.gate." in key:
            assert torch.equal(tensor, before[key][orders[layer]]), key
        else:
            assert torch.equal(tensor, before[key]), key
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert any("gate" in key for key in moved) and any("experts" in key for key in moved)

    # And back, bit for bit.
    place(tmp_path / "placed", tmp_path / "back", tmp_path / "p.json", 2)
    to_hf(tmp_path / "back", tmp_path / "again")
    again = weights_of(tmp_path / "again")
    assert all(torch.equal(again[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("content", "ep", "told"),
    [
        ({"2": {"1": [0, 1, 2, 3, 4, 5]}}, 2, r"layers \[1\].*experts in \[1, 2\]"),
        (
            {"2": {"1": [0, 1, 2, 3, 4, 5], "2": [0, 0, 2, 3, 4, 5]}},
            2,
            "layer 2: not an order of 6",
        ),
        ({"2": {"1": [0, 1], "2": [0, 1]}}, 2, "layer 1: not an order of 6 experts"),
        ({"2": {}, "4": {}}, 8, "no placement for EP 8; it has 2, 4"),
        ({"2": [1]}, 2, "holds no placement"),
    ],
    ids=["a layer", "twice", "another size", "another EP", "something else"],
)
def test_a_placement_that_does_not_fit_is_refused(tmp_path, content, ep, told):
    write_random_model(tmp_path / "hf", seed=1, num_moe_experts=N)
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        place(tmp_path / "hf", tmp_path / "out", tmp_path / "p.json", ep)
    assert not (tmp_path / "out").exists()


def test_groups_of_experts_stay_where_they_are(tmp_path):
    groups = {
        "moe_router_num_groups": 3,
        "moe_router_group_topk": 2,
        "moe_router_group_score": "max",
    }
    write_random_model(tmp_path / "hf", seed=1, num_moe_experts=N, **groups)
    write_orders(tmp_path / "p.json", {2: orders_for([1, 2])})
    with pytest.raises(ValueError, match="moe_router_num_groups=3"):
        place(tmp_path / "hf", tmp_path / "out", tmp_path / "p.json", 2)


def test_orders_are_read_as_they_were_written(tmp_path):
    orders = orders_for([1, 2])
    write_orders(tmp_path / "p.json", {4: orders})
    assert read_orders(tmp_path / "p.json", 4) == orders
