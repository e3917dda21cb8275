"""Memory that a training step really takes, and the configurations at which the planner is judged.

`python -m tests.memory` prints the comparison of docs/results.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_coe.distributed.process_groups import parallel_groups
from megatron_coe.model import backends
from megatron_coe.planning.communication import collectives
from megatron_coe.planning.hardware import GPUS, Cluster
from megatron_coe.planning.memory import Memory, stage_memory
from megatron_coe.planning.plan import Plan
from megatron_coe.planning.run_summary import plan_of
from megatron_coe.training.trainer import Trainer
from megatron_coe.utils.tables import markdown_table
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
CLUSTER = Cluster(GPUS["h100"])
LINEAR = {"cross_entropy_loss_fusion": True}
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
    "no shared expert, no auxiliary loss": {
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
    "only iteration scales": {
        "model": {"coe_upcycled": True, "coe_residual": "outer"},
        "train": {"freeze": ["*", "!*.coe_weights.*"]},
    },
    "frozen experts, distributed optimizer": {
        "train": {"freeze": ["*.experts.*"]},
        "parallel": SHARDED,
    },
    "Muon": {"train": {"optimizer": "muon"}},
    "bf16": {"train": {"precision": "bf16"}, "parallel": SHARDED},
    "linear loss fusion": {"model": LINEAR},
    "linear loss fusion, multi-token prediction": {"model": {**LINEAR, "mtp_num_layers": 1}},
}
"""On one rank."""

PAIRS: dict[str, dict[str, Any]] = {
    "DP2": {"parallel": SHARDED},
    "TP2": {"parallel": {TP: 2}},
    "TP2 ETP1": {"parallel": {TP: 2, ETP: 1, **SHARDED}},
    "EP2": {"parallel": {EP: 2, **SHARDED}},
    "PP2": {"parallel": {PP: 2}},
    "TP2 frozen": {"parallel": {TP: 2}, "train": {"freeze": ["*", "!*.router.*", "!*_proj.*"]}},
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


@dataclass(frozen=True)
class Outcome:
    """One step of a case on this rank."""

    plan: Plan
    predicted: Memory
    measured: Memory
    exchanged: Exchanges


def compare(case: dict[str, Any], device: torch.device) -> Outcome:
    """Predict a step of this rank, whose groups exist, and measure it."""
    model = {**MODEL, **case.get("model", {})}
    train = {"micro_batch_size": 4, "global_batch_size": 16, **case.get("train", {})}
    settings = make_settings(model=model, parallel=case.get("parallel", {}), train=train)
    trainer = make_trainer(settings, device, Sequences())
    world_size = torch.distributed.get_world_size()
    plan = plan_of(
        trainer.train_state.provider,
        settings.parallel,
        settings.train,
        world_size,
        on_gpu=device.type == "cuda",
    )
    predicted = stage_memory(plan, parallel_state.get_pipeline_model_parallel_rank())
    exchanged = Exchanges()
    with exchanged.watched():
        measured = measure(trainer)
    return Outcome(plan, predicted, measured, exchanged)


def measure(trainer: Trainer) -> Memory:
    """Bytes of distinct storages over one training step."""
    chunks, optimizer = trainer.train_state.chunks, trainer.train_state.optimizer
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


class Exchanges:
    """Counts all-to-alls and the bytes that this rank puts into them."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        original = torch.distributed.all_to_all_single

        def counted(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += input.nbytes
            return original(output, input, *args, **kwargs)

        torch.distributed.all_to_all_single = counted
        try:
            yield
        finally:
            torch.distributed.all_to_all_single = original


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


def on_rank(layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name of the layout: what was predicted and measured on this rank of a launch."""
    return {name: _compare_on_rank(case) for name, case in layouts.items()}


def _compare_on_rank(case: dict[str, Any]) -> dict[str, Any]:
    with parallel_groups(make_settings(parallel=case["parallel"]).parallel):
        outcome = compare(case, torch.device("cpu"))
    planned = [c for c in collectives(outcome.plan, 0, CLUSTER) if c.group == "EP"]
    return {
        "predicted": asdict(outcome.predicted),
        "measured": asdict(outcome.measured),
        "planned_exchanges": [
            sum(c.times * c.calls for c in planned),
            sum(c.times * c.sent for c in planned),
        ],
        "exchanges": [outcome.exchanged.calls, outcome.exchanged.bytes],
    }


def assert_near(
    predicted: Memory, measured: Memory, activations: float = 0.05, frozen: bool = False
) -> None:
    """Frozen weights save no inputs for their gradients, which the prediction counts."""
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(predicted, part) == pytest.approx(getattr(measured, part), rel=0.005), part
    if frozen:
        assert predicted.activations > (1 - activations) * measured.activations
        return
    assert predicted.activations == pytest.approx(measured.activations, rel=activations)


def main() -> None:
    """Print a table of every case: measured bytes, and by how much the prediction is off."""
    device = backends.prepare()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    rows = []
    for name, case in CASES.items():
        with parallel_groups(make_settings().parallel):
            outcome = compare(case, device)
        rows.append((name, outcome.predicted, outcome.measured))
    torch.distributed.destroy_process_group()
    for rank, results in enumerate(launch("tests.memory:on_rank", 2, PAIRS, timeout_s=600)):
        for name, result in results.items():
            memories = (Memory(**result[part]) for part in ("predicted", "measured"))
            rows.append((f"{name}, rank {rank}", *memories))
    parts = ("weights", "gradients", "optimizer", "activations")
    cells = [
        [name, *(_cell(getattr(predicted, part), getattr(measured, part)) for part in parts)]
        for name, predicted, measured in rows
    ]
    print(markdown_table(["case", *parts], cells))


def _cell(predicted: int, measured: int) -> str:
    return f"{measured:,} ({predicted / measured - 1:+.1%})"


if __name__ == "__main__":
    main()
