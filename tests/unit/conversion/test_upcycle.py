"""An upcycled mixture computes what it did, holds what it held, and says what it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_coe.config.run_config import load_settings
from megatron_coe.conversion.hf import from_hf, to_hf
from megatron_coe.conversion.upcycle import upcycle
from megatron_coe.hf import CoeForCausalLM
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.unit.conversion.models import megatron_logits, write_random_model
from tests.unit.training.runs import make_settings, make_trainer

MIXTURE = {"coe_iterations": 1, "coe_residual": "outer"}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
MIXTURES = {
    "plain": {},
    "dense layer first, low-rank queries": {"moe_layer_freq": [0, 1], "q_lora_rank": 12},
    "sigmoid scores with biases, one gate": {**SIGMOID, "coe_independent_gate": False},
    "best groups of experts": {
        "num_moe_experts": 8,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_group_score": "max",
    },
    "plain attention, tied": {
        "multi_latent_attention": False,
        "share_embeddings_and_output_weights": True,
    },
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_grown(chain: dict, mixture: dict, C: int) -> None:
    """Routers copied, gates closed, all else as it was, bit for bit."""
    expected = {}
    for name, tensor in mixture.items():
        before, gate, after = name.partition(".mlp.gate.")
        after = after.removeprefix("0.")
        names = [f"{before}{gate}{t}.{after}" for t in range(C)] if gate else [name]
        expected |= dict.fromkeys(names, tensor)
        if gate and after == "weight":
            closed = torch.zeros_like(mixture["model.norm.weight"])
            expected |= {f"{before}.mlp.coe_weights.{t}": closed for t in range(1, C)}
    assert chain.keys() == expected.keys()
    for name, tensor in expected.items():
        assert chain[name].dtype == tensor.dtype, name
        assert torch.equal(chain[name], tensor), name


@pytest.mark.parametrize("of", ["Hugging Face folder", "checkpoint"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_becomes_a_chain_that_computes_the_same(single_rank, tmp_path, name, of):
    mixture = write_random_model(tmp_path / "hf", seed=len(name), **MIXTURE, **MIXTURES[name])
    step = from_hf(tmp_path / "hf", tmp_path / "mixture")
    C = 2 if of == "checkpoint" else 3
    source = tmp_path / ("mixture" if of == "checkpoint" else "hf")
    grown = upcycle(source, tmp_path / "chain", C)

    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    before, after = (megatron_logits(path, ids, single_rank) for path in (step, grown))
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)

    to_hf(tmp_path / "chain", tmp_path / "exported")
    assert_grown(weights_of(tmp_path / "exported"), mixture, C)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["inner_iter"], config["coe_upcycled"], config["use_igate"]) == (C, True, True)
    model, report = CoeForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, before, rtol=0, atol=1e-5)


def test_a_model_of_transformers_is_upcycled(single_rank, tmp_path):
    """As transformers itself writes DeepSeek-V2, in half precision (5.24: but for the router)."""
    no_yarn = {"rope_type": "rope", "rotary_scaling_factor": 1.0}  # in transformers 4 it is wrong
    write_random_model(tmp_path / "hf", seed=2, **MIXTURE, **no_yarn)
    from_hf(tmp_path / "hf", tmp_path / "mixture")
    to_hf(tmp_path / "mixture", tmp_path / "native", torch.bfloat16, family="deepseek_v2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    grown = upcycle(tmp_path / "saved", tmp_path / "chain", 2)
    to_hf(tmp_path / "chain", tmp_path / "exported")
    assert_grown(weights_of(tmp_path / "exported"), weights_of(tmp_path / "saved"), 2)

    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.float().eval()(ids).logits
    logits = megatron_logits(grown, ids, single_rank)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_trained_run_goes_on_as_a_chain(single_rank, tmp_path):
    """Its settings are kept; its optimizer and the padding of its layout are not."""
    changes = {**MIXTURE, "vocab_size": 90, "make_vocab_size_divisible_by": 64}
    settings = make_settings(tmp_path / "run", model=changes, train={"steps": 3})
    settings.parallel.use_distributed_optimizer = True
    make_trainer(settings, single_rank).run()
    to_hf(tmp_path / "run", tmp_path / "before")
    grown = upcycle(tmp_path / "run", tmp_path / "chain", 2)
    to_hf(tmp_path / "chain", tmp_path / "after")
    assert_grown(weights_of(tmp_path / "after"), weights_of(tmp_path / "before"), 2)

    kept = load_settings(grown / CONFIG_FILE)
    assert kept.train == settings.train
    assert kept.parallel == settings.parallel
    assert kept.checkpoint.save == str(tmp_path / "chain")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"coe_iterations": 2}, "coe_iterations=2"),
        ({"coe_iterations": 1, "coe_residual": "inner"}, "coe_residual='inner'"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path, changes, told):
    write_random_model(tmp_path / "hf", seed=3, **{"coe_residual": "outer", **changes})
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    before = sorted(tmp_path.iterdir())
    for source in ("hf", "checkpoints"):
        with pytest.raises(ValueError, match=rf"{source}.*{told}"):
            upcycle(tmp_path / source, tmp_path / "chain", 2)
    assert sorted(tmp_path.iterdir()) == before


def test_other_mistakes_are_named_and_leave_nothing(tmp_path):
    write_random_model(tmp_path / "hf", seed=4, **MIXTURE)
    before = sorted(tmp_path.iterdir())
    for source, target, iterations, told in (
        ("hf", "chain", 1, "iterations=1"),
        ("hf", "hf", 2, "exists already"),
        ("nowhere", "chain", 2, "nowhere"),
    ):
        with pytest.raises(ValueError, match=told):
            upcycle(tmp_path / source, tmp_path / target, iterations)
        assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_mixture_is_named_and_leaves_nothing(tmp_path):
    write_random_model(tmp_path / "hf", seed=5, **MIXTURE)
    path, expert = tmp_path / "hf" / "model.safetensors", "model.layers.1.mlp.experts.4.up_proj"
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    weights = load_file(path)
    weights[f"{expert}.weight"].zero_()
    save_file(weights, path)
    (data,) = (tmp_path / "checkpoints").rglob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    before = sorted(tmp_path.iterdir())
    for source, told in (("hf", rf"{expert}.* is all zero"), ("checkpoints", "is bad: __0_0")):
        with pytest.raises(ValueError, match=told):
            upcycle(tmp_path / source, tmp_path / "chain", 2)
        assert sorted(tmp_path.iterdir()) == before
