"""A fixed few of the faults of `make test-faults`, and whether their harness can fail at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from tests.faults import hangs, kills, mutations, signals
from tests.faults.runs import REPO, Bench, checkpoints, differences, make_data, read_state, same
from tests.faults.table import Outcome, render, rows
from tests.zygote import shared


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Bench:
    work = tmp_path_factory.mktemp("faults") / "work"
    place = Bench(work, shared(), make_data(work / "data"), REPO)
    place.unbroken("one rank")
    return place


@pytest.fixture(scope="module")
def stage(runs) -> mutations.Stage:
    return mutations.Stage(runs)


ALONE = kills.Kill(seed=3, layout="one rank", inside=True, background=False, everyone=True, times=2)


@pytest.mark.parametrize(
    "case",
    [
        ALONE,
        replace(ALONE, seed=4, background=True),
        replace(ALONE, inside=False, layout="data parallel", everyone=False, times=1),
    ],
    ids=lambda case: case.kind,
)
def test_killed_runs_end_where_the_unbroken_one_does(runs, case):
    assert kills.run_case(runs, case).failures == ()


@pytest.mark.parametrize(
    "case",
    [
        signals.Signal(5, "data set", "SIGTERM", "one rank", everyone=True),
        signals.Signal(6, "save", "SIGUSR1", "expert parallel", everyone=False),
        signals.Signal(7, signals.BACKGROUND, "SIGINT", "one rank", everyone=True),
    ],
    ids=lambda case: f"{case.kind}, {case.signal}",
)
def test_signaled_runs_go_on_exactly(runs, case):
    assert signals.run_case(runs, case).failures == ()


OLDER, REFUSED = mutations.USED_OLDER, mutations.REFUSED


@pytest.mark.parametrize(
    "case",
    [
        mutations.Mutation(1, "flipped bits in", "shard", OLDER),
        mutations.Mutation(2, "zeros in", "shard", REFUSED),
        mutations.Mutation(3, mutations.UNLISTED, "shard", OLDER),
        mutations.Mutation(4, "cut short", "manifest.json", OLDER),
        mutations.Mutation(5, "both exchanged", "the checkpoint", REFUSED),
        mutations.Mutation(6, "path traversal", "latest", mutations.HARMLESS),
    ],
    ids=lambda case: f"{case.damage} {case.file}",
)
def test_damaged_checkpoints_are_noticed(runs, stage, case):
    assert mutations.run_case(runs, stage, case).failures == ()


def test_a_rank_that_dies_is_named_and_the_others_end(runs):
    case = hangs.Fault(hangs.KILLED, "killed", "data parallel", 1)
    assert hangs.run_case(runs, case).failures == ()


# --- the harness itself ---------------------------------------------------------------------------


def test_a_fork_is_what_the_command_itself_is(runs):
    """Same figures to the last bit, same state, same status, also of a mistake."""
    folder = runs.folder("real")
    with runs.start_really(folder) as launch:
        assert launch.wait() == [0], launch.complained()
    assert differences(folder, runs.unbroken("one rank")) == []
    for start in (runs.start, runs.start_really):
        with start(folder, "one rank", ["train.stpes=1"]) as launch:
            assert launch.wait() == [2]
            assert "did you mean 'steps'?" in launch.complained()
            assert len(launch.complained().splitlines()) == 1


def test_an_unverified_damage_is_missed(runs, stage):
    """With verification off a flipped bit goes unnoticed, and the row of the table turns red."""
    case = mutations.Mutation(
        1, "flipped bits in", "shard", OLDER, settings=("checkpoint.verify=false",)
    )
    outcome = mutations.run_case(runs, stage, case)
    assert outcome.failures
    (row,) = rows([outcome])
    assert (row.injected, row.caught) == (1, 0)
    assert "MISSED" in render([row])


def test_differences_of_one_bit_and_leftovers_are_seen(runs):
    unbroken = runs.unbroken("one rank")
    folder = runs.folder("copy")
    subprocess.run(["cp", "-r", str(unbroken / "run"), str(folder)], check=True)
    assert differences(folder, unbroken) == []
    (checkpoints(folder) / ".partial_step_00000009").mkdir()
    assert any("litter" in text for text in differences(folder, unbroken))
    metrics = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[4]["train_loss"] += 1e-15
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("steps [5]" in text for text in differences(folder, unbroken))
    state = read_state(checkpoints(folder) / "step_00000008")
    assert {"exp_avg", "exp_avg_sq"} <= {part for name in state for part in name.split(".")}
    assert any(name.startswith("rng") for name in state)
    assert state["common"]["progress"]["samples"] == 16
    one, other = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    assert same({"a": [one]}, {"a": [one.clone()]})
    assert not same({"a": [one]}, {"a": [other]}), "equal values, other bits"


def test_a_run_that_loses_its_state_is_missed(runs, monkeypatch):
    """One whose checkpoints go when it is killed starts again at step 0."""
    draw_kill = kills._kill

    def kill_and_forget(bench, case, folder, launch, draw):
        while kills.last_step(folder) < 3:
            time.sleep(0.01)
        killed = draw_kill(bench, case, folder, launch, draw)
        launch.wait()
        for path in checkpoints(folder).glob("*"):
            subprocess.run(["rm", "-r", str(path)], check=True)
        return killed

    monkeypatch.setattr(kills, "_kill", kill_and_forget)
    case = replace(ALONE, inside=False, times=1, seed=1)
    outcome = kills.run_case(runs, case)
    assert any("went on from step 0" in failure for failure in outcome.failures)


def test_nothing_outlives_a_harness_that_is_killed(tmp_path):
    """Its zygote sees the end of the pipe, and ends every run that it has started."""
    script = tmp_path / "endless.py"
    script.write_text("import time\nwhile True:\n    time.sleep(1)\n")
    code = (
        "import sys; from pathlib import Path; from tests.zygote import Zygote\n"
        "folder = Path(sys.argv[1])\n"
        "with Zygote(Path.cwd(), imports=()) as zygote:\n"
        "    process = zygote.start(folder / 'endless.py', [], folder, {})\n"
        "    print(zygote.pid, process.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    harness = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = list(map(int, harness.stdout.readline().split()))
    assert len(pids) == 2
    assert all(psutil.pid_exists(pid) for pid in pids)
    harness.send_signal(signal.SIGKILL)
    harness.communicate()
    deadline_s = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_table_counts_and_names():
    table = rows(
        [
            Outcome("a", "x", (), 1.0, ("in a save",)),
            Outcome("a", "y", ("lost",), 2.0, ("in a save",)),
            Outcome("b", "z"),
        ]
    )
    assert [(row.kind, row.injected, row.caught, row.detail) for row in table] == [
        ("a", 2, 1, "2 in a save"),
        ("b", 1, 1, ""),
    ]
    text = render(table)
    assert "| **all** | **3** | **2** |" in text
    assert "- MISSED a: y: lost" in text
