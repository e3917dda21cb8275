"""Exports beside the training: which are made, what is kept, and what of them is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_coe.config.run_config import CheckpointSettings
from megatron_coe.training.hf_export import ExportError, HfExporter
from megatron_coe.utils.run_files import step_name

REPO = Path(__file__).parents[3]
SAVED = REPO / "tests/data/core-0.16.1/step_00000002"


class Held(HfExporter):
    """Makes a folder when it is let, instead of running commands."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments, lambda text: self.lines.append(text))
        self.lines, self.made, self.go = [], [], threading.Semaphore(0)

    def _run(self, *arguments):
        self.go.acquire()
        if self._is_cancelled:
            raise ExportError("cancelled")
        self.made.append(arguments[0])
        if arguments[0] == "score":
            return '{"exact_match": 0.25}'
        arguments[-1].mkdir()
        return ""


def exporter(folder: Path, **options) -> Held:
    (folder / "checkpoints").mkdir(exist_ok=True)
    options = {"hf_interval": 10, "score_file": "q.jsonl", **options}
    settings = CheckpointSettings(save=str(folder / "checkpoints"), **options)
    return Held(settings, folder, 45)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / step_name(step)
    path.mkdir(parents=True, exist_ok=True)
    return path


def results(found: HfExporter) -> list:
    """Of the export at work, once it is done."""
    while not found._job.done.done():
        time.sleep(0.01)
    return list(found.results())


def test_of_those_that_wait_the_newest_is_made_and_all_keep_their_checkpoints(tmp_path):
    found = exporter(tmp_path)
    paths = {step: checkpoint(tmp_path, step) for step in (5, 10, 20, 30, 45)}
    assert found.offer(paths[5], 5) == [], "not due"
    assert found.offer(paths[10], 10) == [paths[10]]
    assert found.offer(paths[20], 20) == [paths[10], paths[20]]
    assert found.offer(paths[30], 30) == [paths[10], paths[30]]
    (line,) = found.lines
    assert line.startswith("warning: step 20 is not exported: step 30 takes its place")
    assert list(found.results()) == [], "nothing waits for an export"
    found.go.release(2)
    assert results(found) == [(10, {"exact_match": 0.25})]
    assert found.needed == [paths[30]]
    assert found.offer(paths[45], 45) == [paths[30], paths[45]], "the last step is due"
    found.go.release(4)
    assert list(found.finish(lambda: False)) == [(s, {"exact_match": 0.25}) for s in (30, 45)]
    assert found.needed == [] and found.failures == 0
    made = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert made == [step_name(step) for step in (10, 30, 45)]


def test_what_is_cancelled_leaves_nothing_and_is_made_by_the_next_start(tmp_path):
    found = exporter(tmp_path)
    found.offer(checkpoint(tmp_path, 10), 10)
    found.offer(checkpoint(tmp_path, 20), 20)
    found.cancel()
    assert found.offer(checkpoint(tmp_path, 30), 30) == [checkpoint(tmp_path, 10)]
    (tmp_path / "checkpoints" / step_name(30)).rmdir()
    found.go.release()
    assert list(found.finish(lambda: True)) == []
    assert found.lines == ["the export of step 10 is left to the next start"]
    assert found.failures == 0
    assert list((tmp_path / "hf").iterdir()) == []

    (tmp_path / "hf" / ".new" / step_name(10)).mkdir(parents=True)  # of a killed run
    scores = {}
    again = exporter(tmp_path)
    again.resume(27, lambda step, name: (step, name) in scores)
    assert again.needed == [checkpoint(tmp_path, 20)], "the newest that was due"
    again.go.release(2)
    assert results(again) == [(20, {"exact_match": 0.25})]
    assert [path.name for path in (tmp_path / "hf").iterdir()] == [step_name(20)]

    last = exporter(tmp_path)
    last.resume(27, lambda step, name: True)
    assert last.needed == [], "it is there, and its score is"
    last.resume(27, lambda step, name: False)
    assert last.needed == [checkpoint(tmp_path, 20)], "its score is missing"
    last.cancel()
    last.go.release()
    list(last.finish(lambda: False))
    last = exporter(tmp_path)
    last.resume(19, lambda step, name: False)
    assert last.needed == [checkpoint(tmp_path, 10)], "a later one was found bad"
    last.cancel()
    last.go.release()


def test_the_newest_folders_are_kept_and_one_made_again_is_replaced(tmp_path):
    found = exporter(tmp_path, hf_keep_latest=2, score_file=None)
    for step in (10, 20, 30, 40):
        found.go.release()
        found.offer(checkpoint(tmp_path, step), step)
        assert results(found) == [], "there is no score"
    kept = [tmp_path / "hf" / step_name(step) for step in (30, 40)]
    assert sorted((tmp_path / "hf").iterdir()) == kept
    (kept[1] / "old").touch()
    found.go.release()
    found.offer(checkpoint(tmp_path, 40), 40)
    assert results(found) == []
    assert sorted((tmp_path / "hf").iterdir()) == kept
    assert list(kept[1].iterdir()) == []


def test_a_failure_is_told_and_counted(tmp_path):
    found = exporter(tmp_path)
    (tmp_path / "hf").write_text("in the way")
    found.offer(checkpoint(tmp_path, 10), 10)
    assert results(found) == []
    (line,) = found.lines
    assert line.startswith("warning: the export of step 10 failed: ") and "hf" in line
    assert found.failures == 1


def test_what_a_command_says_is_the_reason(tmp_path):
    """A real process: the checkpoint it is given is none."""
    lines = []
    settings = CheckpointSettings(save=str(tmp_path), hf_interval=10)
    found = HfExporter(settings, tmp_path, 10, lines.append)
    found.offer(tmp_path / "nothing", 10)
    assert list(found.finish(lambda: False)) == []
    expected = f"{tmp_path / 'nothing'}: neither a checkpoint nor a folder of checkpoints"
    assert lines[-1] == f"warning: the export of step 10 failed: {expected}"
    assert list((tmp_path / "hf").iterdir()) == []


def test_a_command_is_in_nobodys_way_and_ends_with_the_run_that_has_started_it(tmp_path):
    """Its standard input ends when that is killed; nothing half written stays."""
    command = ("convert", "to-hf", "--input", str(SAVED), "--output", str(tmp_path / "model"))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_coe.cli.background", *command],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    deadline = time.monotonic() + 60
    while psutil.Process(process.pid).nice() < 19 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert psutil.Process(process.pid).nice() == 19, "last in line for the processor"
    process.stdin.close()
    assert process.wait(120) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interval", [0, 20])
def test_without_an_interval_nothing_is_due(tmp_path, interval):
    found = exporter(tmp_path, hf_interval=interval)
    assert [step for step in range(46) if step and found.is_due(step)] == (
        [20, 40, 45] if interval else []
    )
