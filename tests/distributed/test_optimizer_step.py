"""The update that a GPU has is Megatron's own, in every kind of layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_coe.distributed.process_groups import parallel_groups
from tests.distributed.launch import launch
from tests.unit.training.planted import everything
from tests.unit.training.runs import make_settings, make_trainer, with_one_sync

LAYOUTS = {
    "data": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "tensor": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "use_distributed_optimizer": True,
    },
    "pipeline": {"pipeline_model_parallel_size": 2},
    "expert": {"expert_model_parallel_size": 2},
}
CLIP_GRAD = dict.fromkeys(LAYOUTS, 0.1) | {"expert": 0.0}
TRAIN = {
    "global_batch_size": 6,
    "lr_warmup_fraction": 0.0,
    "adam_eps": 1e-3,  # or the sign of a gradient of rounding errors alone would be an update
}
MODEL = {"num_moe_experts": 8, "mtp_num_layers": 1}


def compare_updates(_: str) -> dict[str, list]:
    """Runs on each rank; returns of each case both runs' norms, and how far their states differ."""
    found = {}
    for name, parallel in LAYOUTS.items():
        train = TRAIN | {"clip_grad": CLIP_GRAD[name]}
        settings = make_settings(train=train, parallel=parallel, model=MODEL)
        with parallel_groups(settings.parallel):
            theirs = make_trainer(settings, torch.device("cpu"))
            ours = with_one_sync(make_trainer(settings, torch.device("cpu")))
            steps = [(theirs.step(), ours.step()) for _ in range(2)]
            norms = [[[s.grad_norm, *s.grad_norms.values()] for s in pair] for pair in steps]
            states = (everything(trainer) for trainer in (theirs, ours))
            found[name] = [norms, distances(*states)]
    return found


def distances(expected: dict, found: dict) -> dict[str, float]:
    """The relative difference of all weights together, and of all moments."""
    return {
        part: float(
            sum((a - b).double().square().sum() for a, b in pairs(expected[part], found[part]))
            / sum(a.double().square().sum() for a, _ in pairs(expected[part], expected[part]))
        )
        ** 0.5
        for part in ("weights", "moments")
    }


def pairs(first: object, second: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(first, torch.Tensor):
        yield first, second
    else:
        for key in first.keys() if isinstance(first, dict) else range(len(first)):
            yield from pairs(first[key], second[key])


def test_both_updates_do_the_same():
    for of_rank in launch("tests.distributed.test_optimizer_step:compare_updates", 2, ""):
        assert of_rank.keys() == LAYOUTS.keys()
        for layout, (norms, distance) in of_rank.items():
            for theirs, ours in norms:
                assert theirs[0] > CLIP_GRAD[layout], layout
                assert ours == pytest.approx(theirs, rel=1e-6), layout
            assert max(distance.values()) < 1e-6, (layout, distance)
