"""Run a test function on several real gloo ranks, each a process of its own, forked."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

from tests.zygote import Process, shared


class RankError(AssertionError):
    """One or more ranks failed; the message holds their tracebacks or their output."""


def launch(fn_path: str, world_size: int, *args: object, timeout_s: float = 240.0) -> list[object]:
    """Call ``fn_path`` on ``world_size`` ranks and return what each returned, by rank.

    Every rank has run ``megatron_coe.model.backends.prepare()`` and has a gloo default group
    (rendezvous through a file: no port). ``parallel_state`` is left to the function, so one launch
    can loop over layouts. No process outlives the call.

    Args:
        fn_path: ``"tests.distributed.test_x:function"``; must be importable from the repository.
        args: passed on; they and the results must survive JSON.
        timeout_s: wall time for all ranks together.

    Raises:
        RankError: a rank raised, died, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        (work / "args.json").write_text(json.dumps(args))
        ranks = []
        try:
            for rank in range(world_size):
                ranks.append(_start(work, fn_path, rank, world_size, timeout_s))
            _wait(ranks, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.end()
        return _collect(work, ranks)


def _start(work: Path, fn_path: str, rank: int, world_size: int, timeout_s: float) -> Process:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",  # gloo ranks are CPU ranks, also on a machine with GPUs
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    return shared().start(__file__, [work, fn_path, timeout_s], work, environment)


def _wait(ranks: list[Process], deadline: float) -> None:
    """Until all have ended, one has failed (the others would wait for it), or time is up."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):
            return
        if any(code not in (0, None) for code in codes):
            # Give the others a moment to report the same fault themselves.
            time.sleep(1.0)
            return
        time.sleep(0.05)


def _collect(work: Path, ranks: list[Process]) -> list[object]:
    results, faults = [], []
    for rank, process in enumerate(ranks):
        error, result = work / f"error{rank}", work / f"result{rank}.json"
        if error.exists():
            faults.append(f"--- rank {rank} raised\n{error.read_text()}")
        elif not result.exists():
            tail = (process.said() + process.complained())[-3000:]
            faults.append(f"--- rank {rank} gave no result (exit {process.returncode})\n{tail}")
        else:
            results.append(json.loads(result.read_text()))
    if faults:
        raise RankError("\n".join(faults))
    return results


def _run_rank(work: Path, fn_path: str, timeout_s: float) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        import torch

        from megatron_coe.model.backends import prepare

        prepare()
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{work / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        # A rank that is done at once would hang up on one that is still connecting.
        torch.distributed.barrier()
        module, _, name = fn_path.partition(":")
        function = getattr(importlib.import_module(module), name)
        result = function(*json.loads((work / "args.json").read_text()))
        partial = work / f"result{rank}.partial"
        partial.write_text(json.dumps(result))
        partial.rename(work / f"result{rank}.json")
        torch.distributed.destroy_process_group()
    except BaseException:
        (work / f"error{rank}").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
