"""Muon in every layout updates whole matrices: a run goes on from a checkpoint as one process's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.distributed.process_groups import parallel_groups
from tests.distributed import parity
from tests.distributed.launch import launch
from tests.unit.training.runs import make_settings, make_trainer

STEPS = 2
MODEL = {"num_layers": 4, "num_moe_experts": 8, "moe_layer_freq": [0, 1, 1, 1]}
TRAIN = {
    "optimizer": "muon",
    "lr": 1e-2,
    "lr_warmup_fraction": 0.0,
    "global_batch_size": 8,
    "micro_batch_size": 2,
}
TP, EP, ETP, PP = (
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "pipeline_model_parallel_size",
)
LAYOUTS = {
    "DP 2": {"overlap_grad_reduce": True},
    "TP 2": {TP: 2},
    "TP 2, EP 2": {TP: 2, EP: 2, ETP: 1},
    "PP 2": {PP: 2},
    "EP 2": {EP: 2},
}


def go_on(root: str, parallel: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Weights of the whole model, on rank 0, after some steps from the checkpoint in `root`."""
    settings = make_settings(model=MODEL, train=TRAIN, parallel=parallel)
    trainer = make_trainer(settings, device)
    trainer.progress = load_checkpoint(find_checkpoints(Path(root))[0], trainer.train_state)
    for _ in range(STEPS):
        trainer.step()
    return parity.gather(trainer.train_state.chunks, lambda parameter: parameter.data)


def go_on_in_every_layout(root: str, results: str) -> None:
    """Runs on each rank; rank 0 writes the weights of each layout into `results`."""
    for name, layout in LAYOUTS.items():
        with parallel_groups(make_settings(parallel=layout).parallel):
            found = go_on(root, layout, torch.device("cpu"))
            if dist.get_rank() == 0:
                torch.save(found, Path(results, f"{name}.pt"))


@pytest.fixture(scope="module")
def runs(single_rank, tmp_path_factory):
    """What one process makes of a checkpoint with momentum, and what two make in each layout."""
    root, results = (str(tmp_path_factory.mktemp(name)) for name in ("start", "results"))
    trainer = make_trainer(make_settings(root, model=MODEL, train=TRAIN), single_rank)
    trainer.step()
    trainer.save()
    before = parity.gather(trainer.train_state.chunks, lambda parameter: parameter.data)
    alone = go_on(root, {}, single_rank)
    launch("tests.distributed.test_muon:go_on_in_every_layout", 2, root, results)
    return before, alone, {name: torch.load(Path(results, f"{name}.pt")) for name in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_updates_as_one_process_does(runs, layout):
    before, alone, ranks = runs
    assert ranks[layout].keys() == alone.keys()
    for name, expected in alone.items():
        moved = (expected - before[name]).abs().max()
        assert moved > 0
        assert (ranks[layout][name] - expected).abs().max() < 1e-3 * moved, name
