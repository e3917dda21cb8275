"""Upcycling: the same logits at first, all weights kept, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_coe.config.loader import load_settings
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.conversion.upcycle import upcycle
from megatron_coe.hf import CoeForCausalLM
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.unit.conversion.models import megatron_logits, write_random_model
from tests.unit.training.runs import make_settings, make_trainer

STANDARD_MOE = {"coe_iterations": 1, "coe_residual": "outer"}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
MOE_MODELS = {
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


def assert_upcycled(coe: dict, moe: dict, C: int) -> None:
    """Routers copied, iteration scales zero, all else as it was, bit for bit."""
    expected = {}
    for name, tensor in moe.items():
        before, gate, after = name.partition(".mlp.gate.")
        after = after.removeprefix("0.")
        names = [f"{before}{gate}{t}.{after}" for t in range(C)] if gate else [name]
        expected |= dict.fromkeys(names, tensor)
        if gate and after == "weight":
            zeros = torch.zeros_like(moe["model.norm.weight"])
            expected |= {f"{before}.mlp.coe_weights.{t}": zeros for t in range(1, C)}
    assert coe.keys() == expected.keys()
    for name, tensor in expected.items():
        assert coe[name].dtype == tensor.dtype, name
        assert torch.equal(coe[name], tensor), name


@pytest.mark.parametrize("of", ["Hugging Face folder", "checkpoint"])
@pytest.mark.parametrize("name", MOE_MODELS)
def test_an_upcycled_moe_computes_the_same(single_rank, tmp_path, name, of):
    moe = write_random_model(tmp_path / "hf", seed=len(name), **STANDARD_MOE, **MOE_MODELS[name])
    step = from_hf(tmp_path / "hf", tmp_path / "moe")
    C = 2 if of == "checkpoint" else 3
    source = tmp_path / ("moe" if of == "checkpoint" else "hf")
    upcycled = upcycle(source, tmp_path / "coe", C)

    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    before, after = (megatron_logits(path, ids, single_rank) for path in (step, upcycled))
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)

    to_hf(tmp_path / "coe", tmp_path / "exported")
    assert_upcycled(weights_of(tmp_path / "exported"), moe, C)
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
    write_random_model(tmp_path / "hf", seed=2, **STANDARD_MOE, **no_yarn)
    from_hf(tmp_path / "hf", tmp_path / "moe")
    to_hf(tmp_path / "moe", tmp_path / "native", torch.bfloat16, family="deepseek_v2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    upcycled = upcycle(tmp_path / "saved", tmp_path / "coe", 2)
    to_hf(tmp_path / "coe", tmp_path / "exported")
    assert_upcycled(weights_of(tmp_path / "exported"), weights_of(tmp_path / "saved"), 2)

    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.float().eval()(ids).logits
    logits = megatron_logits(upcycled, ids, single_rank)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_trained_run_is_upcycled(single_rank, tmp_path):
    """Its settings are kept; its optimizer and the padding of its layout are not."""
    changes = {**STANDARD_MOE, "vocab_size": 90, "make_vocab_size_divisible_by": 64}
    settings = make_settings(tmp_path / "run", model=changes, train={"steps": 3})
    settings.parallel.use_distributed_optimizer = True
    make_trainer(settings, single_rank).run()
    to_hf(tmp_path / "run", tmp_path / "before")
    upcycled = upcycle(tmp_path / "run", tmp_path / "coe", 2)
    to_hf(tmp_path / "coe", tmp_path / "after")
    assert_upcycled(weights_of(tmp_path / "after"), weights_of(tmp_path / "before"), 2)

    kept = load_settings(upcycled / CONFIG_FILE)
    assert kept.train == settings.train
    assert kept.parallel == settings.parallel
    assert kept.checkpoint.save == str(tmp_path / "coe")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"coe_iterations": 2}, "coe_iterations=2"),
        ({"coe_iterations": 1, "coe_residual": "inner"}, "coe_residual='inner'"),
    ],
)
def test_what_is_no_standard_moe_is_refused(tmp_path, changes, told):
    write_random_model(tmp_path / "hf", seed=3, **{"coe_residual": "outer", **changes})
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    before = sorted(tmp_path.iterdir())
    for source in ("hf", "checkpoints"):
        with pytest.raises(ValueError, match=rf"{source}.*{told}"):
            upcycle(tmp_path / source, tmp_path / "coe", 2)
    assert sorted(tmp_path.iterdir()) == before


def test_other_mistakes_are_named_and_leave_nothing(tmp_path):
    write_random_model(tmp_path / "hf", seed=4, **STANDARD_MOE)
    before = sorted(tmp_path.iterdir())
    for source, target, iterations, told in (
        ("hf", "coe", 1, "iterations=1"),
        ("hf", "hf", 2, "exists already"),
        ("nowhere", "coe", 2, "nowhere"),
    ):
        with pytest.raises(ValueError, match=told):
            upcycle(tmp_path / source, tmp_path / target, iterations)
        assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_moe_is_named_and_leaves_nothing(tmp_path):
    write_random_model(tmp_path / "hf", seed=5, **STANDARD_MOE)
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
            upcycle(tmp_path / source, tmp_path / "coe", 2)
        assert sorted(tmp_path.iterdir()) == before
