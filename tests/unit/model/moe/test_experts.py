"""`GroupedExperts` against plain torch and Megatron's `SequentialMLP`, and through checkpoints.

Tolerances: fp32 1e-5 and fp64 1e-9 against the oracle, relative to the largest entry; bitwise
against Megatron.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_coe.megatron_compat.versions import experts_part, part_class, part_submodules

HIDDEN, FFN, EXPERTS = 24, 20, 4
COUNTS = {
    "uneven": [3, 8, 1, 5],
    "empty": [0, 9, 0, 4],
    "one_takes_all": [0, 0, 11, 0],
    "no_tokens": [0, 0, 0, 0],
}


@pytest.fixture(scope="module", autouse=True)
def _megatron(single_rank):
    pass


def make_config(**overrides):
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": FFN,
        "ffn_hidden_size": FFN,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "moe_grouped_gemm": True,
        "moe_router_pre_softmax": True,
        **overrides,
    }
    return TransformerConfig(**fields)


def make_experts(config, experts=EXPERTS):
    from megatron_coe.model.moe.experts import GroupedExperts

    return GroupedExperts(experts, config)


def make_inputs(counts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(counts)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    probs = torch.rand(tokens, generator=generator, dtype=torch.float64).to(dtype)
    upstream = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), probs.requires_grad_(), upstream


def oracle(w1, w2, x, counts, probs, activation, gated):
    """The definition, expert by expert and row by row group."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        rows = slice(start, start := start + count)
        h = x[rows] @ w1[expert].T
        h = activation(h[:, :FFN]) * h[:, FFN:] if gated else activation(h)
        parts.append((h @ w2[expert].T) * probs[rows, None])
    return torch.cat(parts)


def close(actual, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
    return bool(((actual - expected).abs() <= tolerance * scale).all())


def squared_relu(x):
    return F.relu(x) ** 2


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("activation", "gated"),
    [(F.silu, True), (F.gelu, True), (F.gelu, False), (squared_relu, False), (quick_gelu, True)],
    ids=["swiglu", "geglu", "gelu", "squared_relu", "quick_geglu"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"]
)
def test_output_and_gradients_match_the_definition(counts, activation, gated, dtype, tolerance):
    config = make_config(activation_func=activation, gated_linear_unit=gated, params_dtype=dtype)
    experts = make_experts(config)
    w1, w2 = experts.linear_fc1.weight, experts.linear_fc2.weight
    x, probs, upstream = make_inputs(counts, dtype)

    output, bias = experts(x, torch.tensor(counts), probs)
    grads = torch.autograd.grad(output, (x, probs, w1, w2), upstream)

    expected = oracle(w1, w2, x, counts, probs, activation, gated)
    expected_grads = torch.autograd.grad(expected, (x, probs, w1, w2), upstream)
    assert bias is None and output.dtype == dtype
    assert close(output, expected, tolerance)
    for name, got, want in zip(("x", "probs", "w1", "w2"), grads, expected_grads, strict=True):
        assert close(got, want, tolerance), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("counts", [COUNTS["uneven"], COUNTS["empty"]], ids=["uneven", "empty"])
def test_equals_megatrons_sequential_experts_bit_for_bit(counts, fused):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_coe.model.backends.torch import TorchSpecProvider

    config = make_config(bias_activation_fusion=fused)
    experts = make_experts(config)
    part = experts_part(TorchSpecProvider().grouped_mlp_modules(False))
    assert part_class(part) is SequentialMLP
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stock = SequentialMLP(EXPERTS, config, part_submodules(part), pg_collection=groups)
    with torch.no_grad():
        for e, expert in enumerate(stock.local_experts):
            expert.linear_fc1.weight.copy_(experts.linear_fc1.weight[e])
            expert.linear_fc2.weight.copy_(experts.linear_fc2.weight[e])
    x, probs, upstream = make_inputs(counts)

    results = []
    for module in (experts, stock):
        output, _ = module(x, torch.tensor(counts), probs)
        results.append((output, *torch.autograd.grad(output, (x, probs), upstream)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("granularity", ["selective", None])
def test_probabilities_can_be_applied_on_the_input(granularity):
    recompute = {"recompute_granularity": granularity} if granularity else {}
    modules = {"recompute_modules": ["moe_act"]} if granularity else {}
    config = make_config(moe_apply_probs_on_input=True, moe_router_topk=1, **recompute, **modules)
    experts = make_experts(config)
    x, probs, upstream = make_inputs(COUNTS["uneven"])
    inputs = (x, probs)
    output, _ = experts(x, torch.tensor(COUNTS["uneven"]), probs)
    output.backward(upstream)
    w1, w2 = experts.linear_fc1.weight, experts.linear_fc2.weight
    expected = oracle(
        w1, w2, x * probs[:, None], COUNTS["uneven"], torch.ones_like(probs), F.silu, True
    )
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    assert close(output, expected, 1e-5)
    for got, want in zip(inputs, expected_grads, strict=True):
        assert close(got.grad, want, 1e-5)


def test_recomputing_the_activation_is_accepted_and_changes_nothing():
    """It is always recomputed, see test_expert_mlp.py."""
    plain = make_experts(make_config())
    config = make_config(recompute_granularity="selective", recompute_modules=["moe_act"])
    recomputing = make_experts(config)
    recomputing.load_state_dict(plain.state_dict())
    results = []
    for experts in (plain, recomputing):
        x, probs, upstream = make_inputs(COUNTS["uneven"])
        output, _ = experts(x, torch.tensor(COUNTS["uneven"]), probs)
        output.backward(upstream)
        grads = [p.grad for p in experts.parameters()]
        results.append([output, x.grad, probs.grad, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_clamped_and_shifted_gates_follow_the_config():
    config = make_config(activation_func_clamp_value=0.01, glu_linear_offset=1.0)
    experts = make_experts(config)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_()
    counts = COUNTS["uneven"]
    x, probs, _ = make_inputs(counts)
    output, _ = experts(x, torch.tensor(counts), probs)
    w1, w2 = experts.linear_fc1.weight.detach().clone(), experts.linear_fc2.weight
    parts = []
    for e, (rows, p) in enumerate(zip(x.split(counts), probs.split(counts), strict=True)):
        gate, up = (rows @ w1[e].T).split(FFN, dim=-1)
        h = F.silu(gate.clamp(max=0.01)) * (up.clamp(-0.01, 0.01) + 1)
        parts.append((h @ w2[e].T) * p[:, None])
    assert close(output, torch.cat(parts), 1e-5)


def test_gradients_go_straight_into_megatrons_buffer():
    """`main_grad` gets the sum over two passes and two micro-batches, and autograd sees one
    gradient per micro-batch and parameter."""
    experts = make_experts(make_config())
    counts = torch.tensor(COUNTS["empty"])
    w1 = experts.linear_fc1.weight
    seen = []
    accumulate = w1.expand_as(w1).grad_fn.next_functions[0][0]
    accumulate.register_hook(lambda *_: seen.append(w1.grad is not None))

    def iterate():
        x, probs, upstream = make_inputs(COUNTS["empty"])
        with experts.shared_weights():
            once, _ = experts(x, counts, probs)
            twice, _ = experts(once, counts, probs)
        twice.backward(upstream)

    iterate()
    expected = [2 * p.grad for p in experts.parameters()]
    for p in experts.parameters():
        p.grad, p.main_grad, p.grad_added_to_main_grad = None, torch.zeros_like(p), False
    for _ in range(2):
        iterate()
    assert seen == [True] * 3
    for p, want in zip(experts.parameters(), expected, strict=True):
        assert p.grad_added_to_main_grad
        assert close(p.main_grad, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit_experts_keep_their_dtype_with_fp32_probabilities(dtype):
    experts = make_experts(make_config(params_dtype=dtype))
    counts = COUNTS["uneven"]
    x, probs, upstream = make_inputs(counts)
    output, _ = experts(x.to(dtype), torch.tensor(counts), probs)
    output.backward(upstream.to(dtype))
    w1, w2 = experts.linear_fc1.weight, experts.linear_fc2.weight
    expected = oracle(w1.float(), w2.float(), x.to(dtype).float(), counts, probs, F.silu, True)
    assert output.dtype == w1.grad.dtype == dtype and probs.grad.dtype == torch.float32
    assert close(output.float(), expected, 3e-2)


def test_parameters_are_marked_for_the_expert_gradient_group():
    experts = make_experts(make_config())
    for weight, axis in ((experts.linear_fc1.weight, 1), (experts.linear_fc2.weight, 2)):
        assert weight.allreduce is False
        assert weight.tensor_model_parallel and weight.partition_dim == axis
    assert experts.linear_fc1.weight.shape == (EXPERTS, 2 * FFN, HIDDEN)
    assert experts.linear_fc2.weight.shape == (EXPERTS, HIDDEN, FFN)


@pytest.mark.parametrize("cpu", [False, True], ids=["tracker", "use_cpu_initialization"])
def test_initialization_follows_the_config(cpu):
    def init(std):
        return lambda t: torch.nn.init.normal_(t, std=std)

    config = make_config(
        init_method=init(0.5), output_layer_init_method=init(0.1), use_cpu_initialization=cpu
    )
    experts = make_experts(config, experts=64)
    for linear, std in ((experts.linear_fc1, 0.5), (experts.linear_fc2, 0.1)):
        assert abs(linear.weight.std().item() / std - 1) < 0.02
        assert not torch.equal(linear.weight[0], linear.weight[1])


def test_default_generator_is_left_alone():
    state = torch.get_rng_state()
    make_experts(make_config())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"moe_apply_probs_on_input": True, "moe_router_topk": 2}, "moe_router_topk=2"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(overrides, field):
    with pytest.raises(ValueError, match=field):
        make_experts(make_config(**overrides))


@pytest.mark.parametrize("one_key_per_expert", [False, True])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("direction", ["ours_to_ours", "ours_to_stock", "stock_to_ours"])
def test_checkpoints_move_between_ours_and_megatrons_experts(
    tmp_path, direction, gated, one_key_per_expert
):
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_coe.model.backends.torch import TorchSpecProvider

    config = make_config(gated_linear_unit=gated)
    submodules = part_submodules(experts_part(TorchSpecProvider().grouped_mlp_modules(False)))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    metadata = {
        "singleton_local_shards": one_key_per_expert,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }

    def build(kind):
        if kind == "ours":
            return make_experts(config)
        return SequentialMLP(EXPERTS, config, submodules, pg_collection=groups)

    def stacked(module):
        if isinstance(module, SequentialMLP):
            fcs = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in module.local_experts]
            return [torch.stack(ws) for ws in zip(*fcs, strict=True)]
        return list(module.parameters())

    def sharded(module):
        return module.sharded_state_dict("mlp.experts.", ((0, 0, 1),), metadata)

    source, target = (build(kind) for kind in direction.split("_to_"))
    dist_checkpointing.save(sharded(source), str(tmp_path), validate_access_integrity=False)
    loaded = dist_checkpointing.load(
        sharded(target), str(tmp_path), validate_access_integrity=False
    )
    prefix = "mlp.experts."
    target.load_state_dict({k.removeprefix(prefix): v for k, v in loaded.items()})
    for ours, theirs in zip(stacked(target), stacked(source), strict=True):
        assert torch.equal(ours, theirs)
