"""The authors' numbers: logits, loss and gradients, by the Megatron model and the reference."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_coe.model.moe.layer import CoELayer
from megatron_coe.model.reference import ReferenceCoE
from tests.builders import expert_matrices, weigh_balance_losses
from tests.golden import CASES, GOLDEN, as_megatron, provider_of

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy golden weights into a model, each exactly once."""
    left = dict(weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." not in name or ".shared_experts." in name:
                parameter.copy_(left.pop(name))
        for index, layer in enumerate(model.decoder.layers):
            prefix = f"decoder.layers.{index}.mlp.experts."
            gate_up, down = expert_matrices(layer.mlp.experts)
            gate_up.copy_(left.pop(prefix + "gate_up"))
            down.copy_(left.pop(prefix + "down"))
    assert not left, f"weights without a place: {sorted(left)}"


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    result = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if ".experts." not in name or ".shared_experts." in name
    }
    for index, layer in enumerate(model.decoder.layers):
        prefix = f"decoder.layers.{index}.mlp.experts."
        gate_up, down = expert_matrices(layer.mlp.experts, of=lambda weight: weight.grad)
        result |= {prefix + "gate_up": gate_up, prefix + "down": down}
    return result


class ReferenceLayer(torch.nn.Module):
    """`ReferenceCoE` in the place of a model's CoE layer, on that layer's own weights."""

    def __init__(self, layer: CoELayer) -> None:
        super().__init__()
        self.layer = layer  # keeps the parameters where they are, under a longer name
        self.balance: Tensor | None = None

    def forward(self, x_SBH: Tensor, padding_mask: None = None) -> tuple[Tensor, None]:
        config, layer = self.layer.config, self.layer
        independent = config.coe_independent_gate
        routers = layer.router if independent else [layer.router] * config.coe_iterations
        shared = layer.shared_experts
        gate_up, down = expert_matrices(layer.experts)
        reference = ReferenceCoE(
            gates=[router.weight for router in routers],
            gate_up=gate_up,
            down=down,
            shared=shared and (shared.linear_fc1.weight, shared.linear_fc2.weight),
            topk=config.moe_router_topk,
            residual=config.coe_residual,
        )
        x, losses = reference.forward(x_SBH)
        self.balance = losses.sum()
        return x, None


def run(model, case: str, expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits in evaluation mode, training loss without the auxiliary loss) of the golden batch."""
    ids = expected["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = model.eval()(ids, positions, None)
    labels = ids.roll(-1, dims=1)
    losses = model.train()(ids, positions, None, labels=labels)
    return logits, losses[:, :-1].mean()


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("case", CASES)
def test_megatron_model_gives_the_authors_numbers(single_rank, case: str, dispatcher: str) -> None:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    provider = provider_of(case, moe_token_dispatcher_type=dispatcher)
    model = provider.provide()
    load_weights(model, as_megatron(load_file(GOLDEN / case / "model.safetensors"), provider))
    weigh_balance_losses(1.0)
    logits, loss = run(model, case, expected)
    loss.backward()
    check(model, provider, expected, logits, loss)


@pytest.mark.parametrize("case", CASES)
def test_reference_layer_gives_the_authors_numbers(single_rank, case: str) -> None:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    provider = provider_of(case)
    model = provider.provide()
    load_weights(model, as_megatron(load_file(GOLDEN / case / "model.safetensors"), provider))
    layers = [layer.mlp for layer in model.decoder.layers]
    for layer in model.decoder.layers:
        layer.mlp = ReferenceLayer(layer.mlp)
    logits, loss = run(model, case, expected)
    balance = sum(layer.mlp.balance for layer in model.decoder.layers)
    (loss + provider.moe_aux_loss_coeff * balance).backward()
    for layer, mlp in zip(model.decoder.layers, layers, strict=True):
        layer.mlp = mlp
    check(model, provider, expected, logits, loss)


def check(model, provider, expected: dict[str, Tensor], logits: Tensor, loss: Tensor) -> None:
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)
    torch.testing.assert_close(loss, expected["loss"].squeeze(), **TOLERANCE)
    golden = as_megatron(
        {name.removeprefix("grad."): grad for name, grad in expected.items() if "grad." in name},
        provider,
    )
    ours = gradients(model)
    assert set(golden) == set(ours)
    for name, grad in golden.items():
        torch.testing.assert_close(
            ours[name], grad, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
