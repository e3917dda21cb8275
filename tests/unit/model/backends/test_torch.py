"""The plain-PyTorch modules against their definitions and against Megatron's own.

Tolerances: fp32 1e-5 and fp64 1e-12, absolute, on values of order one.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module", autouse=True)
def _megatron(single_rank):
    pass


def make_config(**overrides):
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    fields = {**sizes, "attention_dropout": 0.0, **overrides}
    return TransformerConfig(**fields)


def make_attention(config, mask_type="causal", **kwargs):
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_coe.model.backends.torch import SDPACoreAttention

    return SDPACoreAttention(config, 1, AttnMaskType[mask_type], "self", **kwargs)


def make_qkv(heads=4, groups=4, key_width=8, value_width=8, queries=9, keys=None, dtype=None):
    generator = torch.Generator().manual_seed(queries * heads + value_width)

    def draw(length, n, width):
        values = torch.randn(length, 2, n, width, generator=generator, dtype=torch.float64)
        return values.to(dtype or torch.float32).requires_grad_()

    keys = keys or queries
    return (
        draw(queries, heads, key_width),
        draw(keys, groups, key_width),
        draw(keys, groups, value_width),
    )


def attend(query, key, value, scale, hidden=None):
    """Attention by its definition, head by head; `hidden` [S, Sk] is True where nothing is seen."""
    repeat = query.shape[2] // key.shape[2]
    outputs = []
    for head in range(query.shape[2]):
        q, k, v = query[:, :, head], key[:, :, head // repeat], value[:, :, head // repeat]
        scores = torch.einsum("sbd,tbd->bst", q, k) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        outputs.append(torch.einsum("bst,tbe->sbe", scores.softmax(-1), v))
    return torch.cat(outputs, dim=-1)


def future(queries, keys):
    offset = keys - queries
    return torch.tensor([[j > i + offset for j in range(keys)] for i in range(queries)])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"key_width": 12, "value_width": 8},
        {"key_width": 6, "value_width": 10},
        {"groups": 2},
        {"groups": 1, "key_width": 12},
    ],
    ids=["plain", "mla", "wide_value", "gqa", "mqa_mla"],
)
def test_causal_attention_matches_its_definition(shape, dtype, tolerance):
    query, key, value = make_qkv(**shape, dtype=dtype)
    widths = {"k_channels": query.shape[-1], "v_channels": value.shape[-1]}
    attention = make_attention(make_config(), softmax_scale=0.37, **widths)
    output = attention(query, key, value, None)
    expected = attend(query, key, value, 0.37, future(9, 9))
    assert output.shape == (9, 2, 4 * value.shape[-1])
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = torch.autograd.grad(output, (query, key, value), upstream)
    want = torch.autograd.grad(expected, (query, key, value), upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=0)


def test_scale_defaults_to_the_width_of_a_key():
    query, key, value = make_qkv(key_width=12)
    attention = make_attention(make_config(), k_channels=12, v_channels=8)
    expected = attend(query, key, value, 12**-0.5, future(9, 9))
    torch.testing.assert_close(attention(query, key, value, None), expected, atol=1e-5, rtol=0)


def test_equals_megatrons_own_attention():
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = make_config(num_query_groups=2)
    stock = DotProductAttention(config, 1, AttnMaskType.causal, "self").eval()
    query, key, value = make_qkv(groups=2)
    mask = future(9, 9)[None, None]
    ours = make_attention(config).eval()
    for given in (None, mask):
        torch.testing.assert_close(
            ours(query, key, value, given), stock(query, key, value, mask), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("mask_type", ["causal", "padding", "padding_causal", "arbitrary"])
def test_a_mask_hides_keys_on_top_of_the_type(mask_type):
    query, key, value = make_qkv()
    hidden = torch.rand(9, 9, generator=torch.Generator().manual_seed(5)) < 0.3
    hidden[:, 0] = False
    attention = make_attention(make_config(), mask_type)
    output = attention(query, key, value, hidden[None, None])
    if "causal" in mask_type:
        hidden = hidden | future(9, 9)
    expected = attend(query, key, value, 8**-0.5, hidden)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_the_mask_type_of_a_call_overrides_the_modules():
    from megatron.core.transformer.enums import AttnMaskType

    query, key, value = make_qkv()
    attention = make_attention(make_config(), "causal")
    output = attention(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
    expected = attend(query, key, value, 8**-0.5)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_fewer_queries_than_keys_are_the_last_ones():
    query, key, value = make_qkv(queries=3, keys=7)
    output = make_attention(make_config())(query, key, value, None)
    expected = attend(query, key, value, 8**-0.5, future(3, 7))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_dropout_is_drawn_in_training_only_from_the_model_parallel_generator():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    query, key, value = make_qkv(queries=32)
    attention = make_attention(make_config(attention_dropout=0.5))
    plain = attend(query, key, value, 8**-0.5, future(32, 32))
    torch.testing.assert_close(attention.eval()(query, key, value, None), plain, atol=1e-5, rtol=0)

    attention.train()
    tracker = get_cuda_rng_tracker()
    states, default = tracker.get_states(), torch.get_rng_state()
    first = attention(query, key, value, None)
    second = attention(query, key, value, None)
    assert torch.equal(torch.get_rng_state(), default)
    tracker.set_states(states)
    again = attention(query, key, value, None)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.allclose(first, plain, atol=1e-2)
    # Inverted dropout keeps the mean: with all-equal values the expected output is those values.
    ones = torch.ones_like(value)
    mean = torch.stack([attention(query, key, ones, None) for _ in range(50)]).mean()
    assert abs(mean.item() - 1) < 0.05


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"context_parallel_size": 2, "cp_comm_type": "p2p"}, "cp_comm_type='p2p'"),
        ({"window_size": (4, 0)}, r"window_size=\(4, 0\)"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
    ],
)
def test_attention_refuses_by_name_what_it_cannot_do(overrides, field):
    with pytest.raises(ValueError, match=field):
        make_attention(make_config(**overrides))


def test_attention_refuses_packed_sequences_biases_and_missing_masks():
    from megatron.core.packed_seq_params import PackedSeqParams

    query, key, value = make_qkv()
    attention = make_attention(make_config(), "padding")
    with pytest.raises(ValueError, match="packed_seq_params"):
        attention(query, key, value, None, packed_seq_params=PackedSeqParams())
    with pytest.raises(ValueError, match="attention_bias"):
        attention(query, key, value, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="needs an attention_mask"):
        attention(query, key, value, None)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)],
    ids=["fp32", "fp64", "bf16"],
)
def test_norms_match_their_definition(normalization, zero_centered, dtype, tolerance):
    from megatron_coe.model.backends.torch import Norm

    config = make_config(
        normalization=normalization, layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype
    )
    norm = Norm(config, 24, eps=0.01)
    generator = torch.Generator().manual_seed(0)
    assert (norm.weight == float(not zero_centered)).all()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(24, generator=generator).to(dtype))
    x = torch.randn(5, 3, 24, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gain = norm.weight.to(wide) + zero_centered
    y = x.to(wide)
    if normalization == "LayerNorm":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.pow(2).mean(-1, keepdim=True) + 0.01).sqrt() * gain
    if normalization == "LayerNorm":
        y = y + norm.bias
    output = norm(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output.to(wide), y.to(wide), atol=tolerance, rtol=tolerance)


def test_norm_parameters_are_marked_for_sequence_parallelism():
    from megatron_coe.model.backends.torch import Norm

    config = make_config(normalization="LayerNorm")
    assert not any(p.sequence_parallel for p in Norm(config, 8).parameters())
    config.sequence_parallel = True
    assert all(p.sequence_parallel for p in Norm(config, 8).parameters())


def test_an_unknown_norm_is_refused_by_name():
    from megatron_coe.model.backends.torch import Norm

    config = make_config()
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="normalization='L2Norm'"):
        Norm(config, 8)


def test_mla_builds_and_attends_with_these_modules():
    """Megatron's own spec for MLA, its modules swapped for ours, against attention by hand."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_coe.model.backends.torch import TorchSpecProvider

    provider = TorchSpecProvider()
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        normalization="RMSNorm",
        add_bias_linear=False,
        qk_layernorm=True,
        rope_type="rope",
        rotary_percent=1.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(
        multi_latent_attention=True, qk_layernorm=True, normalization="RMSNorm"
    ).submodules.self_attention
    spec.module = provider.mla_self_attention()
    spec.submodules.core_attention = provider.core_attention()
    spec.submodules.kv_layernorm = provider.layer_norm(rms_norm=True, for_qk=True)
    attention = build_module(spec, config=config, layer_number=1)
    hidden = torch.randn(7, 2, 32, generator=torch.Generator().manual_seed(1))
    output, _ = attention(hidden, None)

    q, k, v, *_ = attention.get_query_key_value_tensors(hidden, None, None, None)
    core = attend(q, k, v, 12**-0.5, future(7, 7))
    expected = F.linear(core, attention.linear_proj.weight)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
