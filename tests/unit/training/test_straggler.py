"""The rank that the others wait for is named by its work, not by its waiting."""

from __future__ import annotations

import socket
import time

import pytest
import torch
import torch.distributed as dist

from megatron_coe.distributed.process_groups import parallel_groups
from megatron_coe.training.metrics_logger import NullLogger, console_line
from megatron_coe.training.straggler import CollectiveTimer, StragglerReport
from tests.distributed.launch import launch
from tests.unit.training.runs import make_settings, make_trainer

SLOW, DELAY_S, STEPS = 1, 0.25, 4
# Data-parallel ranks meet at a step's end only, those of the others in every layer.
LAYOUTS = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "expert": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
}


class Kept(NullLogger):
    is_enabled = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.records, self.lines = {}, []

    def record(self, step, values):
        self.records[step] = values

    def log(self, text):
        self.lines.append(text)


def slowed_run(parallel: dict) -> list[object]:
    """Train with one rank that is slower in the forward pass: seconds, medians, ranks, lines."""
    settings = make_settings(
        parallel=parallel, train={"steps": STEPS}, log={"interval": 1}, model={"num_moe_experts": 8}
    )
    kept = Kept(settings.log, STEPS)
    with parallel_groups(settings.parallel):
        trainer = make_trainer(settings, torch.device("cpu"), metrics_logger=kept)
        (chunk,) = trainer.train_state.chunks
        if dist.get_rank() == SLOW:
            chunk.register_forward_pre_hook(lambda *args: time.sleep(DELAY_S))
        trainer.run()
    records = [kept.records[step] for step in range(1, STEPS + 1)]
    return [records, kept.lines]


def slowed_runs() -> dict[str, list[object]]:
    """Runs on each rank."""
    return {name: slowed_run(layout) for name, layout in LAYOUTS.items()}


def test_the_slow_rank_is_named_though_the_other_one_waits():
    of_ranks = launch("tests.unit.training.test_straggler:slowed_runs", 2)
    for layout in LAYOUTS:
        for records, lines in (of_rank[layout] for of_rank in of_ranks):
            for record in records[1:]:  # the first meets what the machine has not seen yet
                assert record["slowest_rank"] == SLOW, layout
                slowed = DELAY_S * (4 if "tensor" in layout or "pipeline" in layout else 2)
                assert record["work_seconds"] > slowed, layout
                fast_s = 2 * record["work_seconds_median"] - record["work_seconds"]
                assert fast_s < record["work_seconds"] - 0.8 * slowed, layout
                assert record["work_seconds"] < record["step_seconds"] + 1e-9
                assert "slowest rank 1 x1." in console_line(record)
            (line,) = lines
            assert f"rank 1 ({socket.gethostname()}) is the slowest: it worked for " in line
            assert "the others wait for it" in line


def torch_own() -> dict[str, object]:
    return {**vars(dist.Work), **vars(dist.ProcessGroup)}


def test_only_the_steps_that_are_logged_are_timed(single_rank):
    settings = make_settings(train={"steps": 3}, log={"interval": 10}, model={"num_layers": 1})
    before = torch_own()
    trainer = make_trainer(settings, single_rank)
    metrics = trainer.metrics(trainer.step())
    assert 0 < metrics["work_seconds"] <= metrics["step_seconds"]
    assert metrics["work_seconds_median"] == metrics["work_seconds"]
    assert "slowest" not in console_line(metrics), "there is one rank"
    assert "work_seconds" not in trainer.metrics(trainer.step())
    assert torch_own() == before


def test_torch_gets_its_own_back_after_an_error(single_rank):
    before, timer = torch_own(), CollectiveTimer(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="in a step"), timer.timing():
        assert torch_own() != before
        dist.all_reduce(torch.ones(3))
        raise RuntimeError("in a step")
    assert torch_own() == before and timer.seconds() > 0
    dist.all_reduce(torch.ones(3))


def test_a_straggler_is_reported_once_when_it_stays_and_again_after_it_recovered():
    report = StragglerReport(["a", "b", "c"])

    def notice(step: int, rank: int, seconds: float) -> bool:
        record = {"work_seconds": seconds, "work_seconds_median": 1.0, "slowest_rank": rank}
        return report.notice(step, record) is not None

    assert not notice(1, 2, 3.0), "once may be chance"
    assert notice(2, 2, 3.0)
    assert not notice(3, 2, 3.0), "it was said"
    assert not notice(4, 1, 3.0) and notice(5, 1, 3.0), "another one"
    assert not notice(6, 1, 1.1), "it has recovered"
    assert not notice(7, 1, 3.0) and notice(8, 1, 3.0)
    said = StragglerReport(["a", "b", "c"])
    record = {"work_seconds": 1.5, "work_seconds_median": 1.0, "slowest_rank": 2}
    assert said.notice(1, record) is None
    assert "rank 2 (c) is the slowest: it worked for 1.5 s, 1.50 times" in said.notice(2, record)
