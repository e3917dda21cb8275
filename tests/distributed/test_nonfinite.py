"""A NaN that one rank makes: every rank leaves its state alone, and gives that rank the blame."""

from __future__ import annotations

import pytest
import torch

from megatron_coe.distributed.process_groups import parallel_groups
from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from tests.distributed.launch import launch
from tests.unit.training.planted import NanBackward, coe_layers, everything, nan_at, planted, same
from tests.unit.training.runs import make_settings, make_trainer, with_one_sync

LAYOUTS = {
    "data": {},
    "data, distributed optimizer": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "expert": {"expert_model_parallel_size": 2},
}
MODEL = {"num_moe_experts": 8}
BAD = 1


UPDATES = {"Megatron's": lambda trainer: trainer, "one sync": with_one_sync}


def plant_and_ask(update: str) -> dict[str, dict]:
    """Runs on each rank; the fault is in rank 1's experts, second iteration of its last layer."""
    results = {}
    for name, parallel in LAYOUTS.items():
        for way, change in (("forward", nan_at), ("backward", NanBackward.apply)):
            settings = make_settings(train={"global_batch_size": 4}, parallel=parallel, model=MODEL)
            with parallel_groups(settings.parallel):
                trainer = UPDATES[update](make_trainer(settings, torch.device("cpu")))
                trainer.step()
                before = everything(trainer)
                is_bad = torch.distributed.get_rank() == BAD
                experts = coe_layers(trainer)[-1].experts
                with planted(experts, change, lambda call, is_bad=is_bad: is_bad and call % 2):
                    try:
                        trainer.step()
                        report = "no report"
                    except NotFiniteError as error:
                        report = str(error)
                unchanged = same(everything(trainer), before)
                finite = trainer.step()
                results[f"{name}, {way}"] = [report, unchanged, finite.skipped]
    return results


@pytest.mark.parametrize("update", UPDATES)
def test_the_rank_that_made_it_is_named_by_all_and_nothing_changes(update: str):
    first, second = launch("tests.distributed.test_nonfinite:plant_and_ask", 2, update)
    assert len(first) == 2 * len(LAYOUTS)
    for case, (report, unchanged, skipped) in first.items():
        assert second[case] == [report, unchanged, skipped], case
        assert unchanged and skipped is None, case
        assert report.startswith("step 2 is not finite"), (case, report)
        assert f"first on rank {BAD} (" in report, (case, report)
        assert f"in the {case.split()[-1]} pass" in report, (case, report)
        assert "mlp.experts" in report and "(layer 2, iteration 2)" in report, (case, report)
        assert "training sequence" in report, (case, report)
