"""Training does not depend on the layout: from one checkpoint, every layout goes the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.distributed.process_groups import parallel_groups
from tests.distributed.launch import launch
from tests.unit.training.runs import make_settings, make_trainer

STEPS = 2
OF_THE_MACHINE = ("step_seconds", "tokens_per_second", "flops_per_second", "memory_peak_bytes")
OF_THE_MACHINE += ("work_seconds", "work_seconds_median", "slowest_rank")
HELD_OUT = 5
# 4 layers make 2 x 2 interleaved chunks; 8 experts and 4 heads divide by 2.
MODEL = {"num_layers": 4, "num_moe_experts": 8}
TRAIN = {"lr": 1e-2, "lr_warmup_fraction": 0.0, "global_batch_size": 8, "micro_batch_size": 2}

LAYOUTS = {
    "data": {},
    "data, distributed optimizer": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "tensor": {"tensor_model_parallel_size": 2},
    "tensor, one expert part": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "tensor and expert": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "pipeline": {"pipeline_model_parallel_size": 2},
    "interleaved pipeline": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "expert": {"expert_model_parallel_size": 2},
    "context": {"context_parallel_size": 2, "use_distributed_optimizer": True},
    "expert, distributed optimizer": {
        "expert_model_parallel_size": 2,
        "use_distributed_optimizer": True,
    },
}


def go_on(root: str, parallel: dict) -> list[dict[str, float]]:
    """Figures of the steps that follow the checkpoint in `root`, and of a validation."""
    settings = make_settings(model=MODEL, train=TRAIN, parallel=parallel, log={"interval": 1})
    trainer = make_trainer(settings, torch.device("cpu"), held_out=HELD_OUT)
    trainer.progress = load_checkpoint(find_checkpoints(Path(root))[0], trainer.train_state)
    metrics = [trainer.metrics(trainer.step()) for _ in range(STEPS)]
    for step in metrics:
        for name in OF_THE_MACHINE:
            del step[name]
    return [*metrics, trainer.validator.run()]


def go_on_in_every_layout(root: str) -> dict[str, list[dict[str, float]]]:
    """Runs on each rank."""
    results = {}
    for name, layout in LAYOUTS.items():
        settings = make_settings(parallel=layout)
        with parallel_groups(settings.parallel):
            results[name] = go_on(root, layout)
    return results


@pytest.fixture(scope="module")
def runs(single_rank, tmp_path_factory):
    """What one process computes, and what two compute in each layout, from the same checkpoint.

    The checkpoint is of step 2, so that the optimizer's state is carried over too.
    """
    root = str(tmp_path_factory.mktemp("checkpoints"))
    trainer = make_trainer(make_settings(root, model=MODEL, train=TRAIN), single_rank)
    trainer.step()
    trainer.step()
    trainer.save()
    alone = go_on(root, {})
    ranks = launch("tests.distributed.test_training:go_on_in_every_layout", 2, root)
    return alone, ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_process_does(runs, layout):
    alone, ranks = runs
    assert ranks[0][layout] == ranks[1][layout], "every rank has the same metrics"
    for expected, measured in zip(alone, ranks[0][layout], strict=True):
        assert measured.keys() == expected.keys()
        for name, value in expected.items():
            assert measured[name] == pytest.approx(value, rel=2e-5), name
