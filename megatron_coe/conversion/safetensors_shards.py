"""Weights of a Hugging Face folder, one at a time, in one or more safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_coe.utils.files import give_default_mode

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The dtypes that weights may have, by their names in safetensors.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ShardReader:
    """The weights of a folder by name; one file is open at a time."""

    def __init__(self, folder: Path) -> None:
        """Read the index of a folder. Raises: ValueError naming a missing or damaged file."""
        self.folder = folder
        self._file_of = self._read_index()
        self._open_path: Path | None = None
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in sorted(set(self._file_of.values())):
            if not path.is_file():
                raise ValueError(f"{path} is missing, which {folder / INDEX_FILE} names")
            self._read_shapes(path)

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][1]

    def file_of(self, name: str) -> Path:
        """Return the file that holds a weight."""
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        path = self._file_of[name]
        if path != self._open_path:  # one file at a time is mapped
            self._handle, self._open_path = _open(path), path
        return self._handle.get_tensor(name)

    def _read_index(self) -> dict[str, Path]:
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {name: Path(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{index}: not an index of safetensors files") from error
            for file in files.values():
                if file.is_absolute() or ".." in file.parts:
                    raise ValueError(f"{index}: names {file}, which is outside of the folder")
            if single.is_file() and Path(SINGLE_FILE) not in files.values():
                raise ValueError(
                    f"{single} and {index}, which does not name it, are both there: remove the one "
                    "that is not the model"
                )
            return {name: self.folder / file for name, file in files.items()}
        if not single.is_file():
            raise ValueError(f"{self.folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        return dict.fromkeys(_open(single).keys(), single)

    def _read_shapes(self, path: Path) -> None:
        handle = _open(path)
        present = set(handle.keys())
        for name, file in self._file_of.items():
            if file != path:
                continue
            if name not in present:
                raise ValueError(f"{path}: lacks {name}, which the index says it holds")
            entry = handle.get_slice(name)
            dtype = _DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"{path}: {name} has dtype {entry.get_dtype()}: known are {', '.join(_DTYPES)}"
                )
            self._shapes[name] = (tuple(entry.get_shape()), dtype)
        for name in sorted(present):
            named = self._file_of.get(name)
            if named is None:
                raise ValueError(f"{path}: holds {name}, which the index does not name")
            if named != path:
                raise ValueError(f"{path}: holds {name}, which the index says {named} holds")


class ShardWriter:
    """Writer of safetensors files, each as large as `max_bytes` allows.

    Raises: OSError when a file cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._names: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a weight to the current file, or to the next one if it does not fit.

        Args:
            tensor: kept until its file is written; it must not be a view, which would keep its
                whole storage in memory.
        """
        self.make_room(tensor.nbytes)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def make_room(self, size: int) -> None:
        """Write the current file if `size` more bytes would not fit into it."""
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()

    def close(self) -> None:
        """Write the last file and, if there are several, the index."""
        self._flush()
        count = len(self._names)
        if count == 1:
            self._temporary(0).rename(self.folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        path = self._temporary(len(self._names))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"cannot write {path}: {error}") from error
        give_default_mode(path)
        self._names.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        """Name of a file until the number of files is known."""
        return self.folder / f"part-{number + 1:05d}.safetensors"


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
