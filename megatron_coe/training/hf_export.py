"""Checkpoints as Hugging Face folders while training continues, and the score of each.

A thread of rank 0 runs `coe convert` and `coe score` on a complete checkpoint, in processes of
their own on the host's processor, last in line for it. Training waits for neither: it only looks
after each step for what is done. A folder has its name when it is complete:

    <run>/hf/step_00000100/      a Hugging Face folder
    <run>/hf/.new/…              being written, or being deleted
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.config.run_config import CheckpointSettings, is_multiple
from megatron_coe.utils.fsynced import in_background
from megatron_coe.utils.metrics_file import Record
from megatron_coe.utils.run_files import EXPORTS_FOLDER, step_name, step_of

PACKAGE = Path(__file__).resolve().parents[1]
SCORE = "exact_match"
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_POLL_S = 0.2


class ExportError(Exception):
    """An export or its score that failed, in one line."""


@dataclass
class _Job:
    step: int
    checkpoint: Path
    done: Future[Record] | None = None


class HfExporter:
    """Exports a run's checkpoints, one after another. Rank 0's, but for `is_due`.

    One that becomes due while another is at work waits for it. Of several that wait the newest is
    made. Both keep their checkpoints from being deleted.

    Args:
        options: when to export, what to score, and how many folders to keep.
        run: its folder.
        last_step: of the run, exported too.
        log: prints a line.
    """

    def __init__(
        self,
        options: CheckpointSettings,
        run: Path,
        last_step: int,
        log: Callable[[str], None] = print,
    ) -> None:
        self.options, self.log = options, log
        self.failures = 0
        self._folder = run / EXPORTS_FOLDER
        self._new = self._folder / ".new"
        self._last_step = last_step
        self._job: _Job | None = None
        self._waiting: _Job | None = None
        self._process: subprocess.Popen[str] | None = None
        self._is_cancelled = False

    def is_due(self, step: int) -> bool:
        """Return whether the checkpoint of a step is exported: every interval, and the last."""
        interval = self.options.hf_interval
        is_end = step == self._last_step or is_multiple(step, interval)
        return interval > 0 and step > 0 and is_end

    def resume(self, step: int, has: Callable[[int, str], bool]) -> None:
        """Remove what an earlier start left incomplete, and export what it still owes.

        That is the newest checkpoint that was due, if its folder or its score is missing.

        Args:
            step: from which the run continues.
            has: whether a metric of a step is recorded.
        """
        shutil.rmtree(self._new, ignore_errors=True)
        assert self.options.save is not None
        for checkpoint in find_checkpoints(Path(self.options.save)):
            made = step_of(checkpoint) or 0
            if made <= step and self.is_due(made):
                is_scored = self.options.score_file is None or has(made, SCORE)
                if not (is_scored and (self._folder / step_name(made)).exists()):
                    self.offer(checkpoint, made)
                return

    @property
    def needed(self) -> list[Path]:
        """The checkpoints that must not be deleted yet."""
        return [job.checkpoint for job in (self._job, self._waiting) if job]

    def offer(self, checkpoint: Path, step: int) -> list[Path]:
        """Export a complete checkpoint, if it is due, as soon as the one before it is.

        Returns: the checkpoints that must not be deleted yet.
        """
        if self._is_cancelled or not self.is_due(step):
            return self.needed
        if self._waiting:
            self.log(
                f"warning: step {self._waiting.step} is not exported: step {step} takes its place, "
                "as an earlier export is still at work"
            )
        self._waiting = _Job(step, checkpoint)
        self._begin()
        return self.needed

    def results(self) -> Iterator[tuple[int, Record]]:
        """Yield step and metrics of the exports that are done by now, and begin the next."""
        job = self._job
        if job and job.done and job.done.done():
            self._job = None
            try:
                record = job.done.result()
            except Exception as error:  # whatever it is, training continues
                if self._is_cancelled:
                    self.log(f"the export of step {job.step} is left to the next start")
                else:
                    self.failures += 1
                    self.log(f"warning: the export of step {job.step} failed: {error}")
            else:
                self.log(f"exported step {job.step} to {self._folder / step_name(job.step)}")
                if record:
                    yield job.step, record
        self._begin()

    def finish(self, is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Record]]:
        """Wait for what is at work and for what waits, unless stopped; yield as `results`."""
        if self.needed and not self._is_cancelled:
            self.log(f"waiting for {len(self.needed)} export(s)")
        while self.needed:
            if is_stopped():
                self.cancel()
            yield from self.results()
            time.sleep(_POLL_S)

    def cancel(self) -> None:
        """End what is at work and forget what waits; the next start of the run makes it."""
        self._is_cancelled, self._waiting = True, None
        if process := self._process:
            process.terminate()

    # --- in the thread ----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._job is None and self._waiting and not self._is_cancelled:
            self._job, self._waiting = self._waiting, None
            self._job.done = in_background(self._export, self._job)

    def _export(self, job: _Job) -> Record:
        name = step_name(job.step)
        folder, new = self._folder / name, self._new / name
        try:
            self._new.mkdir(parents=True, exist_ok=True)
            self._run("convert", "to-hf", "--input", job.checkpoint, "--output", new)
            if folder.exists():  # of an earlier start
                folder.rename(self._new / f"{name}_before")
            new.rename(folder)
            record = self._score(folder) if self.options.score_file else {}
            self._prune()
            return record
        finally:
            shutil.rmtree(self._new, ignore_errors=True)

    def _score(self, folder: Path) -> Record:
        options = self.options
        limits: list[object] = ["--max-new-tokens", options.score_max_new_tokens]
        if options.score_samples is not None:
            limits += ["--samples", options.score_samples]
        asked = ("--model", folder, "--input", options.score_file, "--json", "--device", "cpu")
        try:
            return {SCORE: json.loads(self._run("score", *asked, *limits))[SCORE]}
        except ExportError as error:
            raise ExportError(f"the folder is complete, but has no score: {error}") from error

    def _prune(self) -> None:
        found = sorted(path for path in self._folder.glob("step_*") if step_of(path) is not None)
        for path in found[: -self.options.hf_keep_latest] if self.options.hf_keep_latest else ():
            path.rename(self._new / f"{path.name}_old")

    def _run(self, *arguments: object) -> str:
        """Run a command, and return what it prints. Raises: ExportError."""
        command = [sys.executable, "-m", "megatron_coe.cli.background", *map(str, arguments)]
        alive, our_end = os.pipe()  # its end tells the command that this process is gone
        try:
            self._process = process = subprocess.Popen(
                command,
                stdin=alive,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=_environment(),
                start_new_session=True,  # a signal to the run is none to it
            )
            if self._is_cancelled:
                process.terminate()
            printed, said = process.communicate()
        finally:
            os.close(alive)
            os.close(our_end)
        if process.returncode == 0:
            return printed
        lines = said.strip().splitlines() or [f"{arguments[0]} ended with {process.returncode}"]
        raise ExportError(lines[-1].removeprefix("error: "))


def _environment() -> dict[str, str]:
    """Return the environment of a process that is no rank, and leaves the GPUs to those."""
    found = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    paths = [str(PACKAGE.parent), *filter(None, [found.get("PYTHONPATH")])]
    return found | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
