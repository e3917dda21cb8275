"""Training does not depend on the layout: from one checkpoint, every layout goes the same way.

The batch size is ramped up meanwhile: the steps have 4, 4, 4, 8 and 8 sequences.
"""

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
HELD_OUT = {"first": 5, "second": 2}
# 4 layers make 2 x 2 interleaved chunks; 8 experts and 4 heads divide by 2.
MODEL = {"num_layers": 4, "num_moe_experts": 8}
TRAIN = {
    "lr": 1e-2,
    "lr_warmup_fraction": 0.0,
    "lr_decay_style": "WSD",
    "lr_wsd_decay_steps": 18,  # of 20: it falls from the third step on
    "global_batch_size": 8,
    "rampup_batch_size": [4, 4, 12],
    "micro_batch_size": 2,
    "lr_mult": {"*.router.*": 0.5, "embedding.*": 3.0, "*.layers.3.*norm.weight": 2.0},
}

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


def go_on(start: str, parallel: dict, save: str | None = None) -> list[dict[str, float]]:
    """Figures of the steps that follow the checkpoint in `start`, and of a validation.

    Args:
        save: where another checkpoint is written after them.
    """
    settings = make_settings(save, model=MODEL, train=TRAIN, parallel=parallel, log={"interval": 1})
    trainer = make_trainer(settings, torch.device("cpu"), held_out=HELD_OUT)
    trainer.progress = load_checkpoint(find_checkpoints(Path(start))[0], trainer.train_state)
    metrics = [trainer.metrics(trainer.step()) for _ in range(STEPS)]
    if save:
        trainer.save()
    for step in metrics:
        for name in OF_THE_MACHINE:
            del step[name]
    return [*metrics, trainer.validator.run(), vars(trainer.progress)]


def go_on_in_every_layout(root: str, save: str) -> dict[str, list[dict[str, float]]]:
    """Runs on each rank."""
    results = {}
    for name, layout in LAYOUTS.items():
        settings = make_settings(parallel=layout)
        with parallel_groups(settings.parallel):
            results[name] = go_on(root, layout, save if name == "data" else None)
    return results


@pytest.fixture(scope="module")
def runs(single_rank, tmp_path_factory):
    """What one process computes, and what two compute in each layout, from the same checkpoint.

    The checkpoint is of step 2, so that the optimizer's state is carried over too. One process goes
    on from where it was itself, and from where two data-parallel ranks were.
    """
    root, own, of_two = (str(tmp_path_factory.mktemp(name)) for name in ("start", "own", "of_two"))
    trainer = make_trainer(make_settings(root, model=MODEL, train=TRAIN), single_rank)
    trainer.step()
    trainer.step()
    trainer.save()
    alone = go_on(root, {}, own)
    ranks = launch("tests.distributed.test_training:go_on_in_every_layout", 2, root, of_two)
    return alone, ranks, go_on(own, {}), go_on(of_two, {})


def assert_same(measured: list[dict], expected: list[dict]) -> None:
    for one, other in zip(measured, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_process_does(runs, layout):
    alone, ranks, _, _ = runs
    assert ranks[0][layout] == ranks[1][layout], "every rank has the same metrics"
    assert alone[STEPS].keys() == {"valid_loss", *(f"valid_loss/{name}" for name in HELD_OUT)}
    assert_same(ranks[0][layout], alone)


def test_a_ramp_is_the_same_in_every_layout_and_after_a_change_of_it(runs):
    """The samples of a step, its learning rate and its gradient: on 1 rank, 2, and 1 again."""
    alone, _, as_before, again = runs
    assert [step["global_batch_size"] for step in alone[:STEPS]] == [4, 8]
    assert [step["global_batch_size"] for step in again[:STEPS]] == [8, 8]
    assert (alone[-1]["samples"], again[-1]["samples"]) == (20, 36)
    lr = [step["lr"] for step in (*alone[:STEPS], *again[:STEPS])]
    # Of the 148 samples of the run the rate falls during those that follow the first 8.
    shares = [(samples - 8) / 140 for samples in (8, 12, 20, 28)]
    assert lr == pytest.approx([TRAIN["lr"] * (2 * 0.5**share - 1) for share in shares])
    assert_same(again, as_before)
