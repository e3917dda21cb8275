"""The table of weight names by itself; what it says of real models the conversion tests show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_coe.hf.weight_names import weights
from tests.builders import tiny_provider

REPO = Path(__file__).resolve().parents[3]


def test_it_needs_torch_only() -> None:
    """Conversion works without transformers, and serving reads the table without Megatron."""
    loaded = (
        "import sys, megatron_coe.hf.weight_names; "
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=REPO, check=True, capture_output=True, text=True
    )
    assert "'torch'" in done.stdout
    assert "'megatron'" not in done.stdout and "'transformers'" not in done.stdout


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    import megatron_coe.hf

    with pytest.raises(AttributeError, match="no attribute 'CoEForCausalLM'"):
        megatron_coe.hf.CoEForCausalLM  # noqa: B018 - the lookup is what is tested


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layer_freq": [0, 1], "q_lora_rank": 8, "vocab_size": 94},
        {"multi_latent_attention": False, "num_query_groups": 2, "add_qkv_bias": True},
    ],
    ids=["latent attention", "plain attention"],
)
def test_splitting_undoes_joining(changes: dict) -> None:
    generator = torch.Generator().manual_seed(3)
    for weight in weights(tiny_provider(**changes)):
        parts = [torch.randn(shape, generator=generator) for shape in weight.parts.values()]
        again = weight.split(weight.join(parts))
        assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True)), weight.keys


def test_the_part_of_some_experts_is_theirs_in_the_stack() -> None:
    generator = torch.Generator().manual_seed(4)
    stacked = [weight for weight in weights(tiny_provider()) if weight.experts]
    assert len(stacked) == 4  # two linear layers, in each of two layers
    for weight in stacked:
        parts = {n: torch.randn(s, generator=generator) for n, s in weight.parts.items()}
        some = weight.of_experts(2, 3)
        joined = some.join([parts[name] for name in some.parts])
        assert torch.equal(joined, weight.join(list(parts.values()))[2:5])


def test_a_rank_of_two_holds_half_of_gate_and_half_of_up() -> None:
    (weight,) = (
        w
        for w in weights(tiny_provider(moe_layer_freq=[0, 1]))
        if "mlp.linear_fc1.weight" in w.keys[0]
    )
    gate, up = (torch.randn(shape) for shape in weight.parts.values())
    second = weight.join([part.chunk(2)[1] for part in (gate, up)])
    assert torch.equal(second, torch.cat([gate[24:], up[24:]]))
    assert all(map(torch.equal, weight.split(second), (gate[24:], up[24:])))
