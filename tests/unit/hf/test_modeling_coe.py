"""The Hugging Face model against the authors' numbers, transformers' own model and plain torch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV2ForCausalLM,
)
from transformers.cache_utils import Cache, DynamicCache

from megatron_coe.hf import CoeConfig, CoeForCausalLM, CoeForSequenceClassification
from megatron_coe.hf.modeling_coe import (
    CACHE,
    CoeMoE,
    CoePlainAttention,
    CoeRotaryEmbedding,
    causal_mask,
)
from megatron_coe.model.reference import ReferenceCoE, swiglu
from tests.golden import CASES, GOLDEN
from tests.unit.hf.small import (
    KINDS,
    NATIVE_HAS_MSCALE,
    YARN,
    randomize,
    small_config,
    small_model,
    tokens,
)

TOLERANCE = 1e-5
MODES = ("inner", "outer", "addinit", "inner_outer", "none")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the authors' numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, attention):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    ids = expected["input_ids"]
    model = CoeForCausalLM.from_pretrained(GOLDEN / case, attn_implementation=attention).eval()
    with torch.no_grad():
        close(model(ids).logits, expected["logits"])
    loss = model.train()(ids, labels=ids).loss
    close(loss.reshape(1), expected["loss"])
    loss.backward()
    grads = {f"grad.{name}": weight.grad for name, weight in model.named_parameters()}
    assert grads.keys() == {name for name in expected if name.startswith("grad.")}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("C", "total", "body"), [(1, 780672000, 570956800), (2, 780930048, 571214848)]
)
def test_the_defaults_are_the_papers_model(C, total, body):
    with torch.device("meta"):
        model = CoeForCausalLM(CoeConfig(inner_iter=C))
    assert sum(weight.numel() for weight in model.parameters()) == total
    assert sum(weight.numel() for weight in model.model.layers.parameters()) + 1024 == body


# --- the CoE layer --------------------------------------------------------------------------------


def coe_layer(seed: int = 0, **changes: object) -> CoeMoE:
    """A layer in fp64: what differs from an oracle is then not rounding."""
    moe = CoeMoE(small_config(**changes)).train().double()
    randomize(moe, seeded(seed))
    return moe


def activations(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def matrices(mlp: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight


def oracle(moe: CoeMoE) -> ReferenceCoE:
    """The specification over the same weights, in its own layout."""
    config = moe.config
    experts = [matrices(expert) for expert in moe.experts]
    gates = [gate.weight for gate in moe.gate] if config.use_igate else [moe.gate.weight]
    return ReferenceCoE(
        gates=gates if config.use_igate else gates * config.inner_iter,
        gate_up=torch.stack([gate_up for gate_up, _ in experts]),
        down=torch.stack([down for _, down in experts]),
        shared=matrices(moe.shared_experts) if config.n_shared_experts else None,
        topk=config.num_experts_per_tok,
        residual=config.residual_mode,
        scaling=config.routed_scaling_factor,
    )


def compare_with_gradients(moe: CoeMoE, expected_of) -> None:
    """Same output, and same gradients of a random projection of it."""
    x_BSH, weigh = activations(2, 5, 32), activations(2, 5, 32, seed=4)
    grads = []
    for forward in (moe, expected_of):
        x = x_BSH.clone().requires_grad_()
        output = forward(x)
        inputs = [x, *moe.parameters()]
        grad = torch.autograd.grad((output * weigh).sum(), inputs, materialize_grads=True)
        grads.append((output, *grad))
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected, 1e-9)


@pytest.mark.parametrize("changes", [{}, {"use_igate": False, "n_shared_experts": None}])
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_iterations_are_the_specification(mode, C, changes):
    booleans = {"inner_residual": True, "outer_residual": True}
    residual = booleans if mode == "inner_outer" else {"residual": mode}
    moe = coe_layer(inner_iter=C, routed_scaling_factor=1.7, **residual, **changes)
    reference = oracle(moe)
    compare_with_gradients(moe, lambda x: reference.forward(x.transpose(0, 1))[0].transpose(0, 1))


def test_aux_loss_is_the_specification():
    model = small_model(
        inner_iter=3, aux_loss_alpha=0.5, n_routed_experts=9, first_k_dense_replace=1
    )
    ids = tokens(3, 11)
    seen = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    output = model.train()(ids, labels=ids)
    _, losses = oracle(model.model.layers[1].mlp).forward(seen[0].transpose(0, 1))
    close(output.aux_loss, 0.5 * losses.sum())
    entropy = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(output.loss, entropy)
    assert model.eval()(ids, labels=ids).aux_loss is None


def test_aux_loss_over_the_batch_is_that_of_one_long_sequence():
    moe, x = coe_layer(), activations(3, 4, 32)
    (expected,) = moe.gate[0](x.reshape(1, 12, 32))[3]
    moe.config.seq_aux = False
    close(moe.gate[0](x)[3], expected.view(1))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sigmoid with bias"])
def test_aux_losses_count_the_experts_of_the_groups_kept(scoring):
    """The authors' definition by plain loops: 12 experts in 4 groups, 2 kept, top-4."""
    biased, scoring = scoring == "sigmoid with bias", scoring.split()[0]
    gate = coe_layer(
        n_routed_experts=12,
        num_experts_per_tok=4,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        scoring_func=scoring,
        use_expert_bias=biased,
    ).gate[0]
    if biased:
        gate.e_score_correction_bias.data = torch.linspace(3, -3, 12, dtype=torch.float64)
    x = activations(3, 5, 32)
    logits_BSN = x @ gate.weight.T
    scores_BSN = logits_BSN.sigmoid() if scoring == "sigmoid" else logits_BSN.softmax(-1)
    share_BN = (scores_BSN / scores_BSN.sum(dim=-1, keepdim=True)).mean(dim=1)
    count_BN = torch.zeros_like(share_BN)
    for b, s in itertools.product(range(3), range(5)):
        scores = scores_BSN[b, s].tolist()
        kept = sorted(range(4), key=lambda g: max(scores[3 * g : 3 * g + 3]))[-2:]
        allowed = [expert for expert in range(12) if expert // 3 in kept]
        count_BN[b, sorted(allowed, key=scores.__getitem__)[-4:]] += 1
    close(gate(x)[3], (count_BN / (5 * 4 / 12) * share_BN).sum(dim=-1))


def test_aux_loss_of_sigmoid_scores_ignores_the_bias():
    moe, x = coe_layer(scoring_func="sigmoid", use_expert_bias=True), activations(3, 5, 32)
    scores_BSN = torch.sigmoid(x @ moe.gate[0].weight.T)
    chosen = scores_BSN.topk(2, dim=-1).indices
    count_BN = F.one_hot(chosen, 7).sum(dim=(1, 2)) / (5 * 2 / 7)
    share_BN = (scores_BSN / scores_BSN.sum(dim=-1, keepdim=True)).mean(dim=1)
    close(moe.gate[0](x)[3], (count_BN * share_BN).sum(dim=-1))


@pytest.mark.parametrize("frequency", [1, 2])
def test_dense_layers_are_plain_whatever_the_residual_mode(frequency):
    """Only a layer of experts may leave out the stream."""
    first = 1 if frequency == 1 else 0
    model = small_model(
        num_hidden_layers=3, first_k_dense_replace=first, moe_layer_freq=frequency, residual="none"
    )
    streams, updates, outputs = [], [], []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda m, x, y: streams.append(x[0]))
        layer.mlp.register_forward_hook(lambda m, x, y: updates.append(y))
        layer.register_forward_hook(lambda m, x, y: outputs.append(y))
    with torch.no_grad():
        model(tokens(2, 5))
    dense = [0] if frequency == 1 else [1]
    for layer in range(3):
        assert isinstance(model.model.layers[layer].mlp, CoeMoE) == (layer not in dense)
        expected = streams[layer] + updates[layer] if layer in dense else updates[layer]
        assert torch.equal(outputs[layer], expected)


def routed(moe: CoeMoE, x_BSH: Tensor, weights_of) -> Tensor:
    """f_t by loops: `weights_of(x_H)` gives the weight of each chosen expert."""
    result = torch.stack(
        [
            sum(weight * swiglu(x_H, *matrices(moe.experts[i])) for i, weight in weights_of(x_H))
            for x_H in x_BSH.flatten(0, 1)
        ]
    ).view_as(x_BSH)
    return result + swiglu(x_BSH, *matrices(moe.shared_experts))


@pytest.mark.parametrize("K", [1, 3])
def test_sigmoid_chooses_with_bias_and_weighs_without(K):
    moe = coe_layer(
        inner_iter=1,
        num_experts_per_tok=K,
        scoring_func="sigmoid",
        use_expert_bias=True,
        residual="outer",
        routed_scaling_factor=2.5,
    )
    gate = moe.gate[0]
    gate.e_score_correction_bias.requires_grad_(False)
    moe = moe.eval()

    def weights_of(x_H: Tensor) -> list[tuple[int, Tensor]]:
        scores = torch.sigmoid(gate.weight @ x_H)
        biased = (scores + gate.e_score_correction_bias).tolist()
        chosen = sorted(range(7), key=biased.__getitem__)[-K:]
        total = sum(scores[i] for i in chosen) if K > 1 else 1.0
        return [(i, 2.5 * scores[i] / total) for i in chosen]

    x = activations(2, 6, 32)
    close(moe(x), routed(moe, x, weights_of))
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0, 0, 0, 9, 9, 9]))
    assert set(gate(x)[2].flatten().tolist()) <= {4, 5, 6}


@pytest.mark.parametrize(("scaling", "normalized"), [(1.0, True), (3.0, False), (3.0, True)])
def test_groups_go_by_their_best_expert(scaling, normalized):
    """8 groups, 3 kept, top-6, as DeepSeek-V2 has it; normalized weights are not scaled."""
    moe = coe_layer(
        inner_iter=1,
        n_routed_experts=16,
        num_experts_per_tok=6,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        residual="none",
        routed_scaling_factor=scaling,
        norm_topk_prob=normalized,
    )

    def weights_of(x_H: Tensor) -> list[tuple[int, Tensor]]:
        scores = torch.softmax(moe.gate[0].weight @ x_H, dim=0)
        groups = sorted(range(8), key=lambda g: max(scores[2 * g : 2 * g + 2].tolist()))[-3:]
        chosen = [2 * g + i for g in groups for i in (0, 1)]
        total = sum(scores[i] for i in chosen)
        return [(i, scores[i] / total if normalized else scaling * scores[i]) for i in chosen]

    compare_with_gradients(moe, lambda x: routed(moe, x, weights_of))


def test_upcycled_layer():
    moe = coe_layer(inner_iter=3, coe_upcycled=True, residual="outer")
    reference = oracle(moe)

    def forward(x_BSH: Tensor) -> Tensor:
        x = x_BSH.transpose(0, 1)
        for t, gate in enumerate(reference.gates):
            update = reference.experts(x, reference.scores(x, gate))
            x = x + moe.coe_weights[str(t)] * update if t else update
        return x.transpose(0, 1)

    compare_with_gradients(moe, forward)


def test_fresh_upcycling_gates_change_nothing():
    torch.manual_seed(0)
    upcycled = CoeForCausalLM(small_config(residual="outer", coe_upcycled=True)).eval()
    names = [name for name in upcycled.state_dict() if "coe_weights" in name]
    assert names == [f"model.layers.{layer}.mlp.coe_weights.1" for layer in (0, 1)]
    plain = CoeForCausalLM(small_config(residual="outer", inner_iter=1)).eval()
    missing, extra = plain.load_state_dict(upcycled.state_dict(), strict=False)
    assert not missing and all("coe_weights" in name or "gate.1" in name for name in extra)
    ids = tokens(2, 9)
    assert torch.equal(upcycled(ids).logits, plain(ids).logits)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_plain_attention(norm):
    config = small_config(**{**KINDS["plain attention"], "use_qk_norm": norm})
    config._attn_implementation = "eager"
    module = CoePlainAttention(config, layer_idx=0).eval()
    randomize(module, seeded())
    x_BSH = torch.randn(2, 6, 32, generator=seeded(1))
    positions = torch.arange(6).expand(2, 6)
    mask = torch.full((6, 6), -torch.inf).triu(1).expand(2, 1, 6, 6)
    output, _ = module(x_BSH, CoeRotaryEmbedding(config)(x_BSH, positions), mask)

    D, turns = 12, torch.arange(6)[:, None] / 10000 ** (torch.arange(6) / 6)
    unit = torch.polar(torch.ones(6, 6), turns)

    def heads(name: str) -> Tensor:
        linear = getattr(module, f"{name}_proj")
        return F.linear(x_BSH, linear.weight, linear.bias).unflatten(-1, (-1, D)).transpose(1, 2)

    def turned(name: str) -> Tensor:
        x = heads(name)
        if norm:
            weight = getattr(module, f"{name}_norm").weight
            x = weight * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        pair = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * unit
        return torch.cat([pair.real, pair.imag], dim=-1)

    q, k, v = turned("q"), turned("k"), heads("v")
    results = []
    for head in range(4):
        group = head // 2
        scores = q[:, head] @ k[:, group].transpose(1, 2) / D**0.5
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        results.append(scores.softmax(-1) @ v[:, group])
    close(output, F.linear(torch.cat(results, dim=-1), module.o_proj.weight))


NATIVE = {
    "as the paper's MoE": {},
    "q-LoRA, dense layer, plain rope": {
        "q_lora_rank": 12,
        "first_k_dense_replace": 1,
        "rope_scaling": None,
        "attention_bias": True,
    },
    "yarn by its attention factor": {
        "rope_scaling": {**YARN, "mscale_all_dim": 0, "attention_factor": 1.3}
    },
    "yarn by its attention factor, not truncated": {
        "qk_rope_head_dim": 16,
        "rope_scaling": {
            **YARN,
            "factor": 4,
            "mscale_all_dim": 0,
            "attention_factor": 0.9,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "groups": {
        "n_routed_experts": 16,
        "num_experts_per_tok": 6,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 2.0,
        "n_shared_experts": 2,
    },
}


@pytest.mark.parametrize("kind", NATIVE)
def test_one_iteration_outside_is_transformers_deepseek_v2(kind, tmp_path):
    if not NATIVE_HAS_MSCALE and "plain rope" not in kind and "by its" not in kind:
        pytest.skip("this transformers' deepseek_v2 leaves mscale out of attention")
    model = small_model(inner_iter=1, residual="outer", use_igate=False, **NATIVE[kind])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]
    path.write_text(json.dumps(config | {"model_type": "deepseek_v2"}))
    native = DeepseekV2ForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(3, 15)
    with torch.no_grad():
        close(model(ids).logits, native(ids).logits)


# --- who sees whom --------------------------------------------------------------------------------


def with_attention(kind: str, name: str = "plain attention") -> CoeForCausalLM:
    model = small_model(**KINDS[name])
    model.set_attn_implementation(kind)
    return model


@torch.no_grad()
def logits_of(model: CoeForCausalLM, *arguments: Tensor, **keywords: object) -> Tensor:
    return model(*arguments, **keywords).logits


@pytest.mark.parametrize("name", ["plain", "plain attention"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(kind, name):
    model, parts = with_attention(kind, name), [tokens(2, S, seed=S) for S in (5, 1, 7)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    expected = torch.cat([logits_of(model, part) for part in parts], dim=1)
    packed = torch.cat(parts, dim=1)
    close(logits_of(model, packed, position_ids=positions), expected, 5e-5)
    close(logits_of(model, packed, position_ids=positions.expand(2, -1)), expected, 5e-5)
    assert not torch.allclose(logits_of(model, packed)[:, 5:], expected[:, 5:], atol=1e-2)


def test_attention_by_the_callers_own_mask():
    """[B, 1, S, keys]: booleans or what is added to the scores; here, padding on the left."""
    ids, padding = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    padding[1, :3] = 0
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 2, 3]])
    seen = torch.ones(7, 7).tril().bool() & padding.bool()[:, None, None, :]
    seen = seen | torch.eye(7).bool()
    added = torch.zeros(seen.shape).masked_fill(~seen, -1e9)
    for kind in ("sdpa", "eager"):
        model = with_attention(kind)
        expected = logits_of(model, ids, attention_mask=padding)
        for mask in (seen, added):
            actual = logits_of(model, ids, attention_mask=mask, position_ids=positions)
            close(actual[padding.bool()], expected[padding.bool()])


def loops(module, query, key, value, attention_mask, scaling, chosen=None, **keywords):
    """Attention by its definition, of a 2D mask of padding as flash attention takes it."""
    assert attention_mask is None or attention_mask.shape == (query.shape[0], key.shape[2])
    if chosen is not None:
        chosen.append(attention_mask)
    output = torch.zeros(*query.shape[:3], value.shape[-1])
    past = key.shape[2] - query.shape[2]
    for b, head, i in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])):
        keys = torch.arange(past + i + 1)
        if attention_mask is not None and attention_mask[b, past + i]:
            keys = keys[attention_mask[b, keys]]
        group = head // module.num_key_value_groups
        scores = key[b, group, keys] @ query[b, head, i] * scaling
        output[b, head, i] = scores.softmax(0) @ value[b, group, keys]
    return output.transpose(1, 2), None


def test_an_implementation_of_attention_of_ones_own():
    """It gets the mask of flash attention, or none where nothing is padded, and its keywords."""
    AttentionInterface.register("loops", loops)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    model, chosen = with_attention("sdpa"), []
    for padding in (0, 2):
        mask[0, :padding] = 0
        model.set_attn_implementation("sdpa")
        expected = logits_of(model, ids, attention_mask=mask)[mask.bool()]
        model.set_attn_implementation("loops")
        actual = logits_of(model, ids, attention_mask=mask, chosen=chosen)
        close(actual[mask.bool()], expected)
    assert [given is None for given in chosen] == [True] * 2 + [False] * 2
    with pytest.raises(TypeError, match="store"):
        model(ids, store=DynamicCache())


@pytest.mark.parametrize("past", [0, 3])
def test_flex_attention_is_told_the_same(past):
    mask = torch.ones(2, past + 4, dtype=torch.long)
    mask[1, :2] = 0
    hidden_states = torch.zeros(2, 4, 8)
    expected = causal_mask("sdpa", hidden_states, past, mask, None)
    block = causal_mask("flex_attention", hidden_states, past, mask, None)
    grid = torch.meshgrid(*(torch.arange(n) for n in (2, 1, 4, past + 4)), indexing="ij")
    assert torch.equal(block.mask_mod(*grid), expected)
    everything = causal_mask("flex_attention", hidden_states, past, None, None)
    assert torch.equal(everything.mask_mod(*grid), (grid[3] <= grid[2] + past)), (
        "without padding it needs the causal order too"
    )


def test_a_mask_of_another_length_is_refused():
    model, ids = small_model(), tokens(2, 4)
    cache = model(ids, use_cache=True).get(CACHE)
    with pytest.raises(ValueError, match="attention_mask has 4 columns: give 8, one for each of 4"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


# --- caches and keywords --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("whole", [True, False], ids=["CoeForCausalLM", "CoeModel"])
def test_a_cache_is_taken_under_both_names(name, whole):
    model, ids = small_model(), tokens(2, 9)
    model, field = (model, "logits") if whole else (model.model, "last_hidden_state")
    with torch.no_grad():
        expected = model(ids, use_cache=False)[field]
        cache = DynamicCache()
        parts = [model(part, **{name: cache})[field] for part in ids.split([4, 1, 3, 1], dim=1)]
    close(torch.cat(parts, dim=1), expected, 5e-5)
    assert cache.get_seq_length() == 9


def test_what_is_given_in_vain_is_named():
    model, ids = small_model(), tokens(1, 4)
    for part in (model, model.model):
        with pytest.raises(TypeError, match="unknown keywords: labelz, past_key_value"):
            part(ids, labelz=ids, past_key_value=DynamicCache())
        with pytest.raises(TypeError, match="give one of them"):
            part(ids, past_key_values=DynamicCache(), cache=DynamicCache())
        with pytest.raises(TypeError, match="of the type tuple: give a Cache"):
            part(ids, past_key_values=((ids, ids),))
        part(ids, nothing=None)


def test_nobody_gathers_caches():
    """Neither transformers' Trainer, of the outputs, nor accelerate, of the inputs of a layer."""
    model = small_model()
    output = model(tokens(1, 3), use_cache=True)
    caches = {name for name, value in output.items() if isinstance(value, Cache)}
    assert len(caches) == 1
    ignored = model.config.keys_to_ignore_at_inference + ["loss"]  # noqa: RUF005 - as Trainer does
    assert caches <= set(ignored)
    assert {"cache", *caches} <= set(model._skip_keys_device_placement)


def test_recomputed_layers_write_no_cache():
    model, ids = small_model().train(), tokens(1, 4)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing: each key would be written again"):
        model(ids, labels=ids, past_key_values=DynamicCache())
    with torch.no_grad():
        assert model(ids, past_key_values=DynamicCache())[CACHE].get_seq_length() == 4


# --- use ------------------------------------------------------------------------------------------


GENERATED = dict.fromkeys(KINDS, (3, 12)) | {"plain": (20, 64)}
"""How many prompts of each model are continued by how many tokens; the long ones take seconds."""


@pytest.mark.parametrize("kind", GENERATED)
def test_generation_is_the_same_with_cache_without_it_and_padded(kind):
    count, length = GENERATED[kind]
    model = small_model(**KINDS[kind])
    prompts = [tokens(1, 3 + 7 * number % 23, seed=100 + number) for number in range(count)]
    settings = {
        "max_new_tokens": length,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    alone = [model.generate(prompt, use_cache=False, **settings)[0] for prompt in prompts]
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([F.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts])
    ones = [torch.ones_like(prompt) for prompt in prompts]
    mask = torch.cat([F.pad(row, (width - row.shape[1], 0)) for row in ones])
    together = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    for prompt, padded, expected in zip(prompts, together, alone, strict=True):
        assert len(expected) == prompt.shape[1] + length
        assert padded[-len(expected) :].tolist() == expected.tolist()
    assert len({tuple(row[-length:].tolist()) for row in alone}) == count  # prompts do matter


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind):
    model, ids = small_model(**KINDS[kind]), tokens(2, 7)
    positions = []  # rotary attention alone would not notice if they were shifted
    model.model.rotary_emb.register_forward_hook(lambda m, x, y: positions.append(x[1]))
    padded, mask = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    with torch.no_grad():
        close(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits, 5e-5)
    assert all(torch.equal(row, torch.arange(7)) for seen in positions for row in seen[:, -7:])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sigmoid with bias", "upcycled, tied"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing(kind, reentrant):
    model = small_model(aux_loss_alpha=0.5, **KINDS[kind]).train()
    ids = tokens(2, 7)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    for name, grad in gradients().items():
        close(grad, expected[name], 1e-6)


def test_router_logits_of_every_layer_and_iteration():
    model = small_model(num_hidden_layers=3, inner_iter=3, first_k_dense_replace=1)
    inputs = {}
    for index in (1, 2):
        norm = model.model.layers[index].post_attention_layernorm
        norm.register_forward_hook(lambda *a, index=index: inputs.update({index: a[-1]}))
    ids = tokens(2, 6)
    with torch.no_grad():
        output = model(ids, output_router_logits=True)
        assert len(output.router_logits) == 2 * 3
        logits = iter(output.router_logits)
        for index in (1, 2):
            reference = oracle(model.model.layers[index].mlp)
            x = inputs[index].transpose(0, 1)
            for gate in reference.gates:
                close(next(logits), F.linear(x.transpose(0, 1).flatten(0, 1), gate), 5e-5)
                x = x + reference.experts(x, reference.scores(x, gate))
        assert model(ids).router_logits is None


def test_logits_to_keep():
    model, ids = small_model(), tokens(2, 6)
    with torch.no_grad():
        whole = model(ids).logits
        close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
        close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    model, ids = small_model(**KINDS[kind]), tokens(2, 6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is CoeForCausalLM
    weights, copies = model.state_dict(), again.state_dict()
    assert weights.keys() == copies.keys()
    assert all(torch.equal(weight, copies[name]) for name, weight in weights.items())
    with torch.no_grad():  # weights in a file may lie where kernels sum in another order
        close(again(ids).logits, model(ids).logits)
    narrow = CoeForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    wide = {name for name, weight in narrow.named_parameters() if weight.dtype == torch.float32}
    assert wide == {name for name in weights if "e_score_correction_bias" in name}
    assert narrow(ids).logits.dtype == torch.bfloat16


ALONE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(model.lm_head(base(ids).last_hidden_state), logits)
assert not any(m.split(".")[0] == "megatron_coe" for m in sys.modules)
torch.save(logits, folder + "/logits.pt")
sys.path.insert(0, sys.argv[2])
from megatron_coe.hf import CoeConfig
assert not any(m.split(".")[0] == "megatron" for m in sys.modules)
assert AutoConfig.for_model("coe_deepseekv2").inner_iter == 2
"""


def test_a_classifier_reads_the_last_token_whatever_the_padding(tmp_path):
    """An exported language model as transformers' sequence classifier: logits by hand, a step."""
    small_model(pad_token_id=0).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert type(model) is CoeForSequenceClassification
    ids = tokens(2, 6).clamp(min=1)
    ids[0, 4:] = 0
    right = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    left = {name: torch.stack([value[0].roll(2), value[1]]) for name, value in right.items()}
    with torch.no_grad():
        for inputs in (right, left):
            logits = model(**inputs).logits
            for row, length in enumerate((4, 6)):
                alone = model.model(ids[row : row + 1, :length]).last_hidden_state[:, -1]
                close(logits[row : row + 1], model.score(alone))
    model.train()
    loss = model(**right, labels=torch.tensor([0, 2])).loss
    close(loss, F.cross_entropy(model(**right).logits, torch.tensor([0, 2])))
    loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())


def test_saved_folder_is_enough_and_nothing_imports_megatron(tmp_path):
    """As remote code where this package is not loaded; then the package, without Megatron."""
    model = small_model()
    model.save_pretrained(tmp_path)
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    root = os.path.dirname(
        os.path.dirname(os.path.dirname(sys.modules[CoeMoE.__module__].__file__))
    )
    subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), root],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    with torch.no_grad():
        assert torch.equal(
            torch.load(tmp_path / "logits.pt"), model(torch.arange(1, 9)[None]).logits
        )
