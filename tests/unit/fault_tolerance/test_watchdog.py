"""Real ranks of which one hangs, is stopped, is killed or fails: all end soon, and it is named."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_coe.fault_tolerance.exceptions import NotFiniteError
from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR, NOT_WRITTEN, RANK_FAILURE
from megatron_coe.fault_tolerance.heartbeat import SAVING, STEP, Heartbeat
from megatron_coe.fault_tolerance.watchdog import (
    REPORTS_PER_TIMEOUT,
    SLOW_PHASE_FACTOR,
    group_timeout,
    watched,
)

RANKS, BAD, FAULTY_STEP, LAST_STEP = 3, 1, 3, 6
TIMEOUT_S = 4.0  # a busy machine may keep a rank waiting for a second
STARTING_STEP = 0


def hang() -> None:
    while True:
        time.sleep(0.01)


def fail() -> None:
    raise RuntimeError("planted")


def no_space() -> None:
    raise OSError(28, "No space left on device")


def mistake() -> None:
    raise ValueError("train.lr=0: planted")


def fail_together() -> None:
    raise NotFiniteError("planted", weights_are_finite=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def work(folder: Path, rank: int, step_of_fault: int, fault: Callable[[], None] | None) -> None:
    """A run of a rank: steps that all ranks make together."""
    heartbeat = Heartbeat()
    store = dist.FileStore(str(folder / "store"), RANKS)
    with watched(store, TIMEOUT_S, heartbeat, raised_together=(NotFiniteError,)):
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=RANKS, timeout=group_timeout(30)
        )
        for step in range(LAST_STEP + 1):
            if step:
                heartbeat.enter(SAVING if fault is no_space else STEP, step)
            if step == step_of_fault and fault and (rank == BAD or fault is fail_together):
                time.sleep(3 * TIMEOUT_S / REPORTS_PER_TIMEOUT)  # the others learn where it is
                fault()
            dist.all_reduce(torch.ones(1))
        if fault is None:  # the next rank is done long before this one, which is no fault of it
            time.sleep(0.4 * rank * TIMEOUT_S)
    dist.destroy_process_group()


def rank_process(folder: Path, rank: int, *arguments: object) -> int:
    """A fork of this process, which has all that a rank imports; its output goes to a file."""
    if process := os.fork():
        return process
    status = 99
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        output = os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 2)
        os.dup2(output, 1)
        work(folder, rank, *arguments)
        status = 0
    except ValueError:
        status = CONFIG_ERROR  # the command line says it
    except OSError:
        status = NOT_WRITTEN  # and this
    except Exception as error:
        status = getattr(error, "status", 98)
    finally:
        os._exit(status)


def run(
    folder: Path, fault: Callable[[], None] | None, step: int = FAULTY_STEP
) -> tuple[list[int | None], list[str]]:
    """Exit status (minus the signal) and output of each rank; None for one that has not ended."""
    processes = {r: rank_process(folder, r, step, fault) for r in range(RANKS)}
    statuses: list[int | None] = [None] * RANKS
    deadline = time.monotonic() + 60
    while processes and time.monotonic() < deadline:
        for rank, process in list(processes.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                del processes[rank]
        if fault is freeze and list(processes) == [BAD]:
            break
        time.sleep(0.02)
    for process in processes.values():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return statuses, [(folder / f"rank{rank}").read_text() for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (hang, RANK_FAILURE, "hangs in"),
        (freeze, None, "does not respond (died or stopped), last seen in"),
        (die, -signal.SIGKILL, "does not respond (died or stopped), last seen in"),
        (fail, RANK_FAILURE, "failed in"),
    ],
)
@pytest.mark.parametrize("step", [STARTING_STEP, FAULTY_STEP])
def test_every_rank_ends_and_the_bad_one_is_named(tmp_path, fault, status, said, step):
    if fault is hang and step == STARTING_STEP:
        pytest.skip("takes six times as long, by intention")
    statuses, outputs = run(tmp_path, fault, step)
    assert statuses == [RANK_FAILURE, status, RANK_FAILURE], outputs
    error = next(line for line in outputs[0].splitlines() if "pretrain_coe.py: error: " in line)
    assert f"error: rank {BAD} (" in error
    assert f"{said} {f'step {step}' if step else 'start-up'}" in error
    assert outputs[0].count("pretrain_coe.py: error: ") == 1
    assert "Traceback" not in outputs[0] + outputs[2], "their errors are but a consequence"
    if fault is hang:
        assert "in hang" in outputs[BAD] and "test_watchdog.py" in error, "its stack, and its line"
    if fault is fail:
        assert outputs[BAD].startswith("Traceback"), "its own error comes first"
        assert "RuntimeError: planted" in error


def test_a_run_that_ends_well_ends_with_0_however_far_apart(tmp_path):
    statuses, outputs = run(tmp_path, None)
    assert statuses == [0, 0, 0], outputs
    assert not any("error" in output for output in outputs)


def test_what_all_ranks_raise_together_is_theirs_to_print(tmp_path):
    statuses, outputs = run(tmp_path, fail_together)
    assert statuses == [NotFiniteError("", True).status] * RANKS, outputs
    assert not any("error" in output for output in outputs)


def test_a_mistake_of_one_rank_ends_all_as_a_mistake(tmp_path):
    statuses, outputs = run(tmp_path, mistake, STARTING_STEP)
    assert statuses == [CONFIG_ERROR] * RANKS, outputs
    assert "train.lr=0: planted" in outputs[0]
    assert not any("Traceback" in output for output in outputs)


def test_a_checkpoint_that_one_rank_cannot_write_ends_all(tmp_path):
    statuses, outputs = run(tmp_path, no_space)
    assert statuses == [NOT_WRITTEN] * RANKS, outputs
    assert "No space left on device" in outputs[0]


def test_groups_wait_longer_than_the_watchdog():
    assert group_timeout(0) is None
    assert group_timeout(10) > timedelta(seconds=SLOW_PHASE_FACTOR * 10)
