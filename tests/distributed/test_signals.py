"""A signal that reaches one rank stops all of them at the same step, and nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import torch

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.distributed.process_groups import parallel_groups
from megatron_coe.fault_tolerance.signals import StopRequest
from tests.distributed.launch import launch
from tests.unit.training.runs import Sequences, make_settings, make_trainer, weights

STEPS, GLOBAL_BATCH, STOP_STEP = 6, 4, 3
LAYOUTS = {
    "data": {},
    "data, distributed optimizer": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "pipeline": {"pipeline_model_parallel_size": 2},
}


class Interrupted(Sequences):
    """Signals its own process when the last sequence of a step is read."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if number == STOP_STEP * GLOBAL_BATCH - 1:
            signal.raise_signal(signal.SIGUSR1)
        return super().__getitem__(number)


def run(folder: str, parallel: dict, sequences: Sequences) -> tuple:
    """One start of the command: resumes, trains, and tells how it ended."""
    settings = make_settings(
        folder, train={"steps": STEPS, "global_batch_size": GLOBAL_BATCH}, parallel=parallel
    )
    with parallel_groups(settings.parallel):
        trainer = make_trainer(settings, torch.device("cpu"), sequences)
        if found := find_checkpoints(Path(folder)):
            trainer.progress = load_checkpoint(found[0], trainer.train_state)
        stop = StopRequest()
        with stop.listening():
            reason = trainer.run(stop)
        return stop.received, reason, trainer.progress.step, weights(trainer)


def interrupt_and_go_on(root: str) -> dict[str, dict]:
    """Runs on each rank; only rank 1 signals itself."""
    results = {}
    rank = torch.distributed.get_rank()
    for name, parallel in LAYOUTS.items():
        unbroken = run(f"{root}/{name}/unbroken", parallel, Sequences(1))
        broken = f"{root}/{name}/broken"
        *stopped, _ = run(broken, parallel, Interrupted(1) if rank else Sequences(1))
        resumed = run(broken, parallel, Sequences(1))
        results[name] = {
            "stopped": stopped,
            "resumed": resumed[:3],
            "equal": all(value.equal(unbroken[3][key]) for key, value in resumed[3].items()),
            "checkpoints": sorted(path.name for path in find_checkpoints(Path(broken))),
        }
    return results


def test_all_ranks_stop_where_one_is_signaled_and_resume_bitwise(tmp_path):
    ranks = launch("tests.distributed.test_signals:interrupt_and_go_on", 2, str(tmp_path))
    for rank, results in enumerate(ranks):
        for layout, result in results.items():
            received = signal.SIGUSR1 if rank == 1 else None
            assert result["stopped"] == [received, signal.SIGUSR1, STOP_STEP], layout
            assert result["resumed"] == [None, None, STEPS], layout
            assert result["checkpoints"] == ["step_00000003", "step_00000006"], layout
            assert result["equal"], layout
