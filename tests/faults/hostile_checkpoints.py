"""Checkpoints of an attacker: any pickle may be a payload, and the manifest matches."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.faults.canary import HostileCase, call, canary
from tests.faults.commands import TRAIN, Case
from tests.faults.payloads import PAYLOADS, dotted, pickle_in_pickle, system
from tests.faults.spoil import Make

STEP = "run/checkpoints/step_00000001"
_CHECKPOINT = ("checkpoint",)
_TO_HF = "tools/convert_checkpoint.py to-hf --input {d}/run/checkpoints --output {d}/out"
_UPCYCLE = "tools/upcycle.py --input {d}/run/checkpoints --output {d}/out"
_GENERATE = (
    "tools/generate.py --device cpu --prompt one --max-new-tokens 1 --model {d}/run/checkpoints"
)


def cases() -> Iterator[Case]:
    def resume(name: str, spoil: Make, *says: str) -> Case:
        return HostileCase(
            f"checkpoint: {name}", TRAIN, says, _sealed(spoil), _CHECKPOINT, late=True
        )

    for name, payload in PAYLOADS.items():
        yield resume(f".metadata, {name}", _payload_at(".metadata", payload), ".metadata")
    yield resume(".metadata with its class", _instructed, ".metadata")
    yield resume("common.pt, zip", _torch_saved("common.pt"), "common.pt")
    yield resume("common.pt, before zip", _torch_saved("common.pt", zipped=False), "common.pt")
    yield resume("common.pt, bare pickle", _payload_at("common.pt", system), "common.pt")
    yield resume("common.pt, dotted name", _payload_at("common.pt", dotted), "common.pt")
    yield resume("common.pt, deep inside", _deep_in_common, "common.pt")
    yield resume("common.pt, tar", _tar, "common.pt")
    yield resume("generators' state", _object_of("rng"), "rng")
    yield resume("module's extra state", _object_of("_extra_state"), "_extra_state")
    yield resume("module's extra state, in a tensor", _bytes_of("_extra_state"), "_extra_state")
    yield resume("a tensor", _tensor, "")
    yield resume("data outside of the folder", _elsewhere, ".metadata")
    yield resume(
        "another format",
        _json_at("metadata.json", {"sharded_backend": "zarr", "sharded_backend_version": 1}),
        "metadata.json",
    )
    yield HostileCase(
        "checkpoint: manifest of another folder",
        TRAIN,
        ("manifest.json",),
        _manifest_elsewhere,
        _CHECKPOINT,
        late=True,
    )
    for tool, command in (("to-hf", _TO_HF), ("upcycle", _UPCYCLE)):
        for payload in ("os.system", "a dotted name in torch"):
            yield HostileCase(
                f"checkpoint: {tool}, {payload}",
                command,
                (".metadata",),
                _sealed(_payload_at(".metadata", PAYLOADS[payload])),
                _CHECKPOINT if tool == "to-hf" else ("moe",),
                late=True,
            )
    yield HostileCase(
        "checkpoint: generate",
        _GENERATE,
        (".metadata",),
        _sealed(_payload_at(".metadata", system)),
        _CHECKPOINT,
        late=True,
    )
    yield HostileCase(
        "checkpoint: settings with a tag",
        _TO_HF,
        ("config.yaml", "refused by OmegaConf"),
        _sealed(
            _text_at("config.yaml", "train: !!python/object/apply:os.system ['touch {d}/canary']")
        ),
        _CHECKPOINT,
        late=True,
    )
    yield HostileCase(
        "checkpoint: settings that read the environment",
        _TO_HF,
        ("config.yaml", "oc.env"),
        _sealed(_text_at("config.yaml", "log: {{dir: '${{oc.env:HOME}}'}}")),
        _CHECKPOINT,
        late=True,
    )


def _sealed(spoil: Make) -> Make:
    """Corrupt a checkpoint and write a matching manifest, as an attacker would."""

    def make(folder: Path) -> None:
        from megatron_coe.checkpoint.manifest import digest_folder, write_manifest

        spoil(folder)
        step = folder / STEP
        write_manifest(step, 1, digest_folder(step))

    return make


def _payload_at(name: str, payload: Callable[[Path], bytes]) -> Make:
    return lambda folder: (folder / STEP / name).write_bytes(payload(canary(folder)))


def _text_at(name: str, text: str) -> Make:
    return lambda folder: (folder / STEP / name).write_text(text.format(d=folder))


def _json_at(name: str, content: object) -> Make:
    return lambda folder: (folder / STEP / name).write_text(json.dumps(content))


def _torch_saved(name: str, zipped: bool = True) -> Make:
    def make(folder: Path) -> None:
        path = folder / STEP / name
        torch.save(call(folder), path, _use_new_zipfile_serialization=zipped)

    return make


def _deep_in_common(folder: Path) -> None:
    path = folder / STEP / "common.pt"
    common = torch.load(path, weights_only=True)
    common["progress"]["samples"] = [{"n": (call(folder),)}]
    torch.save(common, path)


def _tar(folder: Path) -> None:
    """The oldest format: a tar archive of pickles."""
    import tarfile

    with tarfile.open(folder / STEP / "common.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = system(canary(folder))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _instructed(folder: Path) -> None:
    """A real index, with a call among its values."""
    path = folder / STEP / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.planner_data = call(folder)
    path.write_bytes(pickle.dumps(index))


def _object_of(kind: str) -> Make:
    return lambda folder: _replace_entry(folder, kind, call(folder))


def _bytes_of(kind: str) -> Make:
    """A pickle in a tensor of bytes, which Transformer Engine would open."""

    def make(folder: Path) -> None:
        data = np.frombuffer(pickle_in_pickle(canary(folder)), dtype=np.uint8)
        _replace_entry(folder, kind, torch.from_numpy(data.copy()))

    return make


def _tensor(folder: Path) -> None:
    _replace_entry(folder, "weight", call(folder))


def _replace_entry(folder: Path, kind: str, content: object) -> None:
    """Store something else where the first key that contains `kind` has its data."""
    path = folder / STEP / ".metadata"
    index = pickle.loads(path.read_bytes())
    entry, place = next(
        (entry, place) for entry, place in index.storage_data.items() if kind in entry.fqn
    )
    saved = io.BytesIO()
    torch.save(content, saved)
    shard = folder / STEP / place.relative_path
    moved = replace(place, offset=shard.stat().st_size, length=len(saved.getvalue()))
    index.storage_data[entry] = moved
    with shard.open("ab") as file:
        file.write(saved.getvalue())
    path.write_bytes(pickle.dumps(index))


def _elsewhere(folder: Path) -> None:
    path = folder / STEP / ".metadata"
    index = pickle.loads(path.read_bytes())
    for entry, place in index.storage_data.items():
        index.storage_data[entry] = replace(place, relative_path="../../../payload")
    torch.save(call(folder), folder / "payload")
    path.write_bytes(pickle.dumps(index))


def _manifest_elsewhere(folder: Path) -> None:
    path = folder / STEP / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["../../../payload"] = {"size": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
