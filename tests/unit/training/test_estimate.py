"""Memory on paper against what a model really keeps."""

from __future__ import annotations

import pytest
import torch

from megatron_coe.training.estimate import describe_sizes, estimate_memory
from tests.unit.training.runs import make_settings, make_trainer


def kept_bytes(trainer) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the parameters."""
    (chunk,) = trainer.trainee.chunks
    known = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or its address would be given to the next one
        return tensor

    alive: list[torch.Tensor] = []
    batch = trainer.train.training(0, 1)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    del losses
    return sum(kept.values())


@pytest.mark.parametrize("distributed", [False, True])
def test_states_are_exact_on_one_rank(single_rank, distributed):
    settings = make_settings(parallel={"use_distributed_optimizer": distributed})
    trainer = make_trainer(settings, single_rank)
    memory = estimate_memory(trainer.trainee.provider, settings, world_size=1)
    parameters = [p for chunk in trainer.trainee.chunks for p in chunk.parameters()]
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.main_grad.nbytes for p in parameters)
    state = 0
    for part in trainer.trainee.optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            state += values["exp_avg"].nbytes + values["exp_avg_sq"].nbytes
    assert memory.optimizer == state


@pytest.mark.parametrize(
    "model",
    [
        {"hidden_size": 128, "moe_ffn_hidden_size": 128, "moe_router_topk": 2},
        {"hidden_size": 128, "moe_ffn_hidden_size": 64, "moe_router_topk": 6, "coe_iterations": 3},
        {"hidden_size": 64, "moe_shared_expert_intermediate_size": None, "coe_iterations": 1},
        {"hidden_size": 128, "num_layers": 4, "moe_layer_freq": 2, "ffn_hidden_size": 512},
        {"hidden_size": 128, "multi_latent_attention": False, "vocab_size": 2048},
    ],
)
def test_activations_are_near_what_is_kept(single_rank, model):
    settings = make_settings(model=model, train={"micro_batch_size": 4})
    trainer = make_trainer(settings, single_rank)
    estimate = estimate_memory(trainer.trainee.provider, settings, world_size=1).activations
    assert estimate == pytest.approx(kept_bytes(trainer), rel=0.25)


def test_ranks_share_the_model(single_rank):
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "use_distributed_optimizer": True,
    }
    from megatron_coe.training.model import build_provider

    model = {"num_layers": 4, "num_moe_experts": 8}
    whole = make_settings(model=model)
    parts = make_settings(model=model, parallel=layout)
    alone, shared = (
        estimate_memory(build_provider(s, single_rank), s, world_size=w)
        for s, w in ((whole, 1), (parts, 8))
    )
    assert alone.weights / 4.5 < shared.weights < alone.weights / 3.5
    assert shared.optimizer == pytest.approx(shared.weights, rel=0.02)  # 2 replicas share 8 bytes
    assert "8 rank(s)" in describe_sizes(build_provider(parts, single_rank), parts, 8)
