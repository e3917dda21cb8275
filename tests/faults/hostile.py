"""Input made to run something: checkpoints, data, tokenizers, models and settings of an attacker.

    python -m tests.faults.hostile [-O] [part of a name …]

Every payload touches a canary if it is ever opened carelessly (tests/faults/payloads.py; the tests
see each of them do it). Through the real command lines none may: the run ends with a message, or,
where what is hostile is no more than a file that is not needed, goes on without it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tests.faults import hostile_checkpoints
from tests.faults.canary import HostileCase, call, canary
from tests.faults.commands import TRAIN, Case, main
from tests.faults.payloads import system
from tests.faults.spoil import Make

_FROM_HF = "tools/convert_checkpoint.py from-hf --input {d}/hf --output {d}/out"
_GENERATE = "tools/generate.py --device cpu --prompt one --max-new-tokens 1"


def cases() -> list[Case]:
    return [
        *hostile_checkpoints.cases(),
        *_indices(),
        *_tokenizers(),
        *_models(),
        *_settings(),
    ]


# --- indices of data ------------------------------------------------------------------------------


def _indices() -> Iterator[Case]:
    """An index cache that has changed is rebuilt, whoever wrote its digests."""
    for name, write in (("a pickle", _pickled_index), ("objects", _objects_index)):
        yield HostileCase(
            f"data: {name} in the index cache",
            f"{TRAIN} data.cache={{d}}/cache",
            ("rebuilding it",),
            _cached(write),
            status=0,
            late=True,
        )
    yield HostileCase(
        "data: a pickle as .idx",
        TRAIN,
        ("{d}/a.idx",),
        lambda folder: (folder / "a.idx").write_bytes(system(canary(folder))),
    )
    yield HostileCase(
        "data: a pickle as .bin",
        TRAIN,
        ("{d}/a.bin",),
        lambda folder: (folder / "a.bin").write_bytes(system(canary(folder))),
    )


def _pickled_index(path: Path, folder: Path) -> None:
    path.write_bytes(system(canary(folder)))


def _objects_index(path: Path, folder: Path) -> None:
    np.save(path, np.array([call(folder)], dtype=object), allow_pickle=True)


def _cached(spoil: Callable[[Path, Path], object]) -> Make:
    """Build the cache as the run would, and corrupt every index in it, seal included."""

    def make(folder: Path) -> None:
        from megatron_coe.data.datasets import build_datasets
        from megatron_coe.data.index_cache import _write_digests
        from megatron_coe.data.tokenizer import load_tokenizer

        build_datasets(
            train=[f"{folder}/a"],
            valid=[f"{folder}/a"],
            tokenizer=load_tokenizer(folder / "t.model"),
            seq_length=16,
            mode="packed",
            num_samples=(4, None),
            seed=42,
            cache_dir=folder / "cache",
        )
        for path in (folder / "cache").glob("*/*.npy"):
            spoil(path, folder)
        for kept in (folder / "cache").iterdir():
            (kept / "sha256.json").unlink()
            _write_digests(kept)

    return make


# --- tokenizers -----------------------------------------------------------------------------------


_CODE = "open({canary!r}, 'w').close()\n"


def _tokenizers() -> Iterator[Case]:
    yield HostileCase(
        "tokenizer: a pickle as .model",
        TRAIN,
        ("{d}/t.model", "SentencePiece"),
        lambda folder: (folder / "t.model").write_bytes(system(canary(folder))),
    )
    command = f"{TRAIN} data.tokenizer={{d}}/tok"
    yield HostileCase(
        "tokenizer: a pickle as tokenizer.json",
        command,
        ("{d}/tok",),
        _folder("tok", {"tokenizer.json": system}),
    )
    yield HostileCase("tokenizer: code of its own", command, ("{d}/tok",), _own_code("tok"))
    yield HostileCase(
        "tokenizer: code of its own, preprocessing",
        "tools/preprocess_data.py --input {d}/in.txt --tokenizer {d}/tok --output-prefix {d}/x",
        ("{d}/tok",),
        _own_code("tok"),
    )
    yield HostileCase(
        "tokenizer: a class by its path", command, ("{d}/tok",), _own_class("os.system")
    )
    yield HostileCase(
        "tokenizer: template that leaves its sandbox",
        f"{_GENERATE} --model {{d}}/hf",
        (),
        _template,
        ("hf",),
        status=0,
    )


def _folder(name: str, files: dict[str, Callable[[Path], bytes]]) -> Make:
    def make(folder: Path) -> None:
        (folder / name).mkdir(exist_ok=True)
        for file, content in files.items():
            (folder / name / file).write_bytes(content(canary(folder)))

    return make


def _code(path: Path) -> bytes:
    return _CODE.format(canary=str(path)).encode()


def _as_json(content: object) -> Callable[[Path], bytes]:
    return lambda path: json.dumps(content).encode()


def _own_code(name: str) -> Make:
    auto = {
        "AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"],
        "AutoConfig": "tokenization_own.Own",
    }
    return _folder(
        name,
        {
            "tokenization_own.py": _code,
            "config.json": _as_json({"model_type": "own", "auto_map": auto}),
            "tokenizer_config.json": _as_json({"tokenizer_class": "Own", "auto_map": auto}),
        },
    )


def _own_class(path: str) -> Make:
    return _folder(
        "tok",
        {
            "tokenizer_config.json": _as_json({"tokenizer_class": path}),
            "tokenizer.model": system,
        },
    )


def _template(folder: Path) -> None:
    escape = f"{{{{ cycler.__init__.__globals__.os.popen('touch {canary(folder)}').read() }}}}"
    path = folder / "hf" / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"chat_template": escape}
    path.write_text(json.dumps(content))
    (folder / "hf" / "chat_template.jinja").write_text(escape)


# --- models for Hugging Face ----------------------------------------------------------------------


def _models() -> Iterator[Case]:
    def imported(name: str, spoil: Make, *says: str, command: str = _FROM_HF) -> Case:
        return HostileCase(f"model: {name}", command, says, spoil, ("hf",))

    generate = f"{_GENERATE} --model {{d}}/hf"
    weights = "model.safetensors"
    yield imported("pickled weights", _pickled_weights, "{d}/hf", weights)
    yield imported("pickled weights, to generate", _pickled_weights, "{d}/hf", command=generate)
    yield imported("a pickle as safetensors", _folder("hf", {weights: system}), weights)
    yield imported(
        "a pickle as safetensors, to generate",
        _folder("hf", {weights: system}),
        "{d}/hf",
        command=generate,
    )
    yield imported("header of exabytes", _header(b"{}", 1 << 62), weights)
    yield imported("header nested deep", _header(b"[" * 200_000), weights)
    lies = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 8]}
    yield imported("shape that lies", _header(json.dumps({"x": lies}).encode()), weights)
    lies = {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 60]}
    yield imported("data beyond the end", _header(json.dumps({"x": lies}).encode()), weights)
    yield imported("index into other folders", _index("../../payload.safetensors"), "payload")
    yield imported("index of an absolute path", _index("/etc/passwd"), "passwd")
    yield imported(
        "code of its own, to generate",
        _own_code("hf"),
        "{d}/hf",
        "trust_remote_code",
        command=generate,
    )
    yield imported("code of its own, to import", _own_code("hf"), "{d}/hf/config.json")
    yield HostileCase(
        "model: other code under our names",
        generate,
        (),
        _folder("hf", {"modeling_coe.py": _code, "configuration_coe.py": _code}),
        ("hf",),
        status=0,
    )


def _pickled_weights(folder: Path) -> None:
    (folder / "hf" / "model.safetensors").unlink()
    torch.save({"weight": call(folder)}, folder / "hf" / "pytorch_model.bin")


def _header(header: bytes, length: int | None = None) -> Make:
    content = struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 8
    return _folder("hf", {"model.safetensors": lambda path: content})


def _index(target: str) -> Make:
    def make(folder: Path) -> None:
        (folder / "hf" / "model.safetensors").rename(folder / "payload.safetensors")
        index = {"weight_map": {"model.norm.weight": target}}
        (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


# --- settings -------------------------------------------------------------------------------------


def _settings() -> Iterator[Case]:
    def text(name: str, content: str, *says: str) -> Case:
        def make(folder: Path) -> None:
            (folder / "run.yaml").write_text(content.replace("{d}", str(folder)))

        return HostileCase(f"settings: {name}", TRAIN, ("{d}/run.yaml", *says), make)

    apply = "!!python/object/apply:os.system ['touch {d}/canary']"
    yield text("an object made by a call", f"train: {{steps: {apply}}}", "refused by OmegaConf")
    yield text(
        "an object constructed",
        "train: !!python/object/new:os.system ['touch {d}/canary']",
        "refused by OmegaConf",
    )
    yield text("a module", "model: {x: !!python/module:os ''}", "refused by OmegaConf")
    yield text("a function", "model: {x: !!python/name:os.system ''}", "refused by OmegaConf")
    yield HostileCase(
        "settings: a call in an override", f'{TRAIN} "train.steps={apply}"', ("train.steps",)
    )
    yield HostileCase(
        "settings: a call in the extended file",
        TRAIN,
        ("{d}/b.yaml",),
        lambda folder: (
            (folder / "run.yaml").write_text("extends: b.yaml"),
            (folder / "b.yaml").write_text(f"model: {{x: {apply}}}"),
        ),
    )
    for resolver in ("oc.env:PATH", "oc.decode:'${oc.env:PATH}'", "oc.create:'{a: 1}'"):
        yield text(f"resolver {resolver}", f'log: {{dir: "${{{resolver}}}"}}', "section.key")
    yield text(
        "resolver by a reference",
        "log: {dir: '${${log.wandb_exp_name}:PATH}', wandb_exp_name: oc.env}",
        "section.key",
    )


if __name__ == "__main__":
    main("tests.faults.hostile")
