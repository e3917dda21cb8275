"""Every preset describes the model it is named after, at exactly its size.

Sizes are counted here from the shapes in the paper's table, without the package's own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_coe.config.loader import load_settings
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.validation import check_layout, check_values
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
from tests.unit.training.runs import make_settings

EXAMPLES = Path(__file__).parents[3] / "examples"


@dataclass(frozen=True)
class Paper:
    """A model of the paper: iterations, experts chosen, routed, shared, and what differs."""

    C: int
    K: int
    routed: int = 63
    shared: int = 1
    layers: int = 4
    residual: str = "inner"
    gates: int | None = None
    steps: int = 1000


MODELS = {
    "paper/moe_8-64": Paper(1, 8),
    "paper/coe-2_4-64": Paper(2, 4),
    "paper/coe-2_8-64": Paper(2, 8),
    "paper/moe_16-64": Paper(1, 16),
    "paper/moe_24-64": Paper(1, 24),
    "paper/coe-2_4-48": Paper(2, 4, routed=47),
    "paper/moe_8-48": Paper(1, 8, routed=47),
    "paper/moe_8-64_8-layers": Paper(1, 8, layers=8),
    "paper/moe_8-64_12-layers": Paper(1, 8, layers=12),
    "paper/coe-2_8-64_outer": Paper(2, 8, residual="outer"),
    "paper/coe-2_8-64_inner-outer": Paper(2, 8, residual="inner_outer"),
    "paper/coe-2_8-64_shared-gate": Paper(2, 8, gates=1),
    "paper/coe-2_8-64_shared-gate_inner-outer": Paper(2, 8, residual="inner_outer", gates=1),
    "paper/coe-2_4-64_outer": Paper(2, 4, residual="outer"),
    "paper/moe_8-64_outer": Paper(1, 8, residual="outer"),
    "paper/moe_7-64_outer": Paper(1, 7, residual="outer"),
    "paper/coe-2_4-64_addinit": Paper(2, 4, residual="addinit"),
    "paper/coe-2_4-64_no-shared": Paper(2, 4, routed=64, shared=0),
    "paper/moe_8-64_no-shared": Paper(1, 8, routed=64, shared=0),
    "paper/coe-2_8-8": Paper(2, 8, routed=8, shared=0),
    "paper/moe_8-8": Paper(1, 8, routed=8, shared=0),
    "paper/coe-2_7-8": Paper(2, 7, routed=7),
    "paper/moe_7-8": Paper(1, 7, routed=7),
    "paper/coe-1_8-64_10k": Paper(1, 8, steps=10_000),
    "paper/coe-2_8-64_10k": Paper(2, 8, steps=10_000),
    "paper/coe-3_8-64_10k": Paper(3, 8, steps=10_000),
    "paper/coe-4_8-64_10k": Paper(4, 8, steps=10_000),
    "paper/coe-2_3-64": Paper(2, 3),
    "paper/moe_7-64": Paper(1, 7),
    "scale/coe-2_4-65": Paper(2, 4, routed=64),
    "scale/moe_8-65": Paper(1, 8, routed=64),
}

PUBLISHED = {  # counted by instantiating the authors' model: (in all, without embedding and head)
    "paper/moe_8-64": (780_672_000, 570_956_800),
    "paper/coe-2_4-64": (780_930_048, 571_214_848),
}

H, F, V, HEADS, RANK = 1024, 704, 102_400, 8, 512
NOPE, ROPE, VALUE = 128, 64, 128


def body_size(model: Paper) -> int:
    """Parameters without embedding and head, from the shapes of the authors' modules."""
    q_proj = H * HEADS * (NOPE + ROPE)
    kv_a = H * (RANK + ROPE) + RANK  # with its norm
    kv_b = RANK * HEADS * (NOPE + VALUE)
    o_proj = HEADS * VALUE * H
    expert = H * F + H * F + F * H
    gates = (model.C if model.gates is None else model.gates) * model.routed * H
    experts = (model.routed + model.shared) * expert
    layer = q_proj + kv_a + kv_b + o_proj + gates + experts + 2 * H
    return model.layers * layer + H


def preset(name: str):
    settings = load_settings(EXAMPLES / f"{name}.yaml")
    check_values(settings)
    check_layout(settings, world_size=1)
    return settings, build_provider(settings, torch.device("cpu"))


def test_every_file_is_listed_here():
    found = {str(path.relative_to(EXAMPLES).with_suffix("")) for path in EXAMPLES.glob("*/*.yaml")}
    named = {name for name in found if name.startswith(("paper/", "scale/"))}
    ours = {name for name in named if not name.startswith("scale/") or name in MODELS}
    assert ours - {"paper/base"} == set(MODELS)  # tests/unit/planning/test_scale.py: the others


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_is_the_model_of_its_name(name):
    model = MODELS[name]
    settings, provider = preset(name)
    assert provider.num_params(embeddings=False) == body_size(model)
    assert provider.num_params() == body_size(model) + 2 * V * H
    assert (provider.coe_iterations, provider.moe_router_topk) == (model.C, model.K)
    assert provider.num_moe_experts == model.routed
    assert provider.coe_residual == model.residual
    assert provider.coe_independent_gate == (model.gates is None)
    assert settings.train.steps == model.steps
    if name.startswith("paper/"):
        C, K, N = model.C, model.K, model.routed + model.shared
        kind = "moe" if "/moe" in name else f"coe-{C}"
        assert name.removeprefix("paper/").split("_")[:2] == [kind, f"{K}-{N}"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_met_exactly(name):
    _, provider = preset(name)
    assert (provider.num_params(), provider.num_params(embeddings=False)) == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_is_the_papers(name):
    settings, provider = preset(name)
    train = settings.train
    assert (train.lr, train.min_lr, train.adam_beta1, train.adam_beta2) == (3e-4, 0.0, 0.9, 0.95)
    assert (train.weight_decay, train.decay_all_parameters, train.clip_grad) == (0.01, True, 1.0)
    assert (train.lr_warmup_fraction, train.lr_decay_style) == (0.1, "constant")
    assert (train.global_batch_size, provider.seq_length, train.seed) == (64, 512, 42)
    assert (settings.data.mode, train.eval_interval) == ("padded", 10)
    assert provider.moe_router_load_balancing_type == "seq_aux_loss"
    assert (provider.moe_aux_loss_coeff, provider.init_method_std) == (1e-3, 0.02)
    on_gpu = build_provider(settings, torch.device("cuda"))
    assert on_gpu.bf16 and on_gpu.params_dtype == torch.bfloat16
    assert not provider.bf16


def test_the_quickstart_is_a_small_chain_that_learns_and_validates():
    settings = load_settings(EXAMPLES / "quickstart.yaml")
    check_values(settings)
    check_layout(settings, world_size=1)
    provider = build_provider(settings, torch.device("cpu"), tokenizer_vocab_size=2048)
    assert provider.coe_iterations == 2 and provider.multi_latent_attention
    assert provider.num_params() < 10_000_000
    assert settings.data.valid and settings.train.eval_interval > 0
    assert settings.log.dir == "runs/quickstart"
    assert settings.checkpoint.save == "runs/quickstart/checkpoints"


def test_a_built_model_has_the_size(single_rank):
    _, provider = preset("paper/coe-2_4-64")
    provider.perform_initialization = False  # shapes only: the memory is never touched
    model = provider.provide()
    assert sum(parameter.numel() for parameter in model.parameters()) == 780_930_048


def test_a_graph_of_the_whole_iteration_is_refused() -> None:
    """Megatron's own loop captures it, under the field that each line has for it."""
    with pytest.raises(ValueError, match="full_iteration: coe train captures no CUDA graph"):
        build_provider(make_settings(model=_FULL_ITERATION), torch.device("cpu"), 96)


_FULL_ITERATION = (
    {"cuda_graph_impl": "full_iteration"}
    if PARTS_ARE_PARTIALS
    else {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
)
