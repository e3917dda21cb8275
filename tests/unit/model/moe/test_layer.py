"""`CoELayer` against the layer in plain torch: output, input gradient, every weight's gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_coe.model.field_rules import RESIDUAL_MODES
from megatron_coe.model.moe.layer import CoELayer
from tests.builders import (
    BALANCE_COEFF,
    build_layer,
    clear_of_ties,
    decoder_layer,
    randomize,
    reference_of,
    tiny_config,
    weigh_balance_losses,
)

S, B = 6, 3
DISPATCHERS = {
    "local": {},
    "alltoall": {"moe_token_dispatcher_type": "megatron_alltoall"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}
SETTINGS = list(
    itertools.product((1, 2, 3, 4), RESIDUAL_MODES, (True, False), (16, None), DISPATCHERS)
)
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
PRECISIONS = {torch.float32: (None, 1e-5), torch.float64: ("fp64", 1e-9)}


def random_input(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S, B, 32, generator=generator, dtype=torch.float64).to(dtype)


def compare(layer, seed: int, tolerance: float) -> None:
    """Forward and backward of the layer and its oracle on a fresh random input."""
    dtype = layer.config.params_dtype
    reference, pairs = reference_of(layer)
    # Inputs for which rounding could swap two experts are passed over.
    inputs = (random_input(seed + 10_000 * attempt, dtype) for attempt in range(50))
    x = next(x for x in inputs if clear_of_ties(reference, x, gap=tolerance / 10)).requires_grad_()
    y_grad = random_input(seed + 1, dtype)
    x_ref = x.detach().clone().requires_grad_()

    expected, losses = reference.forward(x_ref)
    objective = (expected * y_grad).sum() + layer.config.moe_aux_loss_coeff * losses.sum()
    objective.backward()

    weigh_balance_losses(1.0)
    y, bias = layer(x)
    (y * y_grad).sum().backward()

    assert bias is None
    assert {name for name, _, _ in pairs} == {name for name, _ in layer.named_parameters()}
    results = {"output": (y, expected), "input gradient": (x.grad, x_ref.grad)}
    results |= {f"gradient of {name}": (grad(), leaf.grad) for name, grad, leaf in pairs}
    for name, (ours, oracle) in results.items():
        error = (ours - oracle).abs().max() / max(1.0, oracle.abs().max().item())
        assert error < tolerance, f"{name}: error {error:.1e} relative to the largest entry"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "fp64"])
@pytest.mark.parametrize(("C", "residual", "independent", "shared", "dispatcher"), SETTINGS)
def test_layer_is_the_reference(
    single_rank, C, residual, independent, shared, dispatcher, dtype
) -> None:
    router_dtype, tolerance = PRECISIONS[dtype]
    config = tiny_config(
        coe_iterations=C,
        coe_residual=residual,
        coe_independent_gate=independent,
        moe_shared_expert_intermediate_size=shared,
        **DISPATCHERS[dispatcher],
        moe_router_dtype=router_dtype or "fp32",
        params_dtype=dtype,
        moe_aux_loss_coeff=BALANCE_COEFF,
    )
    seed = SETTINGS.index((C, residual, independent, shared, dispatcher))
    layer = build_layer(config)
    randomize(layer, torch.Generator().manual_seed(seed), std=0.15)
    compare(layer, 1000 + 2 * seed, tolerance)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("changes", [{}, {"coe_independent_gate": False}, RECOMPUTED])
@pytest.mark.parametrize("C", [1, 2, 3])
def test_an_upcycled_layer_is_the_reference(single_rank, C, changes, dtype) -> None:
    router_dtype, tolerance = PRECISIONS[dtype]
    config = tiny_config(
        coe_iterations=C,
        coe_residual="outer",
        coe_upcycled=True,
        moe_router_dtype=router_dtype or "fp32",
        params_dtype=dtype,
        moe_aux_loss_coeff=BALANCE_COEFF,
        **changes,
    )
    layer = build_layer(config)
    randomize(layer, torch.Generator().manual_seed(C), std=0.15)
    compare(layer, 3000 + C, tolerance)


def test_zero_scales_leave_the_moe_as_it_was(single_rank) -> None:
    moe = build_layer(tiny_config(coe_iterations=1, coe_residual="outer"))
    upcycled = build_layer(tiny_config(coe_iterations=3, coe_residual="outer", coe_upcycled=True))
    randomize(moe, torch.Generator().manual_seed(8), std=0.15)
    new = upcycled.load_state_dict(moe.state_dict(), strict=False)
    assert not new.unexpected_keys
    x = random_input(90, torch.float32)
    assert torch.equal(upcycled(x)[0], moe(x)[0])
    upcycled(x)[0].backward(random_input(91, torch.float32))
    for gate in upcycled.coe_weights.values():
        assert gate.shape == (32,)
        assert gate.grad.abs().min() > 0, "or it would stay closed"


FEATURES = {
    "whole layer recomputed": RECOMPUTED,
    "expert activation recomputed": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act"],
    },
    "shared expert recomputed": {
        "recompute_granularity": "selective",
        "recompute_modules": ["shared_experts"],
    },
    "shared expert overlapped with dispatch": {"moe_shared_expert_overlap": True},
    "scores scaled": {"moe_router_topk_scaling_factor": 2.5},
    "one expert of many": {"moe_router_topk": 1},
    "all experts": {"moe_router_topk": 7},
}


@pytest.mark.parametrize("residual", ["inner", "outer", "addinit"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_do_not_change_the_numbers(single_rank, feature: str, residual: str) -> None:
    config = tiny_config(
        coe_iterations=3,
        coe_residual=residual,
        moe_aux_loss_coeff=BALANCE_COEFF,
        **FEATURES[feature],
    )
    layer = build_layer(config).train()
    randomize(layer, torch.Generator().manual_seed(5), std=0.15)
    compare(layer, 50, 1e-5)


def test_a_layer_can_be_used_again_before_its_backward(single_rank) -> None:
    """Pipelining holds several micro-batches in flight: the dispatcher must not mix them up."""
    layer = build_layer(tiny_config(coe_iterations=2, moe_aux_loss_coeff=0.0))
    randomize(layer, torch.Generator().manual_seed(6), std=0.15)
    inputs = [random_input(seed, torch.float32).requires_grad_() for seed in (60, 61)]
    y_grads = [random_input(seed, torch.float32) for seed in (62, 63)]
    outputs = [layer(x)[0] for x in inputs]  # both forward passes, then both backward passes
    for y, y_grad in zip(outputs, y_grads, strict=True):
        y.backward(y_grad)
    reference, _ = reference_of(layer)
    for x, y, y_grad in zip(inputs, outputs, y_grads, strict=True):
        x_ref = x.detach().clone().requires_grad_()
        expected, _ = reference.forward(x_ref)
        expected.backward(y_grad)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-5, atol=1e-5)


def test_evaluation_gives_the_same_output_without_losses(single_rank) -> None:
    layer = build_layer(tiny_config(coe_iterations=2))
    randomize(layer, torch.Generator().manual_seed(7), std=0.15)
    x = random_input(70, torch.float32)
    trained = layer.train()(x)[0].detach()
    before = x.clone()
    with torch.no_grad():
        evaluated = layer.eval()(x)[0]
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=0)
    assert torch.equal(x, before), "the layer must not write into its input"


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("balance", ["seq_aux_loss", "aux_loss", "global_aux_loss", "none"])
def test_one_outer_iteration_is_megatrons_moe_bit_for_bit(
    single_rank, balance: str, dispatcher: str
) -> None:
    """In a whole TransformerLayer, with the same experts and dispatcher; z-loss included.

    The local dispatcher is our own: it adds up in another order, and agrees to rounding.
    """
    config = tiny_config(
        coe_iterations=1,
        coe_residual="outer",
        **DISPATCHERS[dispatcher],
        moe_router_load_balancing_type=balance,
        moe_aux_loss_coeff=BALANCE_COEFF if balance != "none" else 0.0,
        moe_z_loss_coeff=1e-3,
    )
    ours = decoder_layer(config, CoELayer)
    with config.known_dispatcher():
        theirs = decoder_layer(config, MoELayer)
    randomize(ours, torch.Generator().manual_seed(8), std=0.15)
    state = {name.replace("router.0.", "router."): p for name, p in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(state[name])
    assert len(state) == len(list(theirs.parameters()))

    results = []
    for layer in (ours, theirs):
        weigh_balance_losses(1.0)
        x = random_input(80, torch.float32).requires_grad_()
        y, _ = layer.train()(x, attention_mask=None)
        y.backward(random_input(81, torch.float32))
        grads = {n.replace("router.0.", "router."): p.grad for n, p in layer.named_parameters()}
        results.append({"output": y, "input": x.grad, **grads})
    for name, value in results[1].items():
        if dispatcher == "local":
            torch.testing.assert_close(results[0][name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(results[0][name], value), name


def test_initial_weights_follow_the_authors(single_rank) -> None:
    """Routers Kaiming-uniform, U(-1/sqrt(H), 1/sqrt(H)), each its own; experts normal 0.02."""
    model_parallel_cuda_manual_seed(9, force_reset_rng=True)
    layer = build_layer(tiny_config(hidden_size=256, num_moe_experts=64, coe_iterations=2))
    bound = 256**-0.5
    for router in layer.router:
        assert bound * 0.99 < router.weight.abs().max().item() <= bound
        assert router.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not torch.equal(layer.router[0].weight, layer.router[1].weight)
    for name, parameter in layer.experts.named_parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name


def test_tensor_without_sequence_parallelism_is_refused_before_any_collective(single_rank) -> None:
    layer = build_layer(tiny_config())

    class TwoRanks:
        def size(self) -> int:
            return 2

    layer.attn_tp_group = TwoRanks()
    with pytest.raises(ValueError, match="sequence_parallel=False"):
        layer(random_input(90, torch.float32))


def test_partial_cuda_graphs_are_refused(single_rank) -> None:
    x = random_input(91, torch.float32)
    with pytest.raises(ValueError, match="CUDA graph"):
        build_layer(tiny_config())(x, intermediate_tensors=(x, x))
