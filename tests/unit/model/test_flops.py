"""Counts by formula against the models themselves, and against the paper's figures."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_coe.megatron_compat.versions import clear_aux_losses
from tests.builders import randomize, tiny_provider

PAPER = {
    "num_layers": 4,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "num_moe_experts": 63,
    "moe_ffn_hidden_size": 704,
    "moe_shared_expert_intermediate_size": 704,
    "vocab_size": 102400,
}
SHAPES = {
    "paper's layer": {},
    "one router for all": {"coe_iterations": 3, "coe_independent_gate": False},
    "four routers": {"coe_iterations": 4},
    "upcycled": {"coe_iterations": 3, "coe_residual": "outer", "coe_upcycled": True},
    "no shared expert": {"moe_shared_expert_intermediate_size": None},
    "gated shared expert": {"moe_shared_expert_gate": True},
    "dense layer between": {"num_layers": 3, "moe_layer_freq": [0, 1, 0]},
    "q-LoRA": {"q_lora_rank": 12},
    "plain attention": {"multi_latent_attention": False},
    "grouped queries, normed": {
        "multi_latent_attention": False,
        "num_query_groups": 2,
        "qk_layernorm": True,
        "add_qkv_bias": True,
    },
    "tied tables": {"share_embeddings_and_output_weights": True},
    "LayerNorm": {"normalization": "LayerNorm"},
    "no gate in the experts": {"gated_linear_unit": False, "activation_func": "gelu"},
    "padded vocabulary": {"vocab_size": 90, "make_vocab_size_divisible_by": 64},
    "multi-token prediction": {"mtp_num_layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_built_model(single_rank, shape: str) -> None:
    provider = tiny_provider(**SHAPES[shape])
    model = provider.provide()
    tables = [model.embedding.word_embeddings.weight]
    if not provider.share_embeddings_and_output_weights:
        tables.append(model.output_layer.weight)
    built = sum(p.numel() for p in model.parameters())
    assert provider.num_params() == built
    assert provider.num_params(embeddings=False) == built - sum(t.numel() for t in tables)


@pytest.mark.parametrize(("C", "K", "total", "body"), [
    (1, 8, 780_672_000, 570_956_800),
    (2, 4, 780_930_048, 571_214_848),
])  # fmt: skip
def test_paper_sizes(C: int, K: int, total: int, body: int) -> None:
    provider = tiny_provider(**{**PAPER, "coe_iterations": C, "moe_router_topk": K})
    assert provider.num_params() == total
    assert provider.num_params(embeddings=False) == body


@pytest.mark.parametrize(("C", "K", "tflop"), [(1, 8, 39.84), (2, 4, 41.59)])
def test_paper_work(C: int, K: int, tflop: float) -> None:
    """The floors of a step of 64 x 512 tokens, added up by hand part by part."""
    provider = tiny_provider(**{**PAPER, "coe_iterations": C, "moe_router_topk": K})
    assert provider.flops_per_token(512) * 64 * 512 / 1e12 == pytest.approx(tflop, abs=0.01)


@pytest.mark.parametrize("shape", [
    # Values as wide as queries: attention kernels pad narrower ones, which is work, but no model's.
    {"coe_iterations": 1, "moe_router_topk": 4, "v_head_dim": 16},
    {"coe_iterations": 3, "v_head_dim": 16, "q_lora_rank": 12},
    {"multi_latent_attention": False, "num_query_groups": 2, "coe_iterations": 2},
    {"coe_iterations": 2, "v_head_dim": 16, "moe_shared_expert_intermediate_size": None},
    {"coe_iterations": 2, "v_head_dim": 16, "moe_shared_expert_gate": True},
    {"coe_iterations": 2, "v_head_dim": 16, "num_layers": 3, "moe_layer_freq": [0, 1, 1]},
    {"coe_iterations": 2, "v_head_dim": 16, "mtp_num_layers": 2},
    {"coe_iterations": 4, "v_head_dim": 16, "coe_independent_gate": False},
])  # fmt: skip
def test_work_is_what_torch_counts(single_rank, shape: dict) -> None:
    """torch's own counter on a forward and backward pass, in an attention that it can read.

    That attention computes the whole S x S square, where the formula has the causal half.
    """
    clear_aux_losses()  # as long as the model before had layers
    provider = tiny_provider(**shape)
    model = provider.provide().train()
    randomize(model, torch.Generator().manual_seed(3))
    S = provider.seq_length
    ids = torch.randint(provider.vocab_size, (1, S), generator=torch.Generator().manual_seed(4))
    # Weight gradients are products in place, which torch leaves out.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, torch.arange(S)[None], None, labels=ids).mean().backward()
    square = provider.flops_per_token(2 * S) * S
    assert counter.get_total_flops() == square


def test_active_parameters_are_those_a_token_touches(single_rank) -> None:
    """One token: every weight with a gradient is active, and all else is unchosen experts."""
    provider = tiny_provider(
        coe_iterations=2, moe_router_topk=2, num_moe_experts=12, moe_aux_loss_coeff=0.0
    )
    model = provider.provide().train()
    randomize(model, torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 1, dtype=torch.long)
    model(ids, ids, None, labels=ids).sum().backward()
    expert = 3 * provider.hidden_size * provider.moe_ffn_hidden_size
    chosen = 0
    for layer in model.decoder.layers:
        for weight in layer.mlp.experts.parameters():
            touched = (weight.grad.flatten(1) != 0).any(dim=1)
            chosen += int(touched.sum()) * weight[0].numel()
    # Two iterations may choose the same expert, never more than C * K of them.
    bound = provider.num_layers * provider.coe_iterations * provider.moe_router_topk * expert
    assert chosen <= bound
    idle = provider.num_layers * provider.num_moe_experts * expert - bound
    assert provider.num_active_params() == provider.num_params() - idle
