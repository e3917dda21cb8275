"""Memory that a training step really takes, and the configurations at which the planner is judged.

`python -m tests.memory` prints the comparison of docs/results.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_coe import backends
from megatron_coe.planning.memory import Memory, stage_memory
from megatron_coe.training.estimate import plan_of
from megatron_coe.training.loop import Trainer
from megatron_coe.training.setup import parallel_groups
from tests.distributed.launch import launch
from tests.unit.training.runs import make_settings, make_trainer

S = 64
MODEL = {
    "seq_length": S,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "qk_head_dim": 48,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 48,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "num_moe_experts": 8,
    "ffn_hidden_size": 384,
    "vocab_size": 1024,
    "num_layers": 4,
}
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
SHARDED = {"use_distributed_optimizer": True}

CASES: dict[str, dict[str, Any]] = {
    "C = 1": {"model": {"coe_iterations": 1}},
    "C = 2": {},
    "C = 3, K = 6": {"model": {"coe_iterations": 3, "moe_router_topk": 6}},
    "fused activation": {"model": {"bias_activation_fusion": True}},
    "first layer dense, q-LoRA": {
        "model": {"moe_layer_freq": [0, 1, 1, 1], "q_lora_rank": 96, "v_head_dim": 64}
    },
    "plain attention": {"model": {"multi_latent_attention": False, "num_query_groups": 2}},
    "no shared expert, no balance loss": {
        "model": {"moe_shared_expert_intermediate_size": None, "moe_aux_loss_coeff": 0.0}
    },
    "upcycled": {"model": {"coe_upcycled": True, "coe_residual": "outer"}},
    "multi-token prediction": {"model": {"mtp_num_layers": 1}},
    "recompute moe_act": {
        "model": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    },
    "recompute moe": {
        "model": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    },
    "recompute full": {
        "model": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    },
    "distributed optimizer": {"parallel": SHARDED},
    "bf16": {"train": {"precision": "bf16"}, "parallel": SHARDED},
}
"""On one rank."""

PAIRS: dict[str, dict[str, Any]] = {
    "DP2": {"parallel": SHARDED},
    "TP2": {"parallel": {TP: 2}},
    "TP2 ETP1": {"parallel": {TP: 2, ETP: 1, **SHARDED}},
    "EP2": {"parallel": {EP: 2, **SHARDED}},
    "PP2": {"parallel": {PP: 2}},
    "PP2 VPP2": {"parallel": {PP: 2, "virtual_pipeline_model_parallel_size": 2}},
    "CP2": {"parallel": {"context_parallel_size": 2, **SHARDED}},
}
"""On two ranks."""


class Sequences:
    """Endless random sequences without padding, each a function of its number."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(MODEL["vocab_size"], (S + 1,), generator=generator)
        labels = {"tokens": ids[:-1], "labels": ids[1:]}
        return {**labels, "loss_mask": torch.ones(S), "position_ids": torch.arange(S)}


def compare(case: dict[str, Any], device: torch.device) -> tuple[Memory, Memory]:
    """(predicted, measured) memory of this rank, whose groups exist."""
    model = {**MODEL, **case.get("model", {})}
    train = {"micro_batch_size": 4, "global_batch_size": 16, **case.get("train", {})}
    settings = make_settings(model=model, parallel=case.get("parallel", {}), train=train)
    trainer = make_trainer(settings, device, Sequences())
    world_size = torch.distributed.get_world_size()
    plan = plan_of(settings, trainer.trainee.provider, world_size, on_gpu=device.type == "cuda")
    predicted = stage_memory(plan, parallel_state.get_pipeline_model_parallel_rank())
    return predicted, measure(trainer)


def measure(trainer: Trainer) -> Memory:
    """Bytes of distinct storages over one training step."""
    chunks, optimizer = trainer.trainee.chunks, trainer.trainee.optimizer
    buffers = [
        buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    weights = _storages(parameter for chunk in chunks for parameter in chunk.parameters())
    kept = KeptTensors(weights.keys())
    with kept.watched():
        trainer.step()
    return Memory(
        weights=sum(weights.values()),
        gradients=sum(_storages(buffer.grad_data for buffer in buffers).values()),
        optimizer=sum(_storages(_states(optimizer), known=weights.keys()).values()),
        activations=kept.peak,
    )


class KeptTensors:
    """Watches what autograd saves, and how much of it is alive when the backward pass begins to
    take it back."""

    def __init__(self, known: Iterable[int]) -> None:
        self.known = set(known)
        self.alive: Counter[int] = Counter()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.peak = 0
        self._grown = False

    def watched(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        self._grown = True
        return _Saved(tensor, self)

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        if self._grown:
            # Storages, not tensors: some are emptied meanwhile, to be filled again.
            self.peak = max(self.peak, sum(s.nbytes() for s in self.storages.values()))
            self._grown = False
        return saved.tensor


class _Saved:
    """A saved tensor, known to its watcher as long as the graph holds it."""

    def __init__(self, tensor: torch.Tensor, watcher: KeptTensors) -> None:
        self.tensor, self.watcher = tensor, watcher
        storage = tensor.untyped_storage()
        self.key = storage.data_ptr()
        if self.key not in watcher.known:
            watcher.alive[self.key] += 1
            watcher.storages[self.key] = storage

    def __del__(self) -> None:
        alive = self.watcher.alive
        if self.key in alive:
            alive[self.key] -= 1
            if not alive[self.key]:
                del alive[self.key], self.watcher.storages[self.key]


def _storages(tensors: Iterable[torch.Tensor], known: Collection[int] = ()) -> dict[int, int]:
    """Bytes of each distinct storage, by address."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {address: size for address, size in found.items() if address not in known}


def _states(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """Main weights and moments."""
    tensors = []
    for part in optimizer.chained_optimizers:
        tensors += [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [t for state in part.optimizer.state.values() for t in state.values()]
    return [tensor for tensor in tensors if torch.is_tensor(tensor)]


def on_rank(layouts: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, int]]]:
    """By name of the layout: predicted and measured memory of this rank of a launch."""
    return {name: _compare_on_rank(case) for name, case in layouts.items()}


def _compare_on_rank(case: dict[str, Any]) -> list[dict[str, int]]:
    with parallel_groups(make_settings(parallel=case["parallel"]).parallel):
        return [asdict(memory) for memory in compare(case, torch.device("cpu"))]


def assert_near(predicted: Memory, measured: Memory, activations: float = 0.05) -> None:
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(predicted, part) == pytest.approx(getattr(measured, part), rel=0.005), part
    assert predicted.activations == pytest.approx(measured.activations, rel=activations)


def main() -> None:
    """Print predicted / measured bytes of every case as a table."""
    device = backends.prepare()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    rows = []
    for name, case in CASES.items():
        with parallel_groups(make_settings().parallel):
            rows.append((name, *compare(case, device)))
    torch.distributed.destroy_process_group()
    for rank, results in enumerate(launch("tests.memory:on_rank", 2, PAIRS, timeout_s=600)):
        for name, memories in results.items():
            rows.append((f"{name}, rank {rank}", *(Memory(**memory) for memory in memories)))
    parts = ("weights", "gradients", "optimizer", "activations")
    print(f"| case | {' | '.join(parts)} |\n|---|{'---|' * len(parts)}")
    for name, predicted, measured in rows:
        cells = [_cell(getattr(predicted, part), getattr(measured, part)) for part in parts]
        print(f"| {name} | {' | '.join(cells)} |")


def _cell(predicted: int, measured: int) -> str:
    return f"{predicted:,} / {measured:,} ({predicted / measured - 1:+.1%})"


if __name__ == "__main__":
    main()
