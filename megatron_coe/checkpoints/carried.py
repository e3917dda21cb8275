"""What a checkpoint carries besides its state, so that it is complete wherever it lies.

    <step>/tokenizer.model   the SentencePiece model that its data were made with, or
    <step>/tokenizer/…       the files of the Hugging Face tokenizer
    <step>/hf/…              what Megatron has no field for in an imported model: `config.json`

Every checkpoint has copies of its own: hard links would be cheaper, but one damaged file would then
damage all checkpoints. A checkpoint of an earlier version has neither; `hf` may lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_coe.checkpoints.durable import FileFacts, sync, write_file
from megatron_coe.data.tokenizer import tokenizer_files

TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_FOLDER = "tokenizer"
KEPT_FOLDER = "hf"


def own_tokenizer(step: Path) -> Path | None:
    """Return a checkpoint's copy of its tokenizer, for `load_tokenizer`; None if it has none."""
    if (step / TOKENIZER_FOLDER).is_dir():
        return step / TOKENIZER_FOLDER
    return step / TOKENIZER_MODEL if (step / TOKENIZER_MODEL).is_file() else None


def kept_folder(step: Path) -> Path:
    """Return where the rest of an imported model is, if the checkpoint comes from one."""
    own = step / KEPT_FOLDER
    return own if own.is_dir() else step.parent / KEPT_FOLDER


def tokenizer_content(path: Path) -> dict[str, bytes]:
    """Read all files of a SentencePiece model or Hugging Face folder: content by its name in a
    checkpoint."""
    if path.is_file():
        return {TOKENIZER_MODEL: path.read_bytes()}
    return {
        f"{TOKENIZER_FOLDER}/{file.relative_to(path).as_posix()}": file.read_bytes()
        for file in tokenizer_files(path)
    }


def kept_content(step: Path) -> dict[str, bytes]:
    """Read what a checkpoint keeps of an imported model: content by its name in a checkpoint."""
    folder = kept_folder(step)
    return {
        f"{KEPT_FOLDER}/{path.name}": path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.is_file()
    }


def write_content(step: Path, content: Mapping[str, bytes]) -> dict[str, FileFacts]:
    """Write files under a checkpoint's folder, durably. Raises: OSError."""
    facts = {}
    for name, data in content.items():
        path = step / name
        path.parent.mkdir(parents=True, exist_ok=True)
        facts[name] = write_file(path, data)
    for folder in {(step / name).parent for name in content} - {step}:
        sync(folder)
    return facts
