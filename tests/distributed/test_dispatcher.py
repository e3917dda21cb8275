"""All-to-alls under the shared expert, over real ranks: the numbers of Megatron's dispatcher, the
order in which things happen, and the time that is counted."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import launch

S, B, H, N = 8, 2, 32, 8
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {
    "EP2": EP2,
    "TP2 EP2": {
        **EP2,
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": True,
    },
}
FEATURES = {
    "plain": {},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "shared expert recomputed": {
        "recompute_granularity": "selective",
        "recompute_modules": ["shared_experts"],
    },
    "no shared expert": {"moe_shared_expert_intermediate_size": None},
    "padded to capacity": {
        "moe_expert_capacity_factor": 1.5,
        "moe_pad_expert_input_to_capacity": True,
        "moe_router_load_balancing_type": "aux_loss",
    },
}
CASES = [(layout, C, "plain") for layout in LAYOUTS for C in (1, 2, 3)]
CASES += [("EP2", 2, feature) for feature in FEATURES if feature != "plain"]


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return launch("tests.distributed.test_dispatcher:measure", 2)


@pytest.mark.parametrize(("layout", "C", "feature"), CASES)
def test_numbers_are_those_of_megatrons_dispatcher(measured, layout, C, feature) -> None:
    """Output and every gradient, in fp64."""
    for rank in measured:
        errors = rank[f"{layout} {C} {feature}"]
        assert len(errors) > 3
        assert max(errors.values()) < 1e-12, errors


def test_the_shared_expert_works_while_rows_travel(measured) -> None:
    """To the experts: under its forward pass and, as gradients, under its backward pass."""
    for rank in measured:
        assert rank["events"] == ["send", "shared", "wait"] * 4


def measure() -> dict:
    from megatron.core import parallel_state

    results: dict = {}
    for layout, sizes in LAYOUTS.items():
        fields = ("tensor_model_parallel_size", "expert_model_parallel_size")
        groups = {field: sizes.get(field, 1) for field in fields}
        parallel_state.initialize_model_parallel(**groups, expert_tensor_parallel_size=1)
        for case in CASES:
            if case[0] == layout:
                results[f"{layout} {case[1]} {case[2]}"] = _errors(sizes, *case[1:])
        if layout == "EP2":
            results["events"] = _events(sizes)
        parallel_state.destroy_model_parallel()
    return results


def _layer(sizes: dict, C: int, **changes):
    """The same layer on each rank, but for its share of the experts."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from tests.builders import BALANCE_COEFF, build_layer, randomize, tiny_config

    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    config = tiny_config(
        num_moe_experts=N,
        coe_iterations=C,
        params_dtype=torch.float64,
        moe_router_dtype="fp64",
        moe_aux_loss_coeff=BALANCE_COEFF,
        **sizes,
        **changes,
    )
    layer = build_layer(config).train()
    randomize(layer.router, torch.Generator().manual_seed(1), std=0.2)
    randomize(layer.experts, torch.Generator().manual_seed(torch.distributed.get_rank()), std=0.15)
    return layer


def _pass(layer) -> dict[str, torch.Tensor]:
    """Output and gradients for tokens of this rank's own."""
    from tests.builders import weigh_balance_losses

    generator = torch.Generator().manual_seed(10 + torch.distributed.get_rank())
    x = torch.randn(S, B, H, generator=generator, dtype=torch.float64).requires_grad_()
    weigh_balance_losses(1.0)
    y, _ = layer(x)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64))
    return {"output": y, "input": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def _errors(sizes: dict, C: int, feature: str) -> dict[str, float]:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_coe.model.moe.dispatcher import AsyncDispatcher

    ours = _layer(sizes, C, **FEATURES[feature])
    theirs = _layer(sizes, C, moe_token_dispatcher_type="megatron_alltoall", **FEATURES[feature])
    theirs.load_state_dict(ours.state_dict())
    assert type(ours.token_dispatcher) is AsyncDispatcher
    assert type(theirs.token_dispatcher) is MoEAlltoAllTokenDispatcher
    mine, other = _pass(ours), _pass(theirs)
    return {
        name: ((mine[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)).item()
        for name, value in other.items()
    }


def _events(sizes: dict) -> list[str]:
    """What two iterations do, in order, and then their backward passes."""
    from megatron_coe.model.moe import async_all_to_all

    layer, events = _layer(sizes, 2), []
    send, wait = async_all_to_all.AllToAll._send, async_all_to_all.AllToAll._wait

    def noted(name: str, function):
        def call(*args):
            events.append(name)
            return function(*args)

        return call

    def shared(_module, _inputs, output) -> None:
        events.append("shared")
        output.register_hook(lambda _: events.append("shared"))

    async_all_to_all.AllToAll._send, async_all_to_all.AllToAll._wait = (
        noted("send", send),
        noted("wait", wait),
    )
    layer.shared_experts.register_forward_hook(shared)
    try:
        _pass(layer)
    finally:
        async_all_to_all.AllToAll._send, async_all_to_all.AllToAll._wait = send, wait
    return events
