"""Auxiliary losses over real ranks: their gradient and what is logged, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import launch

S, B, H, N, COEFF = 8, 2, 32, 7, 0.1
LAYOUTS = {"tp2": {"tensor_model_parallel_size": 2}, "cp2": {"context_parallel_size": 2}, "dp2": {}}
LOSSES = ("seq_aux_loss", "aux_loss", "global_aux_loss", "z_loss")


@pytest.fixture(scope="module")
def measured():
    return launch("tests.distributed.test_balance:measure", 2)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_objectives(measured, layout: str, loss: str, per_token: bool) -> None:
    """Of coefficient * mean over micro-batches and replicas, whatever splits the sequence."""
    for rank in measured:
        result = rank[f"{layout} {loss} {per_token}"]
        got, want = torch.tensor(result["gradient"]), torch.tensor(result["expected"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logged_value_is_the_mean(measured, layout: str, loss: str) -> None:
    for rank in measured:
        result = rank[f"{layout} {loss} False"]
        assert result["logged"] == pytest.approx(result["value"], rel=1e-5)


def test_a_stage_without_coe_layers_does_not_hang(measured) -> None:
    """Two pipeline stages, of which only the first logged anything."""
    assert [rank["pp2"] for rank in measured] == [measured[0]["pp2"]] * 2
    assert measured[0]["pp2"] == pytest.approx([1.0 + 2.0, 0.0])


def measure() -> dict:
    from megatron.core import parallel_state

    results = {}
    for layout, sizes in LAYOUTS.items():
        parallel_state.initialize_model_parallel(**sizes)
        for loss in LOSSES:
            for per_token in (False, True):
                results[f"{layout} {loss} {per_token}"] = _router_gradient(sizes, loss, per_token)
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    results["pp2"] = _one_silent_stage()
    parallel_state.destroy_model_parallel()
    return results


def _router_gradient(sizes: dict, loss: str, per_token: bool) -> dict:
    """One micro-batch per replica through a router, reduced as Megatron reduces gradients."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_coe.model.moe.aux_loss import collect_aux_losses
    from megatron_coe.model.moe.router import CoERouter
    from tests.builders import randomize, tiny_config, weigh_balance_losses

    kind = {"moe_router_load_balancing_type": loss, "moe_aux_loss_coeff": COEFF}
    if loss == "z_loss":
        kind = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": COEFF}
    sequence_parallel = "tensor_model_parallel_size" in sizes
    config = tiny_config(
        calculate_per_token_loss=per_token, sequence_parallel=sequence_parallel, **sizes, **kind
    )
    router = CoERouter(config, get_default_pg_collection()).train()
    router.set_layer_number(1)
    randomize(router, torch.Generator().manual_seed(0), std=0.3)

    rank, dp_size = torch.distributed.get_rank(), parallel_state.get_data_parallel_world_size()
    cp_size = parallel_state.get_context_parallel_world_size()
    x = torch.randn(S, B * dp_size, H, generator=torch.Generator().manual_seed(1))
    mine = x.chunk(2, dim=1 if dp_size == 2 else 0)[rank].contiguous()
    # Megatron's schedule weighs by the context-parallel size where DDP then divides by it.
    weigh_balance_losses(1.0 if per_token else float(cp_size))
    probs, _ = router(mine)
    (probs * 0).sum().backward()
    gradient = router.weight.grad.clone()
    torch.distributed.all_reduce(gradient)  # over TP (sequence parallel), CP or DP: all two ranks
    gradient /= S * B * dp_size if per_token else dp_size * cp_size

    value = _objective(router, x, loss, dp_size)
    (expected,) = torch.autograd.grad(COEFF * value, router.weight)
    logged = collect_aux_losses(config, 1, torch.device("cpu"))
    return {
        "gradient": gradient.tolist(),
        "expected": expected.tolist(),
        "value": value.item(),
        "logged": logged[loss].sum().item(),
    }


def _objective(router, x: torch.Tensor, loss: str, dp_size: int) -> torch.Tensor:
    """The loss of all ranks' sequences, in one process."""
    from megatron_coe.model.reference import ReferenceCoE

    nothing = torch.empty(0)
    oracle = ReferenceCoE([router.weight], nothing, nothing, None, topk=router.topk)
    scores = oracle.scores(x, router.weight)
    if loss == "seq_aux_loss":
        return oracle.aux_loss(scores)
    if loss == "z_loss":
        return (x @ router.weight.T).logsumexp(dim=-1).square().mean()
    # aux_loss is one of each replica's micro-batch, global_aux_loss one of all replicas'.
    parts = scores.chunk(dp_size if loss == "aux_loss" else 1, dim=1)
    return torch.stack([oracle.aux_loss(part.reshape(-1, 1, N)) for part in parts]).mean()


def _one_silent_stage() -> list[float]:
    from megatron.core import parallel_state

    from megatron_coe.megatron_compat.versions import record_aux_loss
    from megatron_coe.model.moe.aux_loss import collect_aux_losses, iteration_key
    from tests.builders import tiny_config

    group = parallel_state.get_tensor_and_context_parallel_group()
    config = tiny_config(
        coe_iterations=2, pipeline_model_parallel_size=2, pipeline_dtype=torch.float
    )
    if parallel_state.is_pipeline_first_stage():
        for t in range(2):
            key = iteration_key("seq_load_balancing_loss", t)
            loss = torch.tensor(1.0 + t)
            record_aux_loss(key, loss, 1, config.num_layers, group, False)
    logged = collect_aux_losses(config, 1, torch.device("cpu"))["seq_aux_loss"]
    return logged.sum(dim=0).tolist()
