"""A save is whole or is not there, also in the background, and its failure is never lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections import namedtuple
from contextlib import contextmanager
from threading import Event

import pytest
import torch

from megatron_coe.checkpoint import shard_writer
from megatron_coe.checkpoint.assets import write_content
from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.errors import CheckpointWriteError
from megatron_coe.checkpoint.manifest import digest_folder, read_manifest, write_manifest
from megatron_coe.checkpoint.resume import latest_valid_checkpoint
from megatron_coe.checkpoint.state import load_checkpoint, state_size
from megatron_coe.checkpoint.verify import verify_checkpoint
from megatron_coe.utils import fsynced
from megatron_coe.utils.run_files import LATEST_FILE
from tests.unit.checkpoint.test_state import assert_same, optimizer_state
from tests.unit.training.runs import make_settings, make_trainer, weights

SMALL = {"num_layers": 1}


@pytest.fixture
def held(monkeypatch):
    """Writers wait for this event."""
    event, write = Event(), shard_writer.ShardFile.write

    def waiting(self, *args):
        assert event.wait(60)
        return write(self, *args)

    monkeypatch.setattr(shard_writer.ShardFile, "write", waiting)
    yield event
    event.set()


@pytest.mark.parametrize("distributed", [False, True])
def test_in_the_background_the_state_of_the_moment_is_saved(
    single_rank, tmp_path, held, distributed
):
    """Steps that follow before a byte is written change nothing of it."""
    settings = make_settings(
        tmp_path,
        checkpoint={"async_save": True},
        model={**SMALL, "coe_residual": "outer", "hidden_dropout": 0.2},
        parallel={"use_distributed_optimizer": distributed},
    )
    trainer = make_trainer(settings, single_rank)
    trainer.step()
    trainer.step()
    moment, moments = weights(trainer), optimizer_state(trainer)
    generator = torch.get_rng_state()
    trainer.save()
    later = [trainer.step().loss for _ in range(3)]
    trainer.checkpointer.poll()
    assert find_checkpoints(tmp_path) == [], "it has no name before it is whole"
    held.set()
    trainer.checkpointer.finish()
    (path,) = find_checkpoints(tmp_path)
    assert verify_checkpoint(path)["progress"]["step"] == 2

    again = make_trainer(settings, single_rank)
    again.progress = load_checkpoint(path, again.train_state)
    assert again.progress.step == 2
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(weights(again), moment)
    assert_same(optimizer_state(again), moments)
    assert [again.step().loss for _ in range(3)] == later
    assert_same(weights(again), weights(trainer))


def test_the_next_save_waits_for_the_one_before(single_rank, tmp_path, held):
    settings = make_settings(tmp_path, checkpoint={"async_save": True}, model=SMALL)
    trainer = make_trainer(settings, single_rank)
    trainer.step()
    trainer.save()
    held.set()
    trainer.step()
    trainer.save()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000001"]
    trainer.checkpointer.finish()
    names = ["step_00000002", "step_00000001"]
    assert [path.name for path in find_checkpoints(tmp_path)] == names


def test_a_run_ends_with_everything_saved(single_rank, tmp_path):
    settings = make_settings(
        tmp_path,
        checkpoint={"async_save": True, "save_interval": 2, "keep_latest": 9},
        model=SMALL,
        train={"steps": 5},
    )
    make_trainer(settings, single_rank).run()
    steps = [verify_checkpoint(path)["progress"]["step"] for path in find_checkpoints(tmp_path)]
    assert steps == [5, 4, 2]


@contextmanager
def largest_file(nbytes):
    """The system refuses to let a file grow beyond, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("nbytes", [0, 100, 10_000])
def test_a_write_that_fails_leaves_the_older_ones(single_rank, tmp_path, asynchronous, nbytes):
    settings = make_settings(tmp_path, checkpoint={"async_save": asynchronous}, model=SMALL)
    trainer = make_trainer(settings, single_rank)
    trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    (good,) = find_checkpoints(tmp_path)
    trainer.step()
    with (
        pytest.raises(CheckpointWriteError, match=r"step_00000002 was not written: rank 0 on .*"),
        largest_file(nbytes),
    ):
        trainer.save()
        trainer.checkpointer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST_FILE, good.name]
    verify_checkpoint(good)
    trainer.save()
    trainer.checkpointer.finish()
    assert len(find_checkpoints(tmp_path)) == 2, "the run could go on"


def test_a_failure_in_the_background_is_reported_at_the_next_step(single_rank, tmp_path, held):
    settings = make_settings(
        tmp_path,
        checkpoint={"async_save": True, "save_interval": 1},
        model=SMALL,
        train={"steps": 3},
    )
    trainer = make_trainer(settings, single_rank)
    with largest_file(100), pytest.raises(CheckpointWriteError):
        held.set()
        trainer.run()
    assert trainer.progress.step <= 2
    assert not list(tmp_path.iterdir())


def test_an_error_at_the_end_leaves_nothing_partial(single_rank, tmp_path, monkeypatch):
    """The data are written, the rename fails."""
    trainer = make_trainer(make_settings(tmp_path, model=SMALL), single_rank)
    trainer.step()

    def fail(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr("megatron_coe.checkpoint.directory.fsync", fail)
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        trainer.save()
    assert not list(tmp_path.iterdir())


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(
    single_rank, tmp_path, monkeypatch, capsys
):
    """Nor a pointer that cannot be replaced: the new checkpoint is complete, and that is said."""
    trainer = make_trainer(
        make_settings(tmp_path, model=SMALL, checkpoint={"keep_latest": 1}), single_rank
    )

    def refuse(path, *content):
        raise OSError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("megatron_coe.checkpoint.directory._remove", refuse)
        patch.setattr("megatron_coe.checkpoint.directory.replace_fsynced", refuse)
        for _ in range(2):
            trainer.step()
            trainer.save()
    told = capsys.readouterr().err.splitlines()
    new, old = find_checkpoints(tmp_path)
    assert len(told) == 3
    assert all("is complete" in line and "Operation not permitted" in line for line in told)
    assert str(new) in told[2] and str(old) in told[2] and "next save" in told[2]
    for path in (new, old):
        verify_checkpoint(path)
    trainer.step()
    trainer.save()
    (last,) = find_checkpoints(tmp_path)
    assert (tmp_path / LATEST_FILE).read_text() == f"{last.name}\n"
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_step(single_rank, tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings = make_settings(tmp_path / "file" / "checkpoints", model=SMALL)
    trainer = make_trainer(settings, single_rank)
    with pytest.raises(CheckpointWriteError, match=r"checkpoint\.save=.*file/checkpoints: rank 0"):
        trainer.checkpointer.prepare(trainer.train_state)


def test_a_disk_without_room_is_an_error_before_the_first_step(single_rank, tmp_path, monkeypatch):
    trainer = make_trainer(make_settings(tmp_path, model=SMALL), single_rank)
    usage = namedtuple("usage", "total used free")
    needed = state_size(trainer.train_state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed // 2))
    with pytest.raises(CheckpointWriteError, match=r"a checkpoint needs .* MB and the disk has"):
        trainer.checkpointer.prepare(trainer.train_state)
    monkeypatch.undo()
    trainer.checkpointer.prepare(trainer.train_state)
    trainer.save()
    (path,) = find_checkpoints(tmp_path)
    written = sum(file.stat().st_size for file in path.glob("*.distcp"))
    assert needed < written < 2 * needed + (1 << 20), "the estimate is of this state"


def test_a_real_disk_that_is_full(single_rank, tmp_path):
    """Room for one checkpoint, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        model = {**SMALL, "hidden_size": 64, "vocab_size": 512}
        settings = make_settings(disk / "checkpoints", model=model)
        trainer = make_trainer(settings, single_rank)
        trainer.checkpointer.prepare(trainer.train_state)
        trainer.step()
        trainer.save()
        trainer.step()
        with pytest.raises(CheckpointWriteError, match=r"the disk has|No space left"):
            trainer.save()
        (path,) = find_checkpoints(disk / "checkpoints")
        verify_checkpoint(path)
        assert path.name == "step_00000001"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("has_steps_left", [True, False])
def test_what_a_dead_run_left_is_cleared_away(single_rank, tmp_path, has_steps_left):
    trainer = make_trainer(make_settings(tmp_path, model=SMALL), single_rank)
    (tmp_path / ".partial_step_00000003").mkdir()
    (tmp_path / ".partial_step_00000003" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".removed_step_00000001").mkdir()
    trainer.checkpointer.prepare(trainer.train_state, has_steps_left)
    assert not list(tmp_path.iterdir())


def test_every_file_is_synced_before_the_name(single_rank, tmp_path, monkeypatch):
    """By the system's own account: no descriptor of a file is left out, and names come last."""
    synced = []
    fsync, rename = os.fsync, fsynced.Path.rename

    def noting(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renaming(self, target):
        synced.append(f"rename to {target.name}")
        return rename(self, target)

    trainer = make_trainer(make_settings(tmp_path, model=SMALL), single_rank)
    trainer.checkpointer.content = {"tokenizer/tokenizer.json": b"{}"}
    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(fsynced.Path, "rename", renaming)
    trainer.save()
    (path,) = find_checkpoints(tmp_path)
    named = synced.index(f"rename to {path.name}")
    files = {".metadata.tmp" if f.name == ".metadata" else f.name for f in path.rglob("*")}
    assert files <= set(synced[:named])
    assert synced[named - 2 : named] == ["manifest.json", f".partial_{path.name}"]
    assert synced[named + 1] == tmp_path.name


@pytest.mark.parametrize("reason", ["too new", "damaged"])
def test_what_the_run_could_not_load_takes_no_place(single_rank, tmp_path, reason):
    """The one it resumed from stays until there are others in its place."""
    settings = make_settings(tmp_path, checkpoint={"keep_latest": 2}, model=SMALL)
    earlier = make_trainer(settings, single_rank)
    for _ in range(2):
        earlier.step()
        earlier.save()
    newest, older = find_checkpoints(tmp_path)
    if reason == "too new":
        index = (newest / ".metadata").read_bytes()
        (newest / ".metadata").write_bytes(index.replace(b"TensorProp", b"NewerProps"))
        write_manifest(newest, 2, digest_folder(newest))
    else:
        spoiled = bytearray((newest / "__0_0.distcp").read_bytes())
        spoiled[len(spoiled) // 2] ^= 1
        (newest / "__0_0.distcp").write_bytes(spoiled)
    trainer = make_trainer(settings, single_rank)
    assert latest_valid_checkpoint(settings.checkpoint) == older
    trainer.progress = load_checkpoint(older, trainer.train_state)
    trainer.checkpointer.resume_from(older)
    kept = []
    for step in (3, 4):
        trainer.progress.step = step
        trainer.save()
        kept.append([int(path.name[-1]) for path in find_checkpoints(tmp_path)])
    assert kept == [[3, 2, 1], [4, 3]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_checkpoint_holds_the_runs_other_files(single_rank, tmp_path, asynchronous):
    """Of one that the run starts from, what it keeps of an imported model as well."""
    imported = tmp_path / "imported" / "step_00000000"
    content = {"tokenizer/tokenizer.json": b"old", "hf/config.json": b"{}"}
    write_content(imported, content)
    settings = make_settings(tmp_path, checkpoint={"async_save": asynchronous}, model=SMALL)
    trainer = make_trainer(settings, single_rank)
    trainer.checkpointer.content = {"tokenizer.model": b"pieces"}
    trainer.checkpointer.keep_hf_files_of(imported)
    for step in (1, 2):
        trainer.progress.step = step
        trainer.save()
    trainer.checkpointer.finish()
    for path in find_checkpoints(tmp_path):
        verify_checkpoint(path)
        assert (path / "tokenizer.model").read_bytes() == b"pieces"
        assert (path / "hf" / "config.json").read_bytes() == b"{}"
        assert not (path / "tokenizer").exists()
        listed = read_manifest(path).files
        assert {"tokenizer.model", "hf/config.json"} <= listed.keys()


@pytest.mark.parametrize("name", ["", "config.yaml", "tokenizer/tokenizer.json"])
def test_a_checkpoint_that_the_run_needs_is_never_deleted(single_rank, tmp_path, name):
    settings = make_settings(tmp_path, checkpoint={"keep_latest": 1}, model=SMALL)
    trainer = make_trainer(settings, single_rank)
    (tmp_path / "link").symlink_to(tmp_path / "step_00000001")
    trainer.checkpointer.needed = [tmp_path / "link" / name]
    kept = []
    for step in (1, 2, 3):
        trainer.progress.step = step
        trainer.save()
        kept.append([int(path.name[-1]) for path in find_checkpoints(tmp_path)])
    assert kept == [[1], [2, 1], [3, 1]]
