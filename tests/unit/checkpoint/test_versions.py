"""Checkpoints pass between versions of torch and Megatron-Core, or are refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from megatron.core import __version__ as MEGATRON_VERSION
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import TensorProperties

import megatron_coe
from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.errors import BadCheckpointError, NewerCheckpointError
from megatron_coe.checkpoint.manifest import digest_folder, write_manifest
from megatron_coe.checkpoint.resume import latest_valid_checkpoint
from megatron_coe.checkpoint.safe_unpickle import INDEX_FILE, read_index
from megatron_coe.checkpoint.state import load_checkpoint, run_state
from megatron_coe.checkpoint.verify import is_loadable, verify_checkpoint
from megatron_coe.checkpoint.versions import VERSIONS_FILE, read_versions, unreadable_error
from megatron_coe.config.run_config import CheckpointSettings
from megatron_coe.utils.run_files import CONFIG_FILE
from tests import saved_checkpoints
from tests.unit.training.runs import make_trainer

OTHER_PYTHON = "OTHER_PYTHON"
"""Names an interpreter with other versions of torch or Megatron-Core."""


@pytest.fixture(params=saved_checkpoints.NAMES)
def folder(request, tmp_path):
    """A copy of the checkpoint that other versions saved, and of what is expected of it."""
    return shutil.copytree(saved_checkpoints.DATA / request.param, tmp_path / "checkpoints")


def forge_index(checkpoint, monkeypatch, extra: tuple[object, ...]) -> None:
    """Write the index as a torch would whose tensors have more properties, and fit the manifest."""
    index = read_index(checkpoint)
    original = TensorProperties.__getstate__
    with monkeypatch.context() as patch:
        patch.setattr(TensorProperties, "__getstate__", lambda self: (*original(self), *extra))
        (checkpoint / INDEX_FILE).write_bytes(pickle.dumps(index))
    rewrite_manifest(checkpoint)


def say_written_by(checkpoint, **versions: str) -> None:
    path = checkpoint / VERSIONS_FILE
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    rewrite_manifest(checkpoint)


def rewrite_manifest(checkpoint) -> None:
    write_manifest(checkpoint, saved_checkpoints.STEP, digest_folder(checkpoint))


def test_checkpoints_of_other_versions_come_back_to_the_bit(single_rank, folder):
    """Weights, moments, RNG states and exported tensors; the next loss to 1e-5."""
    assert saved_checkpoints.load(folder) == []


def test_the_kept_checkpoints_are_what_their_names_say():
    versions = {}
    for name in saved_checkpoints.NAMES:
        (checkpoint,) = find_checkpoints(saved_checkpoints.DATA / name)
        versions[name] = read_versions(checkpoint)
    assert versions["core-0.16.1"]["megatron-core"] == "0.16.1"
    assert versions["core-0.19.2"]["megatron-core"] == "0.19.2"
    assert versions["torch-2.15.0"]["torch"] == "2.15.0+cu132"
    # What torch before 2.15 cannot unpickle: the sixth entry, strides.
    (checkpoint,) = find_checkpoints(saved_checkpoints.DATA / "torch-2.15.0")
    if len(TensorProperties().__getstate__()) < 6:
        with pytest.raises(ValueError, match="too many values to unpack"):
            pickle.loads((checkpoint / INDEX_FILE).read_bytes())


def test_a_changed_tensor_is_noticed(single_rank, folder):
    """The comparison itself: another expectation is not met."""
    path = folder / saved_checkpoints.EXPECTED_FILE
    expected = json.loads(path.read_text())
    for part in ("state", "export"):
        name = next(iter(expected[part]))
        expected[part][name] = "0" * 64
    expected["next_loss"] *= 1.001
    path.write_text(json.dumps(expected))
    assert len(saved_checkpoints.load(folder)) == 3


@pytest.mark.skipif(OTHER_PYTHON not in os.environ, reason=f"{OTHER_PYTHON} names no interpreter")
@pytest.mark.parametrize("direction", ["to the other", "from the other"])
def test_another_interpreter_loads_and_saves(tmp_path, direction):
    """The same with both interpreters at hand, whatever versions they have."""
    both = [sys.executable, os.environ[OTHER_PYTHON]]
    writer, reader = both if direction == "to the other" else reversed(both)
    for python, action in ((writer, "save"), (reader, "load")):
        command = [python, "-m", "tests.saved_checkpoints", action, str(tmp_path / "folder")]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_is_saved_says_what_wrote_it(single_rank, tmp_path):
    trainer = make_trainer(saved_checkpoints.settings(), single_rank)
    trainer.checkpointer.options = CheckpointSettings(save=str(tmp_path))
    trainer.save()
    (checkpoint,) = find_checkpoints(tmp_path)
    versions = json.loads((checkpoint / VERSIONS_FILE).read_text())
    assert versions == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron-core": MEGATRON_VERSION,
        "megatron-coe": megatron_coe.__version__,
    }
    # Read by either line of Megatron-Core, and by this project before it had two.
    assert json.loads((checkpoint / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
    }
    (checkpoint / VERSIONS_FILE).write_text("{}")
    with pytest.raises(BadCheckpointError, match=r"versions\.json has 2 bytes"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("form", ["0.16", "0.19"])
def test_both_forms_of_the_format_file_are_read(single_rank, folder, form):
    (checkpoint,) = find_checkpoints(folder)
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if form == "0.16":
        content |= {"common_backend": "torch", "common_backend_version": 1}
    (checkpoint / "metadata.json").write_text(json.dumps(content))
    rewrite_manifest(checkpoint)
    assert saved_checkpoints.load(folder) == []


def test_what_megatron_saves_by_itself_is_read(single_rank, tmp_path):
    """0.19 keeps the common values in the shards, 0.16 in `common.pt`."""
    trainer = make_trainer(saved_checkpoints.settings(), single_rank)
    for _ in range(saved_checkpoints.STEP):
        trainer.step()
    checkpoint = tmp_path / "step_00000002"
    checkpoint.mkdir()
    dist_checkpointing.save(run_state(trainer.train_state, trainer.progress), str(checkpoint))
    assert (checkpoint / "common.pt").exists() == MEGATRON_VERSION.startswith("0.16.")
    (checkpoint / CONFIG_FILE).write_text(trainer.checkpointer.config)
    write_manifest(checkpoint, saved_checkpoints.STEP, digest_folder(checkpoint))
    expected = saved_checkpoints.state_digests(trainer)
    other = make_trainer(saved_checkpoints.settings(), single_rank)
    path = latest_valid_checkpoint(CheckpointSettings(save=str(tmp_path)))
    other.progress = load_checkpoint(path, other.train_state)
    assert other.progress == trainer.progress
    assert saved_checkpoints.state_digests(other) == expected


def test_a_checkpoint_of_newer_software_is_not_called_damaged(folder, monkeypatch, single_rank):
    (checkpoint,) = find_checkpoints(folder)
    forge_index(checkpoint, monkeypatch, extra=(None, None, None))
    say_written_by(checkpoint, torch="99.1.0+cu999", megatron_core="98.0")
    with pytest.raises(NewerCheckpointError) as caught:
        verify_checkpoint(checkpoint)
    text = str(caught.value)
    assert text.startswith(f"torch {torch.__version__}, megatron-core {MEGATRON_VERSION}, ")
    assert "cannot read what torch 99.1.0+cu999, megatron-core 98.0, " in text
    assert "install torch 99.1.0 and megatron-core 98.0 or newer, or resume from an earlier" in text
    assert "damaged" not in text
    assert not is_loadable(checkpoint)


def test_damage_is_damage_whoever_wrote_it(folder):
    (checkpoint,) = find_checkpoints(folder)
    say_written_by(checkpoint, torch="99.1.0")
    content = bytearray((checkpoint / INDEX_FILE).read_bytes())
    content[len(content) // 2] ^= 4
    (checkpoint / INDEX_FILE).write_bytes(content)
    for part in range(9):  # whichever part of the files a rank compares
        with pytest.raises(BadCheckpointError, match=r"of \.metadata is not the one"):
            verify_checkpoint(checkpoint, part=part, parts=9)


def test_newer_software_that_can_be_read_is(folder, single_rank):
    """Versions alone refuse nothing."""
    (checkpoint,) = find_checkpoints(folder)
    say_written_by(checkpoint, torch="99.1.0", megatron_core="98.0", megatron_coe="97.0")
    assert saved_checkpoints.load(folder) == []


@pytest.mark.parametrize(
    ("torch_version", "is_newer"),
    [("99.0", True), (torch.__version__.split("+")[0] + "+zzz", False), ("0.1", False), ("x", 0)],
)
def test_only_newer_software_explains_a_failure(tmp_path, torch_version, is_newer):
    """The name of a build says nothing about its age."""
    (tmp_path / VERSIONS_FILE).write_text(json.dumps({"torch": torch_version}))
    error = BadCheckpointError("reason")
    explained = unreadable_error(tmp_path, error)
    assert isinstance(explained, NewerCheckpointError) == bool(is_newer)
    assert "reason" in str(explained)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"torch": 3}', "[" * 100_000])
def test_nonsense_says_nothing_of_the_writer(tmp_path, content):
    (tmp_path / VERSIONS_FILE).write_text(content)
    assert read_versions(tmp_path) == {}
    error = BadCheckpointError("reason")
    assert unreadable_error(tmp_path, error) is error


def test_the_older_one_is_used_and_the_newer_named(folder, monkeypatch, single_rank, capfd):
    (checkpoint,) = find_checkpoints(folder)
    newer = shutil.copytree(checkpoint, folder / "step_00000003")
    forge_index(newer, monkeypatch, extra=(None, None, None))
    say_written_by(newer, torch="99.1.0")
    assert latest_valid_checkpoint(CheckpointSettings(save=str(folder))) == checkpoint
    lines = capfd.readouterr().err.splitlines()
    assert f"checkpoint {newer} is too new and not used: torch {torch.__version__}" in lines[-1]
