"""A CoE model of plain-PyTorch modules, in every layout of two ranks, against one rank.

The one-rank run saves its start; each layout loads that and trains two steps on the same global
batch. The second step's loss and the gradient norms tell whether gradients were right: among others
for TP=2 with EP=1, where Megatron's own experts miss the sum over tensor-parallel ranks, and for
MLA under TP=2, where its keys miss another. Upcycled chains have a start of their own, and their
gates' gradients are compared one by one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch

VOCAB, SEQ, BATCH, LAYERS, EXPERTS = 64, 16, 4, 2, 4

LAYOUTS = {
    "tp2_sp": {"tensor": 2},
    "tp2_sp_etp2": {"tensor": 2, "expert_tensor": 2},
    "tp2_sp_ep2": {"tensor": 2, "expert": 2},
    "ep2": {"expert": 2},
    "ep2_allgather": {"expert": 2, "dispatcher": "allgather"},
    "pp2": {"pipeline": 2},
    "dp2": {},
    "dp2_overlap": {"overlap": True},
    "dp2_distributed_optimizer": {"distributed_optimizer": True},
    "ep2_distributed_optimizer_overlap": {
        "expert": 2,
        "distributed_optimizer": True,
        "overlap": True,
    },
    "recompute": {"recompute": True},
    "upcycled_tp2_sp": {"upcycled": True, "tensor": 2},
    "upcycled_tp2_sp_ep2": {"upcycled": True, "tensor": 2, "expert": 2},
    "upcycled_ep2": {"upcycled": True, "expert": 2},
    "upcycled_pp2": {"upcycled": True, "pipeline": 2},
    "upcycled_dp2_distributed_optimizer": {"upcycled": True, "distributed_optimizer": True},
}
REFERENCES = {"plain": {"saves": True}, "upcycled": {"saves": True, "upcycled": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    start = str(tmp_path_factory.mktemp("start"))
    function = "tests.distributed.test_layouts:train_layouts"
    (references,) = launch(function, 1, start, REFERENCES)
    ranks = launch(function, 2, start, LAYOUTS)
    return references, ranks


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_rank(runs, name):
    references, ranks = runs
    reference = references["upcycled" if LAYOUTS[name].get("upcycled") else "plain"]
    # The last pipeline stage has the losses; the other reports none.
    losses, norms, _ = ranks[-1][name]
    assert len(losses) == 2 and reference[0][1] < reference[0][0]
    for got, want in zip(losses + norms, reference[0] + reference[1], strict=True):
        assert got == pytest.approx(want, rel=2e-5)


# With the distributed optimizer a rank has its part of the sum only; there, the norms tell.
GATED = [n for n, x in LAYOUTS.items() if x.get("upcycled") and not x.get("distributed_optimizer")]


@pytest.mark.parametrize("name", GATED)
def test_the_gates_of_an_upcycled_chain_have_the_gradient_of_one_rank(runs, name):
    references, ranks = runs
    expected = references["upcycled"][2]
    assert len(expected) == LAYERS
    gradients = {}
    for rank in ranks:
        for layer, gradient in rank[name][2].items():
            assert gradient == pytest.approx(gradients.setdefault(layer, gradient), rel=1e-6)
    assert gradients.keys() == expected.keys()
    for layer, gradient in gradients.items():
        error = torch.tensor(gradient) - torch.tensor(expected[layer])
        assert error.abs().max() < 1e-5 * torch.tensor(expected[layer]).abs().max()


def train_layouts(start: str, layouts: dict) -> dict:
    """{layout: (losses, gradient norms, gates' gradients)} of two steps from the saved start."""
    from megatron.core import parallel_state

    results = {}
    for name, layout in layouts.items():
        parallel_state.initialize_model_parallel(
            layout.get("tensor", 1),
            layout.get("pipeline", 1),
            expert_model_parallel_size=layout.get("expert", 1),
            expert_tensor_parallel_size=layout.get("expert_tensor", 1),
        )
        kind = "upcycled" if layout.get("upcycled") else "plain"
        results[name] = _train(f"{start}/{kind}", layout)
        parallel_state.destroy_model_parallel()
    return results


def _train(start: str, layout: dict) -> tuple[list[float], list[float], dict[int, list[float]]]:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    config = _config(layout)
    model = config.provide()
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    if layout.get("saves"):
        Path(start).mkdir()
        for number, gate in _gates(model).items():
            generator = torch.Generator().manual_seed(number)
            gate.data.copy_(torch.randn(gate.shape, generator=generator))
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), start)
    model.load_state_dict(
        dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), start)
    )

    overlap, distributed = layout.get("overlap", False), layout.get("distributed_optimizer", False)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distributed,
            use_distributed_optimizer=distributed,
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=0.02,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap and distributed,
        ),
        [model],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync if overlap else None

    replicas = parallel_state.get_data_parallel_world_size()
    losses, norms, gradients = [], [], {}
    for _ in range(2):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(_micro_batches(parallel_state.get_data_parallel_rank(), replicas)),
            model=[model],
            num_microbatches=BATCH // replicas,
            seq_length=SEQ,
            micro_batch_size=1,
            forward_only=False,
        )
        gradients = gradients or {n: g.main_grad.tolist() for n, g in _gates(model.module).items()}
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
        if reported:
            total = torch.stack([r["loss"] for r in reported]).sum()
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
            losses.append(total.item() / BATCH)
    return losses, norms, gradients


def _gates(model) -> dict[int, torch.nn.Parameter]:
    """The gate of an upcycled chain's second iteration, by the layer's number."""
    return {
        layer.layer_number: layer.mlp.coe_weights["1"]
        for layer in model.decoder.layers
        if layer.mlp.config.coe_upcycled
    }


def _config(layout: dict):
    from megatron_coe.provider import CoEModelProvider

    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return CoEModelProvider(
        coe_iterations=2,
        coe_upcycled=layout.get("upcycled", False),
        coe_residual="outer" if layout.get("upcycled") else "inner",
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=1,
        seq_length=SEQ,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=24,
        moe_router_topk=2,
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type=layout.get("dispatcher", "alltoall"),
        backend="torch",
        tensor_model_parallel_size=layout.get("tensor", 1),
        sequence_parallel=layout.get("tensor", 1) > 1,
        pipeline_model_parallel_size=layout.get("pipeline", 1),
        expert_model_parallel_size=layout.get("expert", 1),
        expert_tensor_parallel_size=layout.get("expert_tensor", 1),
        pipeline_dtype=torch.float32,
        **(recompute if layout.get("recompute") else {}),
    )


def _micro_batches(replica: int, replicas: int) -> list[torch.Tensor]:
    tokens = torch.randint(
        0, VOCAB, (BATCH, 1, SEQ + 1), generator=torch.Generator().manual_seed(3)
    )
    return list(tokens[replica::replicas])


def _forward_step(batches, model):
    tokens = next(batches)
    positions = torch.arange(SEQ)[None]
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return losses, lambda output: (output.mean(), {"loss": output.detach().mean()})
