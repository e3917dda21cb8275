"""The latest valid checkpoint is found, whatever happened to the others; nothing is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.manifest import (
    MANIFEST_FILE,
    digest_folder,
    read_manifest,
    write_manifest,
)
from megatron_coe.checkpoint.resume import Start, latest_valid_checkpoint, select_start
from megatron_coe.checkpoint.safe_unpickle import read_index
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.checkpoint.versions import VERSIONS_FILE
from megatron_coe.config.run_config import CheckpointSettings
from megatron_coe.utils.fsynced import ALGORITHMS, DIGEST
from megatron_coe.utils.run_files import LATEST_FILE
from tests.unit.training.runs import make_settings, make_trainer

STEPS = (1, 2)


@pytest.fixture(scope="module")
def trainer(single_rank):
    return make_trainer(make_settings(model={"num_layers": 1}), single_rank)


@pytest.fixture(scope="module")
def originals(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    trainer.checkpointer.options = CheckpointSettings(save=str(folder))
    for _ in STEPS:
        trainer.step()
        trainer.save()
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "checkpoints")


def choose(folder, **options):
    return latest_valid_checkpoint(CheckpointSettings(save=str(folder), **options))


def names_of_files() -> list[str]:
    shards = ["__0_0.distcp", "__0_1.distcp"]
    megatrons = [".metadata", "common.pt", "metadata.json"]
    return [*shards, *megatrons, "config.yaml", VERSIONS_FILE, MANIFEST_FILE]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def grow(path):
    path.write_bytes(path.read_bytes() + b" ")


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def as_folder(path):
    path.unlink()
    path.mkdir()


def test_the_newest_is_chosen(folder, capfd):
    assert choose(folder) == folder / "step_00000002"
    assert capfd.readouterr().err == ""


def test_the_files_of_a_checkpoint(folder):
    for path in find_checkpoints(folder):
        assert sorted(file.name for file in path.iterdir()) == sorted(names_of_files())


@pytest.mark.parametrize("damage", [cut, flip, grow, empty, remove, as_folder])
@pytest.mark.parametrize("name", names_of_files())
def test_damage_is_named_and_the_one_before_is_used(folder, capfd, name, damage):
    newest, older = find_checkpoints(folder)
    damage(newest / name)
    assert choose(folder) == older
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {newest} is bad and not used: ")
    assert name in line
    damage(older / name)
    with pytest.raises(ValueError, match=r"none of its 2 checkpoints is valid"):
        choose(folder)
    assert len(capfd.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("name", names_of_files())
def test_a_file_of_another_checkpoint_is_noticed(folder, name):
    newest, older = find_checkpoints(folder)
    if (newest / name).read_bytes() == (older / name).read_bytes():
        assert name in (".metadata", "metadata.json", "config.yaml", VERSIONS_FILE)
        return
    shutil.copyfile(older / name, newest / name)
    assert choose(folder) == older


def test_exchanged_folders_are_noticed(folder, capfd):
    newest, older = find_checkpoints(folder)
    newest.rename(folder / "other")
    older.rename(newest)
    (folder / "other").rename(older)
    with pytest.raises(ValueError, match="none of its 2 checkpoints is valid"):
        choose(folder)
    told = capfd.readouterr().err
    assert "holds step 1: the folder has been renamed or exchanged" in told
    with pytest.raises(ValueError, match="none of its 2"):
        choose(folder, verify=False)


def test_a_manifest_has_to_list_everything_that_is_read(folder, capfd):
    newest, older = find_checkpoints(folder)
    manifest = read_manifest(newest)
    for name in set(names_of_files()) - {MANIFEST_FILE}:
        files = {other: digests for other, digests in manifest.files.items() if other != name}
        write_manifest(newest, 2, files)
        assert choose(folder) == older
        assert f"does not list {name}" in capfd.readouterr().err
    write_manifest(newest, 1, manifest.files)
    assert choose(folder) == older


def test_weights_are_loaded_where_there_is_no_checkpoint_of_the_runs_own(folder, tmp_path):
    newest, older = find_checkpoints(folder)
    empty = str(tmp_path / "empty")

    def start(save, load, **options):
        load = None if load is None else str(load)
        return select_start(CheckpointSettings(save=save, load=load, **options))

    assert start(empty, older) == start(None, older) == Start(older, weights_only=True)
    assert start(empty, folder) == Start(newest, weights_only=True)
    assert start(empty, None) is None
    own = shutil.copytree(older, tmp_path / "own" / older.name)
    resumed = start(str(own.parent), newest)
    assert resumed == Start(own, weights_only=False, skipped=newest)
    for load in (None, own, own.parent):
        assert start(str(own.parent), load) == Start(own, weights_only=False)


def test_weights_that_are_not_there_or_bad_are_no_fresh_start(folder, tmp_path):
    newest, older = find_checkpoints(folder)
    empty = str(tmp_path / "empty")
    flip(newest / "__0_0.distcp")
    told = {
        tmp_path / "nowhere": "neither a checkpoint nor a folder of checkpoints",
        newest: f"is bad: the {ALGORITHMS[DIGEST]} of __0_0.distcp is not",
        folder: f"is bad: the {ALGORITHMS[DIGEST]} of __0_0.distcp is not",
    }
    for load, reason in told.items():
        with pytest.raises(ValueError, match=f"checkpoint.load={load}.*{reason}"):
            select_start(CheckpointSettings(save=empty, load=str(load)))
        with pytest.raises(ValueError, match=f"checkpoint.load={load}.*{reason}"):
            select_start(CheckpointSettings(save=None, load=str(load)), must_resume=True)
    (folder / "only").mkdir()
    for path in (newest, older):
        path.rename(folder / "only" / path.name)
    with pytest.raises(ValueError, match="its checkpoints are gone"):
        select_start(CheckpointSettings(save=str(folder), load=str(folder / "only" / older.name)))


@pytest.mark.parametrize(
    "content", [b"", b"step_000", b"step_00000009\n", b"../elsewhere", b"\xff" * 50, b"a\nb" * 99]
)
def test_a_bad_pointer_is_said_and_does_no_harm(folder, capfd, content):
    (folder / LATEST_FILE).write_bytes(content)
    assert choose(folder) == folder / "step_00000002"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{folder / LATEST_FILE}: ")


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(folder, tmp_path):
    for path in find_checkpoints(folder):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="its checkpoints are gone; to start over"):
        choose(folder)
    (folder / LATEST_FILE).unlink()
    assert choose(folder) is None
    assert choose(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        latest_valid_checkpoint(CheckpointSettings(save=str(folder)), must_resume=True)


def test_a_checkpoint_that_was_being_replaced_comes_back(folder):
    newest, older = find_checkpoints(folder)
    shutil.rmtree(older)
    newest.rename(folder / f".removed_{newest.name}")
    (folder / f".partial_{newest.name}").mkdir()
    assert choose(folder) == newest


def test_without_manifest_only_when_told_to(folder, capfd, trainer):
    for path in find_checkpoints(folder):
        (path / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="none of its 2"):
        choose(folder)
    assert "checkpoint.verify=false" in capfd.readouterr().err
    path = choose(folder, verify=False)
    assert load_checkpoint(path, trainer.train_state).step == 2


class Attack:
    """What a forged file could hold: unpickling it makes a folder."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def put_object(checkpoint, key, content: bytes) -> None:
    """Let the index find another content for an object."""
    index = read_index(checkpoint)
    (place,) = [place for name, place in index.storage_data.items() if name.fqn == key]
    path = checkpoint / place.relative_path
    object.__setattr__(place, "offset", path.stat().st_size)
    object.__setattr__(place, "length", len(content))
    path.write_bytes(path.read_bytes() + content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def objects_of(checkpoint) -> list[str]:
    index = read_index(checkpoint)
    return sorted(
        key
        for key, stored in index.state_dict_metadata.items()
        if type(stored).__name__ == "BytesStorageMetadata"
    )


def forge_common(checkpoint, attack):
    (checkpoint / "common.pt").write_bytes(saved({"progress": attack}))


def forge_common_plainly(checkpoint, attack):
    (checkpoint / "common.pt").write_bytes(pickle.dumps(attack))


def forge_index(checkpoint, attack):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(attack))


def forge_index_within(checkpoint, attack):
    index = read_index(checkpoint)
    index.planner_data = attack
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def forge_generators(checkpoint, attack):
    (key,) = [key for key in objects_of(checkpoint) if key.startswith("rng/")]
    put_object(checkpoint, key, saved([{"torch": attack}]))


def forge_generators_plainly(checkpoint, attack):
    (key,) = [key for key in objects_of(checkpoint) if key.startswith("rng/")]
    put_object(checkpoint, key, pickle.dumps(attack))


def keep_common_in_shards(checkpoint, common=None):
    """Move the content of `common.pt` to where Megatron-Core 0.19 saves it."""
    if common is None:
        common = torch.load(checkpoint / "common.pt", weights_only=True)
    (checkpoint / "common.pt").unlink()
    index = read_index(checkpoint)
    key, name = "common_state/shard_0_1", "__0_0.distcp"
    content = saved([common])
    index.state_dict_metadata[key] = BytesStorageMetadata()
    place = _StorageInfo(name, (checkpoint / name).stat().st_size, len(content))
    index.storage_data[MetadataIndex(key)] = place
    with (checkpoint / name).open("ab") as file:
        file.write(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def forge_common_in_shards(checkpoint, attack):
    keep_common_in_shards(checkpoint, {"progress": {"step": 2}, "args": attack})


def forge_extra_state(checkpoint, attack):
    key = next(key for key in objects_of(checkpoint) if "_extra_state" in key)
    put_object(checkpoint, key, saved([attack]))


def forge_extra_state_in_a_tensor(checkpoint, attack):
    """Transformer Engine unpickles such tensors."""
    key = next(key for key in objects_of(checkpoint) if "_extra_state" in key)
    content = torch.frombuffer(bytearray(pickle.dumps(attack)), dtype=torch.uint8)
    put_object(checkpoint, key, saved([content]))


def forge_extra_state_in_a_storage(checkpoint, attack):
    """A pickle of torch's storages, which torch unpickles unchecked."""

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (saved(attack),)

    forge_extra_state_in_a_tensor(checkpoint, Storage())


def forge_script(checkpoint, attack):
    """An archive that asks to be opened as TorchScript."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(attack))
        archive.writestr("a/constants.pkl", pickle.dumps(attack))
        archive.writestr("a/version", "3")
    (checkpoint / "common.pt").write_bytes(file.getvalue())


FORGERIES = [
    forge_common,
    forge_common_plainly,
    forge_index,
    forge_index_within,
    forge_common_in_shards,
    forge_generators,
    forge_generators_plainly,
    forge_extra_state,
    forge_extra_state_in_a_tensor,
    forge_extra_state_in_a_storage,
    forge_script,
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("forge", FORGERIES)
def test_nothing_is_executed(folder, tmp_path, trainer, forge, verify):
    """Also when the forger has written a manifest that fits, or none is asked for."""
    newest, older = find_checkpoints(folder)
    forge(newest, Attack(tmp_path / "victim"))
    write_manifest(newest, 2, digest_folder(newest))
    assert choose(folder, verify=verify) == older
    with pytest.raises(BadCheckpointError, match=f"checkpoint {newest}: "):
        load_checkpoint(newest, trainer.train_state)
    assert not (tmp_path / "victim").exists()


def test_the_forgeries_are_real(folder, tmp_path):
    """What the attacks would do without the checks."""
    newest, _ = find_checkpoints(folder)
    forge_index(newest, Attack(tmp_path / "victim"))
    pickle.loads((newest / ".metadata").read_bytes())
    assert (tmp_path / "victim").is_dir()
    torch.load(io.BytesIO(saved(Attack(tmp_path / "second"))), weights_only=False)
    assert (tmp_path / "second").is_dir()


@pytest.mark.parametrize(
    "content",
    [{}, {"sharded_backend": "zarr"}, {"sharded_backend": "torch_dist", "more": 1}, [], None],
)
def test_another_format_is_refused(folder, content):
    newest, older = find_checkpoints(folder)
    (newest / "metadata.json").write_text(json.dumps(content))
    write_manifest(newest, 2, digest_folder(newest))
    assert choose(folder) == older


def test_common_values_in_the_shards_are_read(folder, trainer):
    """Under either line of Megatron-Core, as the later saves them."""
    newest, _ = find_checkpoints(folder)
    keep_common_in_shards(newest)
    write_manifest(newest, 2, digest_folder(newest))
    assert choose(folder) == newest
    trainer.progress = load_checkpoint(newest, trainer.train_state)
    assert trainer.progress.step == 2


@pytest.mark.parametrize("where", ["../__0_0.distcp", "/etc/passwd", "a/b", 3, ""])
def test_an_index_does_not_lead_out_of_the_folder(folder, where):
    newest, older = find_checkpoints(folder)
    index = read_index(newest)
    place = next(iter(index.storage_data.values()))
    object.__setattr__(place, "relative_path", where)
    (newest / ".metadata").write_bytes(pickle.dumps(index))
    write_manifest(newest, 2, digest_folder(newest))
    assert choose(folder) == older


@pytest.mark.parametrize(
    "common", [[], {}, {"progress": None}, {"progress": {"step": "2"}}, {"progress": {"step": 3}}]
)
def test_a_state_of_something_else_is_refused(folder, common):
    newest, older = find_checkpoints(folder)
    (newest / "common.pt").write_bytes(saved(common))
    write_manifest(newest, 2, digest_folder(newest))
    assert choose(folder) == older
