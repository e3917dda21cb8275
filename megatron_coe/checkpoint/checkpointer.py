"""Writing the checkpoints of a run, at once or in the background, each whole or not at all.

A checkpoint is written under another name, every file fsynced, hashed and listed in a manifest, and
renamed last. If anything fails on any rank, all ranks raise the same `CheckpointWriteError`,
nothing partial is left, and earlier checkpoints are untouched.

In the background (`checkpoint.async_save`) a thread writes copies of the state during the next
steps; what ranks do together (the index, the rename) waits for the end of a step. It is a thread,
because a process forked from a rank would hold its connections open, and keep writing, after the
rank is killed.
"""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from megatron_coe.checkpoint import directory as folders
from megatron_coe.checkpoint.assets import hf_content, write_content
from megatron_coe.checkpoint.collective import write_on_all_ranks
from megatron_coe.checkpoint.errors import CheckpointWriteError
from megatron_coe.checkpoint.manifest import write_manifest
from megatron_coe.checkpoint.safe_unpickle import FORMAT, INDEX_FILE
from megatron_coe.checkpoint.shard_writer import ShardPlan, Written
from megatron_coe.checkpoint.state import Progress, run_state, state_size
from megatron_coe.checkpoint.verify import is_loadable
from megatron_coe.checkpoint.versions import VERSIONS_FILE, versions_text
from megatron_coe.config.run_config import CheckpointSettings, is_multiple
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.utils.fsynced import digest_of, in_background, write_fsynced
from megatron_coe.utils.ranks import is_rank_0
from megatron_coe.utils.run_files import COMMON_FILE, CONFIG_FILE, FORMAT_FILE, step_name, step_of


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    plan: ShardPlan
    written: Future[Written]
    small_files: dict[str, bytes]
    device: torch.device


class Checkpointer:
    """Writes the checkpoints of a run; its methods are collectives of all ranks.

    Every method raises CheckpointWriteError, on all ranks, for a checkpoint that cannot be written.

    Args:
        options: where and how to write, and which to keep; without a folder nothing is written.
        config: the run's resolved settings as YAML.
        tokenizer: what identifies the tokenizer.
        data: what identifies each training set.
        content: further files of every checkpoint by name, on rank 0, which writes them.
        needed: files that the run reads; a checkpoint that holds one is never deleted.
    """

    def __init__(
        self,
        options: CheckpointSettings,
        config: str,
        tokenizer: dict[str, Any] | None = None,
        data: list[dict[str, Any]] | None = None,
        content: Mapping[str, bytes] | None = None,
        needed: Collection[Path] = (),
    ) -> None:
        self.options = options
        self.config = config
        self.tokenizer = tokenizer
        self.data = data
        self.content = dict(content or {})
        self.needed = needed
        self.on_complete: Callable[[Path, int], Collection[Path]] = lambda checkpoint, step: ()
        """Told of every complete checkpoint, on rank 0; returns those that must not be deleted."""
        self._pending: _Pending | None = None
        self._resumed_from: int | None = None
        self._loadable: dict[Path, bool] = {}

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether a checkpoint is written after a step: every interval, and at the end."""
        return step == last_step or is_multiple(step, self.options.save_interval)

    def resume_from(self, checkpoint: Path) -> None:
        """Note the checkpoint that the run resumes from: no later one was valid."""
        self._resumed_from = step_of(checkpoint)
        self._loadable[checkpoint] = True

    def keep_hf_files_of(self, checkpoint: Path) -> None:
        """Write the Hugging Face files of an imported model, which a checkpoint has, to all."""
        if is_rank_0():
            self.content = {**hf_content(checkpoint), **self.content}

    def prepare(self, train_state: TrainState, saves: bool = True) -> None:
        """Remove leftovers of an earlier run, and check that a checkpoint can be written.

        To be called before the first step: each rank writes a file, and the disk must have room
        for one checkpoint.

        Args:
            saves: whether there are steps to be saved.
        """
        if self.options.save is None:
            return
        folder, what = Path(self.options.save), f"checkpoint.save={self.options.save}"
        if not saves:
            write_on_all_ranks(what, partial(_on_rank_0, folders.remove_leftovers, folder))
            return
        needed = _sum(state_size(train_state) + self._content_size(), _device(train_state))
        write_on_all_ranks(what, partial(_on_rank_0, _prepare_folder, folder, needed))
        write_on_all_ranks(what, partial(_probe, folder / f".probe_{dist.get_rank()}"))

    def save(self, train_state: TrainState, progress: Progress) -> None:
        """Write the present state, or start writing it; an earlier save is completed first."""
        self.finish()
        if self.options.save is None:
            return
        target = folders.partial_folder(Path(self.options.save), progress.step)
        self._together(progress.step, partial(_on_rank_0, _create_partial, target))
        shared, common = save_preprocess(
            run_state(train_state, progress, self.tokenizer, self.data)
        )
        plan = ShardPlan(shared, target)
        needed = _sum(plan.nbytes + self._content_size(), _device(train_state))
        self._together(progress.step, partial(_on_rank_0, _require_room, target, needed))
        if self.options.async_save:
            self._together(progress.step, plan.take_copy)
        self._pending = _Pending(
            progress.step,
            plan,
            in_background(plan.write, hashed=self.options.verify),
            {
                COMMON_FILE: _serialize(common),
                CONFIG_FILE: self.config.encode(),
                FORMAT_FILE: json.dumps(FORMAT).encode(),
                VERSIONS_FILE: versions_text().encode(),
                **self.content,
            },
            _device(train_state),
        )
        if not self.options.async_save:
            self.finish()

    @property
    def is_pending(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._pending is not None

    def poll(self) -> None:
        """Complete the checkpoint in the background, if all ranks have written theirs."""
        if self._pending is not None:
            done = torch.tensor(int(self._pending.written.done()), device=self._pending.device)
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done:
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and complete it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        share = self._together(pending.step, pending.written.result)
        shares = [Written()] * dist.get_world_size() if is_rank_0() else None
        dist.gather_object(share, shares)
        self._together(pending.step, partial(_on_rank_0, self._complete, pending, shares))

    def _content_size(self) -> int:
        """Return the bytes of the further files that this rank writes."""
        return sum(map(len, self.content.values()))

    def _complete(self, pending: _Pending, shares: list[Written]) -> None:
        """Write what rank 0 alone writes of a checkpoint, and give it its name."""
        pending.plan.write_index(shares)
        target, step, options = pending.plan.folder, pending.step, self.options
        files = {name: digests for share in shares for name, digests in share.files.items()}
        files |= write_content(target, pending.small_files)
        if options.verify:
            files[INDEX_FILE] = digest_of(target / INDEX_FILE)
            write_manifest(target, step, files)
        self._update_and_prune(folders.publish(target.parent, step), step)

    def _update_and_prune(self, checkpoint: Path, step: int) -> None:
        """Update `latest` and delete old checkpoints; a failure is printed and ends nothing.

        The next save tries again. If the disk fills up meanwhile, that save fails.
        """
        errors: list[OSError] = []
        try:
            folders.update_latest(checkpoint)
        except OSError as failure:
            errors.append(failure)
        self._loadable[checkpoint] = True
        errors += folders.prune(
            checkpoint.parent,
            step,
            self.options.keep_latest,
            self.options.keep_every,
            self._is_loadable,
            [*self.needed, *self.on_complete(checkpoint, step)],
        )
        for error in errors:
            print(
                f"{checkpoint} is complete, but {error.filename or checkpoint.parent} could not be "
                f"changed or deleted ({error.strerror or error}): the next save tries again",
                file=sys.stderr,
                flush=True,
            )

    def _is_loadable(self, checkpoint: Path) -> bool:
        """Return whether this run could load a checkpoint; each is checked once."""
        if checkpoint not in self._loadable:
            step, last = step_of(checkpoint), self._resumed_from
            was_refused = step is not None and last is not None and step > last
            self._loadable[checkpoint] = not was_refused and is_loadable(checkpoint)
        return self._loadable[checkpoint]

    def _together(self, step: int, action: Callable[[], Any]) -> Any:
        """Call `write_on_all_ranks`, and delete the partial checkpoint if it fails."""
        assert self.options.save is not None
        folder = Path(self.options.save)
        try:
            return write_on_all_ranks(f"{folder / step_name(step)} was not written", action)
        except CheckpointWriteError:
            if is_rank_0():
                shutil.rmtree(folders.partial_folder(folder, step), ignore_errors=True)
            raise


def _on_rank_0(action: Callable[..., None], *args: object) -> None:
    if is_rank_0():
        action(*args)


def _prepare_folder(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folders.remove_leftovers(folder)
    _require_room(folder, needed)


def _create_partial(partial_folder: Path) -> None:
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)


def _require_room(folder: Path, needed: int) -> None:
    """Check the disk's room for `needed` bytes of tensors and for the rest. Raises: OSError."""
    needed += needed // 100 + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"a checkpoint needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB"
        raise OSError(errno.ENOSPC, f"{reason} left: free some, or lower checkpoint.keep_latest")


def _probe(path: Path) -> None:
    try:
        write_fsynced(path, b"probe")
    finally:
        path.unlink(missing_ok=True)


def _serialize(common: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(common, file)
    return file.getvalue()


def _device(train_state: TrainState) -> torch.device:
    return next(train_state.chunks[0].parameters()).device


def _sum(count: int, device: torch.device) -> int:
    total = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)
